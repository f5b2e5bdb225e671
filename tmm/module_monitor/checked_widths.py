"""The refined coordinate check of torch-module-monitor's users."""

from __future__ import annotations

import torch

from tmm.module_monitor.module_monitor import ModuleMonitor


def l2_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The 2-norms along the last dimension, of shape ``tensor.shape[:-1]``."""
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, ord=2, dim=-1)
    return norms


class RefinedCoordinateCheck:
    """The refined coordinate check (Haas, Bordt, von Luxburg, Vankadara 2025) of a monitor.

    What ``tmm.rcc(operands=True)`` says of the rows holds here. It is computed in the forward pass
    of the monitored module.

    Raises:
        ValueError: if ``monitor`` lacks the module or the reference module.
    """

    def __init__(self, monitor: ModuleMonitor) -> None:
        if monitor.module is None:
            raise ValueError(
                "Set the module to monitor before setting up the refined coordinate check."
            )
        if monitor.reference_module is None:
            raise ValueError(
                "Set the reference module before setting up the refined coordinate check."
            )
        self.monitor = monitor
        self.logger = monitor.logger
        self.module = monitor.module
        self.reference_module = monitor.reference_module
        self.format_module_name_fn = monitor.format_module_name_fn
        self.cpu_offload = monitor.cpu_offload
        monitor.check_coordinates()

    def refined_coordinate_check(self) -> None:
        """Record the check of this step; nothing happens outside of monitored steps.

        Raises:
            ValueError: if no forward pass has run in the step.
        """
        self.monitor.use_coordinate_check()
