"""The monitor of torch-module-monitor: metrics are added one by one, tmm measures them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from tmm.core.failures import warn
from tmm.core.families import RCC
from tmm.core.keys import parts_of
from tmm.core.module_names import unwrapped
from tmm.instrumentation.show import (
    is_shown,
    is_traced,
    show_activation,
    show_attention,
    show_value,
)
from tmm.instrumentation.twin import running_twin
from tmm.module_monitor.measuring import Measuring
from tmm.module_monitor.mixin import MonitorMixin
from tmm.module_monitor.names import FormatName, Names, default_format_module_name_fn
from tmm.module_monitor.registered_metrics import (
    Aggregation,
    RegisteredMetrics,
    compiled,
    rule_of_coordinate_check,
)
from tmm.module_monitor.storage import StorageManager
from tmm.spec.likeness import differences, modes
from tmm.spec.rules import Rule
from tmm.steps.model_steps import ModelSteps


def _every_twentieth(step: int) -> bool:
    return step % 20 == 0


class ModuleMonitor(RegisteredMetrics):
    """Measures activations, parameters and gradients of a module, metric by metric.

    The interface is that of torch-module-monitor; ``tmm.instrument`` does the work, so that the
    module may be compiled. Keys are ``activation/{module}/{metric}``,
    ``parameter/{parameter}/{metric}``, ``gradient/{parameter}/{metric}`` and, where there is a
    reference, ``activation_difference/...`` and ``parameter_difference/...``.

    Args:
        monitor_step_fn: whether a step is monitored; every 20th by default.
        format_module_name_fn: from a name of ``named_modules()`` to that in keys. Modules of one
            name are joined.
        excluded_modules_regex: modules whose formatted name it matches (``re.match``) have no
            activations measured.
        logger: gets warnings and what is said about each step; silent by default.
        cpu_offload: no effect, because no activations are kept.

    Attributes:
        module: the module that is monitored, and ``reference_module`` what it is compared with.
        module_names: the formatted name of each module; ``reference_module_names`` those there.
        current_step: the step that began last.
        storage: what was logged, by step; complete once the step has ended.

    Raises:
        TypeError: if ``monitor_step_fn`` or ``format_module_name_fn`` cannot be called.
        ValueError: if ``excluded_modules_regex`` is no regular expression.
    """

    def __init__(
        self,
        monitor_step_fn: Callable[[int], bool] = _every_twentieth,
        format_module_name_fn: FormatName = default_format_module_name_fn,
        excluded_modules_regex: str = r"$.^",
        logger: logging.Logger | None = None,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__()
        for name, function in (
            ("monitor_step_fn", monitor_step_fn),
            ("format_module_name_fn", format_module_name_fn),
        ):
            if not callable(function):
                raise TypeError(f"{name}={function!r} is not a function")
        self.monitor_step_fn = monitor_step_fn
        self.format_module_name_fn = format_module_name_fn
        self.excluded_modules_compiled_re = compiled(
            "excluded_modules_regex", excluded_modules_regex
        )
        if logger is None:
            logger = logging.getLogger("ModuleMonitor")
            if not logger.handlers:
                logger.addHandler(logging.NullHandler())
        self.logger = logger
        self.cpu_offload = cpu_offload
        self.module: torch.nn.Module | None = None
        self.module_names: dict[torch.nn.Module, str] = {}
        self.reference_module: torch.nn.Module | None = None
        self.reference_module_names: dict[torch.nn.Module, str] = {}
        self.current_step: int | None = None
        self._storage = StorageManager(self.logger)
        self._measuring: Measuring | None = None
        self._is_stale = False
        self._checks_coordinates = False
        self._has_checked_coordinates = False
        self._is_paused = False
        self._ended: int | None = None
        self._said: set[str] = set()

    def __deepcopy__(self, memo: object) -> None:
        """Copies of a module that knows its monitor know none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    # Modules

    def set_module(self, module: torch.nn.Module) -> None:
        """Monitor ``module``, compiled or not.

        It is instrumented when the first monitored step begins, and may be compiled until then.

        Raises:
            ValueError: without a module, or if there is one already.
        """
        if module is None:
            raise ValueError("Module cannot be None.")
        if self.module is not None:
            raise ValueError("Module has already been set!")
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module={module!r} is not a torch.nn.Module")
        self.module = module
        self.module_names = Names(module, self.format_module_name_fn).modules
        self._introduce(self.module_names, is_reference=False)

    def set_reference_module(self, module: torch.nn.Module | None) -> None:
        """Compare with ``module``, as it is at each step; None removes the reference.

        Its forward pass is computed beside the model's, from the same inputs. One that the user
        runs before the model's is not needed; if it was given other inputs, those are compared.

        Raises:
            ValueError: if no module is set, or it has other modules than that.
        """
        if self.module is None:
            raise ValueError("Please set the monitored module before setting the reference module.")
        self.remove_reference_module()
        if module is None:
            return
        names = Names(module, self.format_module_name_fn).modules
        if set(names.values()) != set(self.module_names.values()):
            differing = sorted(set(names.values()) ^ set(self.module_names.values()))
            raise ValueError(
                "The reference module must have the same structure as the monitored module (there"
                f" are modules with different names): {', '.join(map(repr, differing[:5]))}"
            )
        if found := list(differences(unwrapped(self.module), unwrapped(module))):
            self._warn_once(
                "the reference module is computed by the monitored module's code, with its own"
                f" parameters and buffers, but differs otherwise: {'; '.join(found[:5])}"
            )
        self.reference_module, self.reference_module_names = module, names
        self._introduce(names, is_reference=True)
        self._metrics_changed()

    def has_reference_module(self) -> bool:
        """Whether there is a reference."""
        return self.reference_module is not None

    def remove_reference_module(self) -> None:
        """Compare with nothing from now on."""
        if self.reference_module is None:
            return
        for module in self.reference_module.modules():
            if isinstance(module, MonitorMixin):
                module.set_module_monitor(None, False)
        self.reference_module, self.reference_module_names = None, {}
        self._metrics_changed()

    def check_coordinates(self) -> None:
        """Measure the refined coordinate check from now on; for ``RefinedCoordinateCheck``."""
        if not self._checks_coordinates:
            self._checks_coordinates = True
            self._metrics_changed()

    def _introduce(self, names: Mapping[torch.nn.Module, str], *, is_reference: bool) -> None:
        for module, name in names.items():
            is_excluded = self.excluded_modules_compiled_re.match(name) is not None
            if isinstance(module, MonitorMixin) and not is_excluded:
                module.set_module_monitor(self, is_reference)

    def _metrics_changed(self) -> None:
        """Measure by other rules from now on, or from the next step if this one has begun."""
        self._is_stale = True
        measuring = self._measuring
        if measuring is not None and self._is_open and not measuring.steps.timeline.has_content:
            assert self.current_step is not None
            self._prepared().steps.begin_step(self.current_step)

    def _prepared(self) -> Measuring:
        """The model, instrumented for the metrics as they are now."""
        module, measuring = self.module, self._measuring
        if module is None:
            raise ValueError("No module to monitor. Please set the module first.")
        if measuring is not None and not self._is_stale and measuring.is_current():
            return measuring
        if measuring is not None:
            self._measuring = None
            measuring.stop()
        names = Names(module, self.format_module_name_fn)
        self._measuring = Measuring(
            *(module, self.reference_module, self._rules(names), names),
            *(self.logger, self.is_monitoring),
        )
        self._is_stale = False
        return self._measuring

    def _rules(self, names: Names) -> list[Rule]:
        compares, excluded = self.has_reference_module(), self.excluded_modules_compiled_re
        rules = self._rules_of_metrics(names, excluded, compares=compares)
        if compares and self._checks_coordinates:
            rules.append(rule_of_coordinate_check(names, excluded))
        return rules

    # Steps

    def is_step_monitored(self, step: int) -> bool:
        """Whether ``step`` is monitored."""
        return bool(self.monitor_step_fn(step))

    def is_monitoring(self) -> bool:
        """Whether what happens now is measured."""
        if is_traced():
            return is_shown()
        return self._is_open and not self._is_paused

    def begin_step(self, step: int) -> bool:
        """Begin ``step`` and tell whether it is monitored; a step that was not ended is ended.

        Raises:
            ValueError: if ``step`` lies before the current one, there is no module, or the
                reference does not fit it.
        """
        if self.current_step is not None and step < self.current_step:
            raise ValueError(
                f"Step {step} cannot be smaller than the current step {self.current_step}."
            )
        self.end_step()
        self._read()
        self.current_step = step
        if not self.is_step_monitored(step):
            return False
        self._prepared().steps.begin_step(step)
        self._compare_modes()
        self._storage.create_step_entry(step)
        self._has_checked_coordinates = False
        return True

    @contextmanager
    def no_monitor(self) -> Iterator[None]:
        """Measure nothing in the block, such as an evaluation."""
        paused, self._is_paused = self._is_paused, True
        measuring = self._measuring
        try:
            with nullcontext() if measuring is None else measuring.steps.recorder.no_monitor():
                yield
        finally:
            self._is_paused = paused

    def after_micro_batch(self) -> None:
        """Mark the end of a micro-batch; all of a step are joined."""
        if self._is_open:
            self._say_remarks()
            self._steps.after_micro_batch()

    def end_step(self) -> None:
        """End the step: what it measured is joined, and is complete in ``storage``.

        Raises:
            ValueError: for an aggregation function that fails.
        """
        if not self._is_open:
            return
        assert self._measuring is not None
        self._measuring.has_run_forward = self._has_run_forward
        self._say_remarks()
        self._is_paused = False
        self._steps.end_step()
        self._ended = self.current_step
        for name, reason in self._measuring.unmeasured.items():
            self._log_once(f"{name} is not measured: {reason}")

    def get_step_metrics(self) -> dict[str, Any]:
        """Key to value of the current step; complete once it has ended."""
        return {} if self.current_step is None else self.storage.get_step_metrics(self.current_step)

    def get_all_metrics(self) -> dict[int, dict[str, Any]]:
        """Step to key to value."""
        return self.storage.get_all_metrics()

    @property
    def storage(self) -> StorageManager:
        """What was logged. Waits for an accelerator that is busy with a step that has ended."""
        self._read()
        return self._storage

    def _read(self) -> None:
        """Move what the step that ended last measured to the storage."""
        step, self._ended = self._ended, None
        if step is None:
            return
        latest = self._steps.archive.latest
        measured = {} if latest is None else latest.record().by_key()
        if not self._has_checked_coordinates:
            measured = {k: v for k, v in measured.items() if not RCC.begins(parts_of(k)[0])}
        entry = self._storage.log_dict.setdefault(step, {})
        if clash := entry.keys() & measured.keys():
            raise ValueError(
                f"{min(clash)!r} was logged as a number, and as a tensor or in a forward pass, in"
                f" step {step}; log one of them under another name"
            )
        entry.update(measured)
        self._storage.aggregate_step(step)

    # Values

    def log_scalar(
        self,
        key: str,
        value: float | torch.Tensor,
        aggregation_fn: Callable[[Any], object] | None = None,
        force: bool = False,
    ) -> None:
        """Log a number; several of one step are joined, by their mean or ``aggregation_fn``.

        Nothing happens outside of monitored steps, unless with ``force``.

        Raises:
            ValueError: if ``value`` is not one number.
            RuntimeError: for ``force`` before the first step.
        """
        if is_traced() or (self._measuring and self._measuring.runs_forward):
            # Joined with what compiled modules log.
            dtype = None if isinstance(value, torch.Tensor) else torch.float64
            self.log_tensor(key, torch.as_tensor(value, dtype=dtype), aggregation_fn)
            return
        if not self.is_monitoring() and not force:
            return
        if self.current_step is None:
            raise RuntimeError(f"log_scalar({key!r}): no step has begun; call begin_step first")
        self.storage.log_scalar(self.current_step, key, value, aggregation_fn)

    def log_scalars(
        self, monitor_dict: Mapping[str, float | torch.Tensor], force: bool = False
    ) -> None:
        """``log_scalar`` for each item."""
        for key, value in monitor_dict.items():
            self.log_scalar(key, value, force=force)

    def log_tensor(
        self, key: str, tensor: torch.Tensor, aggregation_fn: Aggregation | None = None
    ) -> None:
        """Log the elements of a tensor; all of a step are joined. Also in compiled modules.

        ``aggregation_fn`` as in ``add_activation_metric``. Nothing happens outside of monitored
        steps.
        """
        if is_traced() or running_twin() is not None:
            show_value(key, tensor, aggregation_fn, any_family=True)
        elif self.is_monitoring():
            assert self._measuring is not None
            self._measuring.show_value(key, tensor, aggregation_fn)

    # Measurements

    def monitor_activations(
        self,
        module: str | torch.nn.Module,
        activations: torch.Tensor,
        is_reference: bool = False,
    ) -> None:
        """Measure a tensor as if it were an output of ``module``, a module or a name.

        Works in compiled modules, too. What is shown in the reference's own forward pass is not
        needed: differences are measured where the monitored module shows it.

        Raises:
            ValueError: for a module that is not part of the one that is monitored.
        """
        if not is_reference and isinstance(activations, torch.Tensor):
            self.show(module, "", activations)

    def show(self, module: str | torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
        """``monitor_activations`` of what has the name of ``module`` and ``path``."""
        if is_traced() or running_twin() is not None:
            show_activation(module, path, tensor)
        elif self._shows(module):
            self._steps.twin.show(module, path, tensor)

    def show_attention(
        self,
        module: str | torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        """Measure the entropies of an attention; see ``monitor_scaled_dot_product_attention``."""
        if is_traced() or running_twin() is not None:
            show_attention(module, query, key, mask, is_causal=is_causal, scale=scale)
        elif self._shows(module):
            self._steps.twin.eager_rows.show_attention(module, query, key, mask, is_causal, scale)

    def _shows(self, module: str | torch.nn.Module) -> bool:
        """Whether what is shown outside of the model's forward passes is measured."""
        if not self.is_monitoring() or module in self.reference_module_names:
            return False
        if not isinstance(module, str) and module not in self.module_names:
            raise ValueError(f"module={type(module).__name__}(...) is no part of the module")
        return True

    def monitor_gradients(self, before_clip: bool = False) -> None:
        """Measure the gradients as they are now, between ``backward()`` and the optimizer's step.

        With ``before_clip`` the keys begin with ``gradient_before_clip/``.
        """
        if self.is_monitoring():
            assert self._measuring is not None
            self._measuring.add_gradients("gradient_before_clip" if before_clip else "gradient")

    def monitor_parameters(self) -> None:
        """Measure the parameters as they are now, and their differences from the reference's."""
        if self.is_monitoring():
            assert self._measuring is not None
            self._measuring.add_parameters()

    def use_coordinate_check(self) -> None:
        """Keep the refined coordinate check of this step; for ``RefinedCoordinateCheck``.

        Raises:
            ValueError: if no forward pass has run.
        """
        if self.is_monitoring():
            if not self._has_run_forward:
                raise ValueError(
                    "No inputs found for the monitored module. Perform a forward pass before"
                    " calling refined_coordinate_check."
                )
            self._has_checked_coordinates = True

    def _compare_modes(self) -> None:
        if self.module is None or self.reference_module is None:
            return
        if found := list(modes(unwrapped(self.module), unwrapped(self.reference_module))):
            self._warn_once(
                "the reference module is compared in the mode of the monitored module, with its"
                f" masks of dropouts; its own mode is another one: {', '.join(found[:5])}"
            )

    @property
    def _steps(self) -> ModelSteps:
        assert self._measuring is not None
        return self._measuring.steps

    @property
    def _is_open(self) -> bool:
        """Whether a step is open; of those that are not monitored none is."""
        return self._measuring is not None and self._measuring.steps.timeline.is_open

    @property
    def _has_run_forward(self) -> bool:
        collector = self._steps.timeline.open
        return collector is not None and collector.ran_forward

    def _say_remarks(self) -> None:
        assert self._measuring is not None
        for remark in self._measuring.remarks():
            self._warn_once(remark)

    def _warn_once(self, text: str) -> None:
        if self._log_once(text):
            warn(text)

    def _log_once(self, text: str) -> bool:
        is_new = text not in self._said
        if is_new:
            self._said.add(text)
            self.logger.warning("%s", text)
        return is_new
