"""The tensors inside a module's output."""

from __future__ import annotations

import torch

from tmm.kernels.ops import tap, tap_input


def tensors_in(output: object) -> list[tuple[str, torch.Tensor]]:
    """Each tensor in ``output`` with its path: empty for a tensor, else ``"[0]"``, ``"[a][b]"``.

    Tuples and lists are walked by position, dicts by key and dataclasses by field; whatever else
    is no tensor is skipped. Where two paths would be equal, as of the keys 0 and ``"0"``, keys are
    written as in Python: ``"['0']"``. Also traced by Dynamo, hence so plain.
    """
    found: list[tuple[str, torch.Tensor]] = []
    _walk(output, "", found, False)
    if len(found) > 1 and len({path for path, _ in found}) < len(found):
        return _told_apart(output, found)
    return found


def _told_apart(
    output: object, found: list[tuple[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    """The same tensors with paths that differ, those that differ already as they are."""
    exact: list[tuple[str, torch.Tensor]] = []
    _walk(output, "", exact, True)
    plain = [path for path, _ in found]
    paths = [exact[place][0] if plain.count(path) > 1 else path for place, path in enumerate(plain)]
    if len(set(paths)) < len(paths):
        paths = [path for path, _ in exact]
    told: list[tuple[str, torch.Tensor]] = []
    for place, path in enumerate(paths):
        before = paths[:place].count(path)
        told.append((f"{path} ({before + 1})" if before else path, found[place][1]))
    return told


def _walk(value: object, path: str, found: list[tuple[str, torch.Tensor]], is_exact: bool) -> None:
    if isinstance(value, torch.Tensor):
        found.append((path, value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk(item, f"{path}[{key!r}]" if is_exact else f"{path}[{key}]", found, is_exact)
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            _walk(item, f"{path}[{position}]", found, is_exact)
    elif value is None or isinstance(value, (int, float, str, type)):
        pass  # Dynamo cannot ask a symbolic number for its attributes
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            _walk(getattr(value, name), f"{path}[{name}]", found, is_exact)


def mark_outputs(module: torch.nn.Module, arguments: object, output: object) -> None:
    """Forward hook for tracing: mark every tensor of the output in the graph.

    One function for all modules, without a closure, so that modules that are otherwise equal can
    share one graph. It returns nothing: the traced program stays the user's own.
    """
    for path, tensor in tensors_in(output):
        if tensor.requires_grad and torch.is_grad_enabled():
            tap(tensor, path)
        else:
            tap(tensor, path, tensor.requires_grad, torch.is_grad_enabled())


def mark_nothing(module: torch.nn.Module, arguments: object) -> None:
    """Forward pre-hook for tracing: keeps the place of one that runs between graphs."""


def mark_inputs(
    module: torch.nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]
) -> None:
    """Forward pre-hook for tracing: mark the first argument, if it is a tensor."""
    for value in (*arguments, *keywords.values()):
        if isinstance(value, torch.Tensor):
            tap_input(value, "")
        return
