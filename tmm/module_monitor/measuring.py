"""A model that is instrumented for the metrics of a ``ModuleMonitor``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tmm.instrument import instrument, remove
from tmm.instrument import monitor as monitor_of
from tmm.module_monitor.names import Names
from tmm.module_monitor.reference_calls import ReferenceCalls
from tmm.module_monitor.rules import ModuleMonitorSpec
from tmm.naming import parameter_names
from tmm.rules import Rule
from tmm.twin.regions import compiled_wrapper

_State = tuple[tuple[int, int, torch.dtype, torch.device], ...]


class Measuring:
    """Measures one model, and compares it with one reference, by a fixed set of rules.

    ``core`` is the monitor of the instrumented model. ``has_run_forward`` tells whether a forward
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
        self._callee = compiled_wrapper(module)
        self._state = _state(reference)
        spec = ModuleMonitorSpec(rules, names, reference, _other_dtype(module, reference))
        instrument(self._callee, spec)
        self.core = monitor_of(self._callee)
        self.core.keeps_history = False
        self._reference_calls = None
        if reference is not None:
            self._reference_calls = ReferenceCalls(reference, self._note_reference)

    def is_current(self) -> bool:
        """Whether model and reference are as they were: not compiled, moved or loaded anew."""
        is_called = self.has_run_forward or compiled_wrapper(self.module) is self._callee
        return is_called and _state(self.reference) == self._state

    def stop(self) -> None:
        """Leave model and reference as they were."""
        if self._reference_calls is not None:
            self._reference_calls.stop()
        remove(self._callee)

    def add_gradients(self, family: str) -> None:
        """Measure the gradients, as they are now, as ``family``."""
        gradients: dict[str, torch.Tensor] = {}
        for parameter, name in self._names_of_parameters(self.module).items():
            if parameter.grad is None:
                self._logger.warning("the gradient of the parameter %s is None", name)
            else:
                gradients[name] = parameter.grad
        self.core.measure(family, gradients, rules="gradient")

    def add_parameters(self) -> None:
        """Measure the parameters, and their differences from the reference's, as they are now."""
        own = {name: p for p, name in self._names_of_parameters(self.module).items()}
        self.core.measure("parameter", own)
        if self.reference is None:
            return
        others = {name: p for p, name in self._names_of_parameters(self.reference).items()}
        for name in own.keys() - others.keys():
            self._logger.warning("the parameter %s is not in the reference module", name)
        common = {name: parameter for name, parameter in own.items() if name in others}
        self.core.measure("parameter_difference", common, reference=_beside(others, common))

    @staticmethod
    def _names_of_parameters(module: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for parameter, (name, _) in parameter_names(module).items()}

    def _note_reference(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._is_monitoring():
            self.core.give_reference_inputs(*arguments, **keywords)


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
