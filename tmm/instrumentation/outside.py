"""Modules that are called past the model's own forward, such as a head by the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tmm.core.dynamo_private import skip_code
from tmm.core.families import ACTIVATION_DIFFERENCE, families_of_outputs
from tmm.core.module_names import display_name
from tmm.core.torch_private import current_graph_task_id
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.eager_rows import EagerRows
from tmm.instrumentation.foreign import foreign_pass
from tmm.instrumentation.gradient_hooks import GradientHooks
from tmm.instrumentation.recorder import Recorder
from tmm.instrumentation.regions import COMPILED_CALL, Region
from tmm.passes.metrics.gradient_rows import FAMILY as GRADIENT


class OutsideCalls:
    """Measures the outputs of modules that are called while no forward pass of the model runs.

    What shows them stands in an attribute that copies and pickles do not carry, while a step is
    open and at no other time. ``is_running`` tells whether a forward pass of any model is under
    way, ``compares`` whether there is a reference; ``note`` is told of each module that was called.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        attribution: Attribution,
        recorder: Recorder,
        rows: EagerRows,
        gradients: GradientHooks,
        *,
        is_running: Callable[[], bool],
        compares: Callable[[], bool],
        note: Callable[[torch.nn.Module], None],
    ) -> None:
        self._regions = regions
        self._attribution = attribution
        self._recorder = recorder
        self._rows = rows
        self._gradients = gradients
        self._is_running = is_running
        self._compares = compares
        self._note = note
        self._asked_for: tuple[object, tuple[torch.nn.Module, ...]] = (None, ())
        self._calls: dict[torch.nn.Module, Callable[..., Any]] = {}
        self._standing: list[tuple[dict[str, Any], Callable[..., Any]]] = []

    def begin(self) -> None:
        """Measure modules that are called by themselves from now on, too."""
        self.end()
        calls, standing = self._calls, self._standing
        for module in self._modules():
            attributes = module.__dict__
            if attributes.get(COMPILED_CALL) is not None:
                continue
            # The same one in each step: a program that the user compiled may have a guard on it.
            call = calls.get(module)
            if call is None:
                call = calls[module] = _shown(module, self._shows, self._show)
            attributes[COMPILED_CALL] = call
            standing.append((attributes, call))

    def end(self) -> None:
        """Leave the modules as they were, but for what was compiled since."""
        for attributes, call in self._standing:
            if attributes.get(COMPILED_CALL) is call:
                del attributes[COMPILED_CALL]
        self._standing.clear()

    def asks_for(self, name: str) -> bool:
        """Whether a rule asks for the output of the module of that name, or for its gradient."""
        plan, dtypes = self._attribution.plan, (torch.float32, torch.complex64)
        families = *families_of_outputs(), GRADIENT
        return any(plan.select(name, dtype, f) for dtype in dtypes for f in families)

    def _modules(self) -> tuple[torch.nn.Module, ...]:
        """Those that are asked for, and may be called by themselves."""
        names = self._attribution.names
        if self._asked_for[0] is not names:
            # What torch.compile wraps is another object than its wrapper, and callable by itself.
            own = {r.callee if r.holder is None else r.holder for r in self._regions}
            asked_for = (m for m, name in names.items() if self.asks_for(display_name(name)))
            self._asked_for = names, tuple(m for m in asked_for if m not in own)
        modules = self._asked_for[1]
        if not any(module._forward_hooks for module in modules):
            return modules
        # A program that the user compiled has guards on its modules with hooks of the user.
        guarded = {
            module
            for region in self._regions
            if region.settings is not None and not region.settings.traced_for
            for module in _modules_in(region, self._attribution.root)
            if module._forward_hooks
        }
        return tuple(module for module in modules if module not in guarded)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shows(self) -> bool:
        return (
            not self._is_running()
            and self._recorder.is_monitoring()
            and current_graph_task_id() == -1  # no repetition for a backward pass
            and foreign_pass() is None
            and not self._recorder.is_elsewhere()
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _show(self, module: torch.nn.Module, output: object) -> None:
        plan = self._attribution.plan
        self._note(module)
        with self._recorder.outside_pass(module, output):
            self._rows.measure(module, output)
            if plan.spec.measures(GRADIENT):
                self._gradients.probe(module, output)
        name = self._attribution.name(module)
        if self._compares() and plan.select(name, torch.float32, ACTIVATION_DIFFERENCE.name):
            self._attribution.unmeasured[f"{name} against the reference"] = (
                "it is called past the model's own forward, which the reference repeats"
            )


def _modules_in(region: Region, root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that the program of a region may call; of a function, any of the model."""
    callee: object = region.callee
    return (callee if isinstance(callee, torch.nn.Module) else root).modules()


def _shown(
    module: torch.nn.Module,
    shows: Callable[[], bool],
    show: Callable[[torch.nn.Module, object], None],
) -> Callable[..., Any]:
    inner: Callable[..., Any] = module._call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if shows():
            show(module, output)
        return output

    skip_code(forward.__code__)
    # A program of the user that calls the module is traced as it would be without us.
    forward.__dict__.update(_torchdynamo_inline=inner, _torchdynamo_orig_callable=inner)
    return forward
