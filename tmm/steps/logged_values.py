"""What a user may log into a step."""

from __future__ import annotations

import torch

from tmm.core.failures import Gaps
from tmm.core.metrics import AGGREGATE_NAMES
from tmm.spec.ranks import is_distributed, local_part
from tmm.steps.timeline import StepTimeline


def check_logged(caller: str, key: object, aggregate: object) -> None:
    """Raise ``ValueError`` for a key or an aggregate under which nothing can be logged."""
    if not isinstance(key, str) or not key:
        raise ValueError(f"{caller}: the key {key!r} is not text, or empty")
    if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
        raise ValueError(
            f"{caller}({key!r}): aggregate={aggregate!r} is neither callable nor one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )


def one_number(caller: str, key: str, value: object) -> torch.Tensor:
    """``value`` as a tensor of one element; raises ``TypeError`` or ``ValueError`` for others."""
    try:
        number = (
            value
            if isinstance(value, torch.Tensor)
            else torch.as_tensor(value, dtype=torch.float64, device="cpu")
        )
    except OverflowError as error:
        raise ValueError(f"{caller}({key!r}): the value is too large for a float64") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{caller}({key!r}): {value!r} is not a number") from error
    number = real_values(caller, key, number)
    if number.numel() != 1:
        raise ValueError(
            f"{caller}({key!r}): the value has shape {tuple(number.shape)}, not one number;"
            " log_tensor joins all elements"
        )
    return number


def real_values(caller: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """``values_here`` of what holds real numbers, written out; raises ``ValueError`` for others."""
    tensor = values_here(caller, key, tensor)
    if tensor.is_complex():
        raise ValueError(f"{caller}({key!r}): the value is complex; log its abs() or its real part")
    if tensor.is_meta or tensor.is_quantized:
        kind = "on the meta device" if tensor.is_meta else "quantized"
        raise ValueError(f"{caller}({key!r}): the value is {kind}; log one with numbers in memory")
    if tensor.is_nested:
        parts = tensor.unbind()  # its values may hold more than its elements
        flat = [part.reshape(-1) for part in parts]
        return torch.cat(flat) if flat else torch.empty(0, device=tensor.device)
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor


def values_here(caller: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The elements that this rank has of a tensor that is logged, without its gradient.

    Raises ``ValueError`` for a ``DTensor`` that ranks have yet to sum: a process that logs alone
    would wait for the others.
    """
    tensor = tensor.detach()
    if is_distributed(tensor) and any(how.is_partial() for how in tensor.placements):
        raise ValueError(
            f"{caller}: {key!r} is a DTensor that processes have yet to sum; log the result of its"
            " full_tensor()"
        )
    return local_part(tensor)


def tell_of_no_step(caller: str, key: str, timeline: StepTimeline, gaps: Gaps) -> None:
    """Say, once, that what is logged while no step is open is not recorded."""
    if not timeline.is_open:
        gaps.warn_once(
            "logged between steps",
            timeline.begun or 0,
            f"{caller}({key!r}) was called while no step was open, so that nothing is recorded."
            " Call it in `with monitor.step(n):`, or between begin_step and end_step",
        )
