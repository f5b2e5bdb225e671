"""What a model is compared with: itself at first, another module, a state dict, a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from tmm.naming import buffer_names, parameter_names, unwrapped_names
from tmm.rules import BRANCH_FAMILIES
from tmm.spec import Plan, ReferenceSource

DIFFERENCE = "parameter_difference"

_LISTED = 5  # differing names in a message
_NESTED = ("state_dict", "model_state_dict", "model")


class Reference:
    """A counterpart for each parameter and buffer of a model that is compared.

    Counterparts are found by identity, so that tied parameters have tied ones. Those that are kept
    on another device, or in another dtype, are brought over when they are asked for, and are given
    up with ``release``.
    """

    def __init__(
        self,
        names: Mapping[torch.Tensor, str],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._own = [own for own, name in names.items() if name in tensors]  # keeps the ids valid
        self._kept = {id(own): _keep(tensors[names[own]], own, device, dtype) for own in self._own}
        self._here: dict[int, torch.Tensor] = {}

    def of(self, own: object) -> torch.Tensor | None:
        """The counterpart of a parameter or buffer, with its device and dtype; None without one."""
        key = id(own)
        if key not in self._here:
            kept = self._kept.get(key)
            if kept is None:
                return None
            assert isinstance(own, torch.Tensor)
            if kept.device == own.device and kept.dtype == own.dtype:
                return kept
            self._here[key] = kept.to(own.device, own.dtype, non_blocking=True)
        return self._here[key]

    def release(self) -> None:
        """Give up what was brought over."""
        self._here.clear()


def load_reference(
    module: torch.nn.Module, plan: Plan, source: ReferenceSource | None
) -> Reference | None:
    """The reference for ``module`` that ``source`` gives; None without one.

    Raises:
        ValueError: names, shapes or dtypes differ, which are listed, or a file holds no state dict.
        OSError: a file cannot be read.
    """
    spec = plan.spec
    if source is None:
        return None
    names: dict[torch.Tensor, str] = {
        parameter: name for parameter, (name, _) in parameter_names(module).items()
    }
    if not any(spec.measures(family) for family in BRANCH_FAMILIES):
        names = {own: name for own, name in names.items() if plan.metrics(name, DIFFERENCE)}
    else:
        names |= buffer_names(module)
    device = None if spec.reference_device is None else torch.device(spec.reference_device)
    if isinstance(source, str) and source == "init":
        tensors = {name: own.detach() for own, name in names.items()}
        return Reference(names, tensors, device, spec.reference_dtype)
    found = _tensors(source)
    optional = {name for own, name in names.items() if not isinstance(own, torch.nn.Parameter)}
    problems = []
    for own, name in names.items():
        other = found.get(name)
        if other is None:
            problems += [] if name in optional else [f"{name} is missing"]
        elif other.shape != own.shape:
            problems.append(f"{name} has shape {tuple(other.shape)}, not {tuple(own.shape)}")
        elif other.dtype != own.dtype and spec.reference_dtype is None:
            problems.append(
                f"{name} has {other.dtype}, not {own.dtype} (reference_dtype= converts)"
            )
        elif _is_live(own, other):
            problems.append(f"{name} is the parameter itself, which will change: give a copy")
    if any(problem.endswith("is missing") for problem in problems):
        known = {*names.values(), *plan.parameters}
        problems += [f"{name} is not in the model" for name in found if name not in known]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"reference= does not fit the model: {'; '.join(problems[:_LISTED])}{more}"
        )
    return Reference(names, found, device, spec.reference_dtype)


def _is_live(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``other`` is the model's own tensor, which training changes."""
    is_frozen = isinstance(own, torch.nn.Parameter) and not own.requires_grad
    return not is_frozen and other.numel() > 0 and other.data_ptr() == own.data_ptr()


def _keep(
    tensor: torch.Tensor,
    own: torch.Tensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    tensor = tensor.detach()
    device = own.device if device is None else device
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    kept = tensor.to(device, wanted)
    if _is_live(own, kept):
        kept = kept.clone()
    pin = device.type == "cpu" and own.device.type == "cuda"
    return kept.pin_memory() if pin else kept


def _tensors(
    reference: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
) -> dict[str, torch.Tensor]:
    if isinstance(reference, torch.nn.Module):
        parameters = {name: p.detach() for p, (name, _) in parameter_names(reference).items()}
        return parameters | {name: buffer for buffer, name in buffer_names(reference).items()}
    if isinstance(reference, (str, os.PathLike)):
        reference = _read(Path(reference))
    tensors = {name: v for name, v in reference.items() if isinstance(v, torch.Tensor)}
    names = unwrapped_names(tensors)
    return {names[name]: value.detach() for name, value in tensors.items()}


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """The state dict in a file, also where a checkpoint holds it beside other things."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError(
                f"reference={str(path)!r} needs the package safetensors: pip install safetensors"
            ) from error
        loaded: Mapping[str, torch.Tensor] = load_file(path)
        return loaded
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(
            f"reference={str(path)!r} holds no state dict; save one with"
            " torch.save(model.state_dict(), path)"
        )
    return content
