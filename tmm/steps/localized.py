"""Parameters that ``DistributedDataParallel`` with a mesh has taken out of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from tmm.core.module_names import ParameterNames
from tmm.core.torch_private import localized_spec

Tensors = dict[str, torch.Tensor]


class LocalizedParameters:
    """Of a tensor parallel model, the parts of its parameters that this rank trains.

    ``DistributedDataParallel(device_mesh=...)`` makes parameters of these parts. From the first
    forward pass on no module has them any more: each has DTensors that are no parameters.
    ``names`` are those of all, as they were before.
    """

    def __init__(self, names: ParameterNames) -> None:
        found = {
            parameter: (name, localized_spec(parameter)) for parameter, name in names().items()
        }
        self._specs = {name: spec for name, spec in found.values() if spec is not None}
        self.names: dict[torch.nn.Parameter, str] = {
            parameter: name for parameter, (name, spec) in found.items() if spec is not None
        }

    def as_dtensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is kept of a parameter, as the ``DTensor`` that it is a part of; others as is."""
        spec = self._specs.get(name)
        if spec is None or tensor.dim() != len(spec.shape):
            return tensor
        with torch.no_grad():
            return DTensor.from_local(
                *(tensor.detach(), spec.mesh, spec.placements),
                run_check=False,
                shape=spec.shape,
                stride=spec.stride,
            )

    def as_dtensors(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """The same of tensors by the names of their parameters."""
        if not self._specs:
            return dict(tensors)
        return {name: self.as_dtensor(name, tensor) for name, tensor in tensors.items()}
