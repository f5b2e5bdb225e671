"""Which operation of a traced graph overwrites what."""

from __future__ import annotations

import inspect
import operator

from torch.fx import Node

from tmm.passes.graph.dropout_functions import dropout_in_place_with_mask

_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor),
    *(operator.ilshift, operator.irshift, operator.setitem),
)

_METHODS = tuple(f"__{operation.__name__}__" for operation in _OPERATORS[:-1])


def overwritten_by(node: Node) -> Node | None:
    """The tensor that ``node`` overwrites; None for an operation that overwrites nothing.

    The running statistics of a normalization do not count.
    """
    if node.op == "call_method":
        name = str(node.target)
        in_place = overwrites(name)
    elif node.op == "call_function":
        if isinstance(out := node.kwargs.get("out"), Node):
            return out
        name = str(getattr(node.target, "__name__", ""))
        in_place = node.target in _OPERATORS or node.kwargs.get("inplace") is True
        in_place = in_place or overwrites(name)
        in_place = in_place or node.target is dropout_in_place_with_mask
        in_place = in_place or _is_in_place_by_position(node)
    else:
        return None
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if in_place and isinstance(first, Node) else None


def overwrites(name: str) -> bool:
    """Whether a method of that name overwrites its tensor, by torch's convention."""
    if name.startswith("__"):
        return name == "__setitem__" or name in _METHODS
    return name.endswith("_")


def _is_in_place_by_position(node: Node) -> bool:
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return "inplace" in names[: len(node.args)] and node.args[names.index("inplace")] is True
