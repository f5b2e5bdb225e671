"""What a program shows of its own accord while it runs: tensors and attentions, by name."""

from __future__ import annotations

import torch

from tmm.core.metrics import Aggregate
from tmm.instrumentation.twin import running_twin
from tmm.kernels.ops import tap_attention, tap_shown, tap_value

Owner = torch.nn.Module | str
"""A module of the model, or a name as in keys."""


def show_value(
    name: str, tensor: torch.Tensor, aggregate: Aggregate | None, *, any_family: bool
) -> None:
    """Record a tensor under a key; see ``tmm.record``, and ``RecordedValues.declare``."""
    if is_traced():
        # Evaluated while Dynamo traces: the plain program has neither the test nor the mark.
        if _declare(name, type(tensor), aggregate, any_family):
            tap_value(tensor, name)
        return
    twin = running_twin()
    if twin is not None:
        twin.eager_rows.declare(name, type(tensor), aggregate, any_family=any_family)
        twin.eager_rows.record(name, tensor)


def show_activation(owner: Owner, path: str, tensor: torch.Tensor) -> None:
    """Measure a tensor by the rules that match ``owner`` and ``path`` as if it were an output."""
    if is_traced():
        if is_shown():
            tap_shown(tensor, _identity(owner), _path(owner, path))
        return
    twin = running_twin()
    if twin is not None:
        twin.show(owner, path, tensor)


def show_attention(
    owner: Owner,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Measure the entropies of an attention, per head, as ``attention_entropy`` of ``owner``.

    Shapes as of ``torch.nn.functional.scaled_dot_product_attention``.
    """
    if is_traced():
        if is_shown():
            place = _identity(owner), _path(owner, "")
            tap_attention(query, key, mask, is_causal, scale, *place)
        return
    twin = running_twin()
    if twin is not None:
        twin.eager_rows.show_attention(owner, query, key, mask, is_causal, scale)


def is_shown() -> bool:
    """Whether the program that runs, or is traced, is a monitored one."""
    shown: bool = _is_shown()
    return shown


def is_traced() -> bool:
    """Whether Dynamo traces what calls this, even if that is not to know."""
    # The program of a model that is not compiled is told that nothing is (`eager_backend`).
    traced: bool = torch.compiler.is_compiling() or _is_traced_by_twin()
    return traced


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_traced_by_twin() -> bool:
    twin = running_twin()
    return twin is not None and twin.is_tracing


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_shown() -> bool:
    return running_twin() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _identity(owner: Owner) -> int:
    # A graph that serves several modules would be traced anew for each if this were guarded on;
    # its sites are relative to the module that runs it.
    return 0 if isinstance(owner, str) else id(owner)


def _path(owner: Owner, path: str) -> str:
    return owner + path if isinstance(owner, str) else path


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _declare(name: str, tensor_type: type, aggregate: Aggregate | None, any_family: bool) -> bool:
    twin = running_twin()
    if twin is None:
        return False
    twin.eager_rows.declare(name, tensor_type, aggregate, any_family=any_family)
    return True
