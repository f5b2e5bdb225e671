"""What a user measures besides: attentions of a module, and the refined coordinate check."""

from __future__ import annotations

import torch

from tmm.module_monitor.module_monitor import ModuleMonitor


def monitor_scaled_dot_product_attention(
    monitor: ModuleMonitor,
    module: str | torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    activation: torch.Tensor | None = None,
    is_reference: bool = False,
) -> None:
    """Measure an attention, per head; for the ``forward`` of a ``MonitorMixin``.

    Query, key, value and, if given, the output (``activation``) are measured by the activation
    metrics that match ``{module}.head_{i}.query``, ``.key``, ``.value`` and ``.activation``, and
    the entropy (in nats, mean over queries) as ``attention_entropy/{module}.head_{i}``: of the
    probabilities before dropout, hence ``dropout_p`` has no effect. Shapes and masks are those of
    ``torch.nn.functional.scaled_dot_product_attention``, with a dimension of heads; with
    ``enable_gqa``, the heads of keys and values are those that each head of the query reads.

    What is shown in the forward pass of the reference is not needed (see
    ``ModuleMonitor.monitor_activations``).
    """
    if is_reference or not monitor.is_monitoring():
        return
    heads = query.shape[-3]
    parts = {"query": query, "key": key, "value": value}
    if activation is not None:
        parts["activation"] = activation
    for name, tensor in parts.items():
        tensor = tensor.detach()
        queries_of_one = max(1, heads // tensor.shape[-3])
        for head in range(heads):
            part = tensor[..., head // queries_of_one, :, :]
            monitor.show(module, f".head_{head}.{name}", part)
    monitor.show_attention(
        *(module, query.detach(), key.detach(), attn_mask), is_causal=is_causal, scale=scale
    )


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
