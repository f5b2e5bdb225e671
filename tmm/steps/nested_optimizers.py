"""Optimizers inside others: what wraps which, and which steps are part of another one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Generic, TypeVar

import torch
from torch.optim import Optimizer

_WRAPPED = ("optimizer", "optim", "base_optimizer", "inner_optimizer", "_optimizer")
"""Attributes under which wrappers keep an optimizer, that are properties in some."""


def calls_hooks(optimizer: object) -> bool:
    """Whether ``optimizer.step`` calls the hooks that are registered on the optimizer.

    ``Optimizer.__init__`` sees to that; classes that only look like optimizers do without it.
    """
    return (
        isinstance(optimizer, Optimizer)
        and "_optimizer_step_pre_hooks" in vars(optimizer)
        and getattr(type(optimizer).step, "hooked", False)
    )


def unwrapped(optimizer: object) -> tuple[Optimizer, ...]:
    """The optimizers that call hooks: itself, or the outermost of those that it merely wraps."""
    if calls_hooks(optimizer):
        assert isinstance(optimizer, Optimizer)
        return (optimizer,)
    return tuple(_found_in(optimizer, passes_on=False))


def inner_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """The optimizers that one keeps to step them, and those that these keep, innermost last."""
    return tuple(_found_in(optimizer, passes_on=True))


def parameters_of(
    optimizer: Optimizer, model: Collection[torch.nn.Parameter]
) -> set[torch.nn.Parameter]:
    """The parameters of ``model`` in an optimizer; if it has none, in those inside of it."""
    own = own_parameters(optimizer).intersection(model)
    if own:
        return own
    inside = (own_parameters(inner) for inner in inner_optimizers(optimizer))
    return set().union(*inside).intersection(model)


def own_parameters(optimizer: Optimizer) -> set[torch.nn.Parameter]:
    """The parameters in the groups of an optimizer."""
    return {p for group in optimizer.param_groups for p in group["params"]}


def _found_in(holder: object, *, passes_on: bool) -> Iterator[Optimizer]:
    """Those inside that call hooks, and with ``passes_on`` those inside of these as well."""
    seen, waiting = {id(holder)}, [holder]
    while waiting:
        for inner in _held(waiting.pop(0)):
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            if calls_hooks(inner):
                yield inner  # type: ignore[misc]
            if passes_on or not calls_hooks(inner):
                waiting.append(inner)


def _held(holder: object) -> Iterator[object]:
    """The optimizers among the attributes of an object, or in lists and dictionaries there."""
    attributes = getattr(holder, "__dict__", {})
    values = [attributes[name] for name in attributes if name not in ("state", "param_groups")]
    values += [getattr(holder, name, None) for name in _WRAPPED if name not in attributes]
    for value in values:
        parts: Iterable[object] = (value,)
        if isinstance(value, (list, tuple)):
            parts = value
        elif isinstance(value, dict):
            parts = value.values()
        yield from filter(_is_optimizer, parts)


def _is_optimizer(value: object) -> bool:
    kind = type(value)  # which may be one that only looks like an optimizer
    looks = callable(getattr(kind, "step", None)) and callable(getattr(kind, "zero_grad", None))
    return looks or isinstance(value, Optimizer)


Holder = TypeVar("Holder")
Gathered = TypeVar("Gathered")


@dataclass(eq=False)
class OpenStep(Generic[Holder, Gathered]):
    """A call of an optimizer's ``step``.

    ``gathered`` belongs to the outermost one, which those inside share, as ``holders``: the own one
    of each call that has begun, in that order. ``place`` is that of this call among them.
    """

    frame: FrameType
    holder: Holder
    gathered: Gathered
    holders: list[Holder] = field(default_factory=list)
    place: int = 0

    @property
    def is_outermost(self) -> bool:
        """Whether it is no part of another step."""
        return self.place == 0


class OpenSteps(Generic[Holder, Gathered]):
    """The steps that are under way, by thread; a step inside of another one is part of it.

    Only hooks tell of steps, and none does of one that an exception ended: what is under way is
    what still is on the stack of the thread. ``lock`` is held by who measures one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._open: dict[int, list[OpenStep[Holder, Gathered]]] = {}

    def begin(self, holder: Holder, make: type[Gathered]) -> OpenStep[Holder, Gathered]:
        """A hook says that a step begins, directly."""
        steps = self._open.setdefault(threading.get_ident(), [])
        frame = _caller()
        if steps:
            running = set(_frames(frame))
            while steps and steps[-1].frame not in running:
                steps.pop()
        if steps:
            first = steps[0]
            step = OpenStep(frame, holder, first.gathered, first.holders, len(first.holders))
        else:
            step = OpenStep(frame, holder, make())
        step.holders.append(holder)
        steps.append(step)
        return step

    def end(self, holder: Holder) -> OpenStep[Holder, Gathered] | None:
        """A hook says that a step has ended; None if it had not begun."""
        steps = self._open.get(threading.get_ident(), [])
        own = {step.frame: place for place, step in enumerate(steps) if step.holder is holder}
        if not own:
            return None
        frame = next(filter(own.__contains__, _frames(_caller())), None)
        place = max(own.values()) if frame is None else own[frame]
        ended = steps[place]
        del steps[place:]
        return ended

    def forget(self) -> None:
        """No step is under way that matters any more."""
        self._open.clear()


def _caller() -> FrameType:
    """The frame that called the hook that called a method here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_of_hook(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    assert frame is not None
    return frame


def _is_of_hook(module: str) -> bool:
    """Whether a frame of ``module`` is ours, or keeps Dynamo from tracing hooks."""
    return module.partition(".")[0] == "tmm" or module == "torch._dynamo.eval_frame"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
