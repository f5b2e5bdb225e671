"""The choice, call by call, between the user's own program and the measured one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch

from tmm.core.autograd import is_in_autograd_function
from tmm.core.dynamo_private import OptimizedModule
from tmm.core.torch_private import current_graph_task_id
from tmm.instrumentation.compile_settings import room_for_two
from tmm.instrumentation.foreign import foreign_pass, transform
from tmm.instrumentation.regions import COMPILED_CALL, Region, install
from tmm.instrumentation.twin import Twin, running_twin

_MARK = "tmm_run_ended"
"""Attribute of a call that was put back when a run ended."""


class Shared(Protocol):
    """The measured program, where passes of the training that are not monitored run it, too."""

    @property
    def is_used(self) -> bool:
        """Whether they may."""

    def is_that_of(self, twin: Twin) -> bool:
        """Whether they do, now that the graphs of ``twin`` tell what it costs."""

    def run(
        self, twin: Twin, region: Region, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run one of them."""


class Steps(Protocol):
    """The steps of a model, as far as the choice depends on them.

    ``recording`` tells that a monitored step is open, ``is_unused`` that none was opened so far.
    """

    recording: bool
    is_unused: bool

    @property
    def shared(self) -> Shared:
        """What runs passes of the training that are not monitored."""

    def is_monitoring(self) -> bool:
        """Whether a forward pass would be measured now."""

    def is_elsewhere(self) -> bool:
        """Whether another thread has the open step."""

    @property
    def is_expected(self) -> bool:
        """Whether a forward pass that begins now is one of the program, not of its machinery."""

    def no_monitor(self) -> AbstractContextManager[None]:
        """Forward passes in the block run the user's own program, unmeasured."""

    def note_unused_pass(self) -> None:
        """A forward pass of the model begins, and no step was opened so far."""

    def pass_by(self, foreign: str) -> None:
        """A pass that is ``foreign`` is not measured."""

    def run_forward(
        self, twin: Twin, region: Region, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a forward pass of a monitored step."""


@dataclass(eq=False)
class Switch:
    """Runs a region: the twin in a monitored step, else the user's own program.

    With one program for all steps, the twin runs wherever gradients are on.

    ``original`` is what stood in its place (None where nothing did); ``plain`` runs it.
    ``siblings`` are all switches of one model, ``is_root`` that of what the user calls, and
    ``owner`` is what monitors it.
    """

    region: Region
    plain: Callable[..., Any]
    original: object
    steps: Steps
    twin: Twin
    owner: object
    siblings: list[Switch]
    is_root: bool
    ran_twin: bool = False

    @staticmethod
    def of(
        region: Region,
        steps: Steps,
        *,
        twin: Twin,
        owner: object,
        siblings: list[Switch],
        is_root: bool,
        plain: Callable[..., Any] | None = None,
    ) -> Switch:
        """The switch of a region, added to its ``siblings``; ``plain`` is that of a function."""
        original: object = plain
        if region.holder is not None:
            plain = original = region.holder.__dict__.get(region.attribute)
            if plain is None:
                plain = region.holder._call_impl
        assert plain is not None
        if region.settings is not None:
            plain = room_for_two(plain)
        twin.own_programs[region] = plain
        switch = Switch(region, plain, original, steps, twin, owner, siblings, is_root)
        siblings.append(switch)
        return switch

    # Called from frames that Dynamo runs: neither the choice nor tmm itself is to be compiled,
    # but what the user's program goes on to call is.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(self) -> Any:
        """The callable that one call is to run, unless no step is monitored nor was just before.

        Before the first step it is asked, too, to notice that nobody opens one.
        """
        if current_graph_task_id() != -1:
            # Activation checkpointing repeats a forward pass inside of the backward pass. It must
            # save what the first one saved, and must not be counted again.
            repeats = self.ran_twin and self.twin.untraced is None and transform() is None
            return self._repeat if repeats else self.plain
        running = running_twin()
        if running is None:
            if self.steps.is_unused and self.region is self.twin.root:
                self.steps.note_unused_pass()
            is_monitored = self.steps.is_monitoring()
            if self.steps.is_elsewhere():
                return self.plain
            if is_monitored and (foreign := foreign_pass()) is not None:
                self.steps.pass_by(foreign)
                return self.plain
            if is_monitored and not self.steps.is_expected:
                return self._run_unmonitored
            # An evaluation, which is not repeated, may come between a pass and its backward pass.
            has_gradients = torch.is_grad_enabled() or is_in_autograd_function()
            is_shared = has_gradients and not is_monitored and self._shares_program()
            if has_gradients:
                self.ran_twin = is_monitored or is_shared
            if is_shared:
                return self._run_unrecorded
            return self._run_on_its_own if is_monitored else self.plain
        self.ran_twin = running is self.twin
        if not self.ran_twin:
            return self.plain  # the forward pass is another model's, which shares the module
        if self.region.settings is None:
            return self.plain
        if self.twin.is_entering(self.region):
            assert self.region.module is not None
            return self.region.module._call_impl
        if (foreign := foreign_pass()) is not None:
            return partial(self._run_unmeasured, foreign)
        return self._run

    def _shares_program(self) -> bool:
        """Whether a pass that is not measured is to run the measured program."""
        shared = self.steps.shared
        return shared.is_used and foreign_pass() is None and shared.is_that_of(self.twin)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.twin.run(self.region, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_unmeasured(self, foreign: str, *args: Any, **kwargs: Any) -> Any:
        with self.twin.set_aside(self.region, foreign):
            return self.plain(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_unmonitored(self, *args: Any, **kwargs: Any) -> Any:
        with self.steps.no_monitor():  # nor the modules that it calls
            return self.plain(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_on_its_own(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.run_forward(self.twin, self.region, self.plain, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_unrecorded(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.shared.run(self.twin, self.region, self.plain, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _repeat(self, *args: Any, **kwargs: Any) -> Any:
        return self.twin.repeat(self.region, *args, **kwargs)


def attach(switch: Switch) -> Callable[..., Any]:
    """Put ``switch`` in the place of its region's program; gives back what stands there now."""
    steps, plain, choose = switch.steps, switch.plain, switch.choose

    def forward(*args: Any, **kwargs: Any) -> Any:
        if steps.recording or switch.ran_twin or steps.is_unused:
            return choose()(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling() and steps.shared.is_used:
            return choose()(*args, **kwargs)
        return plain(*args, **kwargs)

    forward.tmm_switch = switch  # type: ignore[attr-defined]
    install(switch.region, forward)
    return forward


def stands(switch: Switch) -> bool:
    """Whether ``switch`` is still in the place of its region's program."""
    holder, attribute = switch.region.holder, switch.region.attribute
    return holder is None or switch_of(holder.__dict__.get(attribute)) is switch


def is_bypassed(switch: Switch) -> bool:
    """Whether ``module.compile()`` has put another program in the place of ``switch`` since."""
    holder, attribute = switch.region.holder, switch.region.attribute
    if holder is None or attribute != COMPILED_CALL or stands(switch):
        return False
    return holder.__dict__.get(attribute) is not None


def detach(switch: Switch, *, is_mark_left: bool = False) -> None:
    """Put back what stood in the place of ``switch``, unless something else took it since.

    With ``is_mark_left``, ``bears_mark`` tells of the model later; nothing else notices it.
    """
    holder, attribute = switch.region.holder, switch.region.attribute
    if holder is None or not stands(switch):
        return
    original = switch.original
    if original is not None:
        holder.__dict__[attribute] = original
        if isinstance(original, FunctionType):
            vars(original)[_MARK] = is_mark_left
    elif is_mark_left and attribute == COMPILED_CALL:
        holder.__dict__[attribute] = None  # as torch has it by default
    else:
        del holder.__dict__[attribute]


def bears_mark(model: object) -> bool:
    """Whether a model was instrumented until its run ended."""
    calls = _calls_of(model, absent=False) if isinstance(model, torch.nn.Module) else []
    return any(call is None or getattr(call, _MARK, False) for call in calls)


def switch_of(call: object) -> Switch | None:
    """The switch that a callable is, if it is one."""
    switch = getattr(call, "tmm_switch", None)
    return switch if isinstance(switch, Switch) else None


def root_switch(model: object) -> Switch | None:
    """The switch by which ``model``, a module or function, is instrumented."""
    for call in _calls_of(model):
        switch = switch_of(call)
        while switch is not None:
            if switch.is_root:
                return switch
            switch = switch_of(switch.original)
    return None


def _calls_of(model: object, absent: object = None) -> list[object]:
    """What may stand where a switch of ``model`` does; ``absent`` where nothing does."""
    if isinstance(model, OptimizedModule):
        inner = model._orig_mod.__dict__.get(COMPILED_CALL, absent)
        return [model.__dict__.get("forward", absent), inner]
    if isinstance(model, torch.nn.Module):
        return [model.__dict__.get(COMPILED_CALL, absent)]
    return [model]
