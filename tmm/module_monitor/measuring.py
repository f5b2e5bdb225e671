"""A model that is instrumented for the metrics of a ``ModuleMonitor``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from tmm.core.dynamo_private import OptimizedModule
from tmm.core.metrics import Aggregate
from tmm.core.module_names import parameter_names
from tmm.core.replacement import Replacement
from tmm.instrumentation.regions import COMPILED_CALL, Region, compiled_wrappers, install, region_of
from tmm.instrumentation.switch import Switch, attach, detach, root_switch, stands
from tmm.module_monitor.mixin import MonitorMixin
from tmm.module_monitor.names import Names
from tmm.module_monitor.registered_metrics import ModuleMonitorSpec
from tmm.runs.instrument import instrument, steps_of
from tmm.spec.rules import Rule

_State = tuple[tuple[int, int, torch.dtype, torch.device], ...]


Note = Callable[[tuple[Any, ...], dict[str, Any]], bool]
"""Takes the arguments of a call; tells whether the call is in a monitored step."""


class ReferenceCalls:
    """Tells of each call of a module, also of a compiled one, until ``stop``.

    ``are_running`` tells whether one is under way.
    """

    def __init__(self, module: torch.nn.Module, note: Note) -> None:
        self.are_running = False
        self._note = note
        self._calls = ExitStack()
        for callee in (module, *compiled_wrappers(module)):
            self._watch(callee)

    def _watch(self, module: torch.nn.Module) -> None:
        region = region_of(module) or Region(module, None, module)
        holder, note = region.holder, self._note
        assert holder is not None
        call = Replacement(holder, region.attribute)
        original = call.current(None)
        plain = holder._call_impl if original is None else original

        logs = any(isinstance(part, MonitorMixin) for part in module.modules())
        uncompiled = torch.compiler.disable(plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.are_running or not (note(args, kwargs) and logs):
                return plain(*args, **kwargs)
            self.are_running = True
            try:
                # Compiled modules of a reference log nothing, whether they or what calls them are.
                with torch.compiler.set_stance("force_eager"):
                    return uncompiled(*args, **kwargs)
            finally:
                self.are_running = False

        install(region, forward)
        self._calls.enter_context(call)

    def stop(self) -> None:
        """Leave the module as it was."""
        self._calls.close()


class Measuring:
    """Measures one model, and compares it with one reference, by a fixed set of rules.

    ``steps`` are those of the instrumented model. ``has_run_forward`` tells whether a forward
    pass ran in the last step.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        reference: torch.nn.Module | None,
        rules: list[Rule],
        names: Names,
        logger: logging.Logger,
        is_monitoring: Callable[[], bool],
    ) -> None:
        self.module = module
        self.reference = reference
        self.has_run_forward = True
        self._logger = logger
        self._is_monitoring = is_monitoring
        self._wrappers = compiled_wrappers(module)
        self._callee, *others = (*self._wrappers, module)
        self._state = _state(reference)
        if any(root_switch(callee) is not None for callee in (module, *self._wrappers)):
            raise ValueError(
                "the module is monitored already, by tmm.instrument or another ModuleMonitor; add"
                " the metrics to that one"
            )
        spec = ModuleMonitorSpec(rules, names, reference, _other_dtype(module, reference))
        instrument(self._callee, spec)
        self._switch = _switch_of(self._callee)
        self._attach(others)
        self.steps = steps_of(self._callee)
        self.steps.archive.keeps_history = False
        self.steps.recorder.keeps_evaluations_apart = False  # as torch-module-monitor does
        self.steps.hint = (
            "Call the module that was given to set_module, or what torch.compile made of it, not"
            " its parts; inside of a function or module that is compiled itself it is not measured."
        )
        self._reference_calls: ReferenceCalls | None = None
        if reference is not None:
            self._reference_calls = ReferenceCalls(reference, self._note_reference)

    def _attach(self, others: list[torch.nn.Module]) -> None:
        """Measure calls of these, too: of the module itself, and of further wrappers of it."""
        root = self._switch
        for other in others:
            if other.__dict__.get(COMPILED_CALL) is None or isinstance(other, OptimizedModule):
                region = region_of(other) or Region(other, root.region.settings, other)
                attach(
                    Switch.of(
                        *(region, root.steps),
                        twin=root.twin,
                        owner=root.owner,
                        siblings=root.siblings,
                        is_root=False,
                    )
                )

    @property
    def runs_forward(self) -> bool:
        """Whether a forward pass, of the model or of the reference, is under way."""
        calls = self._reference_calls
        return self._switch.twin.is_running() or (calls is not None and calls.are_running)

    def is_current(self) -> bool:
        """Whether model and reference are as they were: not compiled, moved or loaded anew."""
        if not all(map(stands, self._switch.siblings)) or _state(self.reference) != self._state:
            return False
        return self.has_run_forward or compiled_wrappers(self.module) == self._wrappers

    def stop(self) -> None:
        """Leave model and reference as they were."""
        if self._reference_calls is not None:
            self._reference_calls.stop()
        for switch in self._switch.siblings:
            detach(switch)
        self.steps.close()

    def add_gradients(self, family: str) -> None:
        """Measure the gradients, as they are now, as ``family``."""
        gradients: dict[str, torch.Tensor] = {}
        for parameter, name in self._names_of_parameters(self.module).items():
            if parameter.grad is None:
                self._logger.warning("the gradient of the parameter %s is None", name)
            else:
                gradients[name] = parameter.grad
        self._measure(family, gradients, rules="gradient")

    def add_parameters(self) -> None:
        """Measure the parameters, and their differences from the reference's, as they are now."""
        own = {name: p for p, name in self._names_of_parameters(self.module).items()}
        self._measure("parameter", own)
        if self.reference is None:
            return
        others = {name: p for p, name in self._names_of_parameters(self.reference).items()}
        for name in own.keys() - others.keys():
            self._logger.warning("the parameter %s is not in the reference module", name)
        common = {name: parameter for name, parameter in own.items() if name in others}
        self._measure("parameter_difference", common, reference=_beside(others, common))

    def _measure(
        self,
        family: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        rules: str | None = None,
        reference: dict[str, torch.Tensor] | None = None,
    ) -> None:
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        collector = self.steps.timeline.require(family)
        self.steps.optimizers.parameters.add(
            collector, family, detached, rules=rules, reference=reference
        )

    def show_value(self, key: str, tensor: torch.Tensor, aggregate: Aggregate | None) -> None:
        """Record a tensor outside of the model's forward pass, joined with what is inside."""
        twin = self.steps.twin
        twin.eager_rows.declare(key, type(tensor), aggregate, any_family=True)
        twin.eager_rows.record(key, tensor)

    def remarks(self) -> Iterator[str]:
        """What a user should know of the reference's inputs."""
        comparing = self.steps.twin.comparing
        if comparing is not None:
            yield from comparing.inputs.remarks()
            if comparing.inputs.are_waiting:
                yield (
                    "the reference module ran after the monitored module, which was compared with"
                    " it on its own inputs; whether they were the same is not known: run the"
                    " reference module first, or not at all"
                )

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """What was asked for and has no rows so far, with the reason."""
        return self.steps.twin.attribution.unmeasured

    @staticmethod
    def _names_of_parameters(module: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for parameter, (name, _) in parameter_names(module).items()}

    def _note_reference(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        is_monitoring = self._is_monitoring()
        if is_monitoring:
            comparing = self.steps.twin.comparing
            assert comparing is not None
            comparing.inputs.give(arguments, keywords)
        return is_monitoring


def _switch_of(model: torch.nn.Module) -> Switch:
    switch = root_switch(model)
    assert switch is not None
    return switch


def _state(module: torch.nn.Module | None) -> _State:
    tensors = () if module is None else (*module.parameters(), *module.buffers())
    return tuple((id(t), t.data_ptr(), t.dtype, t.device) for t in tensors)


def _other_dtype(module: torch.nn.Module, reference: torch.nn.Module | None) -> torch.dtype | None:
    """The dtype of a reference that has another one than the model."""
    if reference is None:
        return None
    own = {parameter.dtype for parameter in module.parameters()}
    others = [p.dtype for p in reference.parameters() if p.is_floating_point()]
    return next((dtype for dtype in others if dtype not in own), None)


def _beside(
    others: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The counterparts of ``own``, on the same devices."""
    return {name: others[name].detach().to(tensor.device) for name, tensor in own.items()}
