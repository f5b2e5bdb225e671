"""Warnings of what a rule asks for and has no rows; ``tmm.explain`` has the reasons as well."""

from __future__ import annotations

from collections.abc import Callable

from tmm.core.failures import Gaps
from tmm.core.families import ATTENTION
from tmm.instrumentation.micro_batches import MicroBatches
from tmm.instrumentation.twin import Twin
from tmm.runtime.step_collector import StepCollector
from tmm.steps.forgotten import Forgotten
from tmm.steps.silent import HadGradient, silent_modules, warning_of

_NO_ROWS = (
    "the instrumented function ran in the monitored step {step} and called no module that a rule of"
    " activation matches, so that none has rows: give the module that the function calls as module="
)
_BYPASSED = (
    "module.compile() has replaced the call of an instrumented module, so that its output has no"
    " rows: call it before tmm.instrument, not after it"
)
_SPLIT = (
    "the schedule runs backward passes in two parts, for gradients of inputs and of parameters, and"
    " graphs give rows of gradients of activations in neither: stages after the first have none."
    " Without tmm.attention nothing is traced, and they have"
)
_SHOWN = 3  # names in a warning


class Notices:
    """Tells, at the end of a step, what was asked for and has no rows, and what to do.

    ``is_bypassed`` tells whether calls of the model no longer come to ``twin``; ``micro_batches``
    are those of a pipeline.
    """

    def __init__(
        self,
        twin: Twin,
        gaps: Gaps,
        forgotten: Forgotten,
        had_gradient: HadGradient,
        is_bypassed: Callable[[], bool],
        micro_batches: MicroBatches | None,
    ) -> None:
        self._micro_batches = micro_batches
        self._twin = twin
        self._gaps = gaps
        self._forgotten = forgotten
        self._had_gradient = had_gradient
        self._is_bypassed = is_bypassed
        self._said: dict[str, None] = {}
        self._known = -1

    def before(self, finished: StepCollector, hint: str) -> None:
        """Look at a step that is about to be kept; ``hint`` tells what to call."""
        asks = self._twin.plan.spec.measures("activation_gradient")
        batches = self._micro_batches
        if asks and batches is not None and batches.has_split and self._twin.has_probes:
            self._twin.attribution.unmeasured["gradients of activations in graphs"] = _SPLIT
            self._gaps.warn_once("split", finished.step, _SPLIT)
        elif finished.ran_forward and asks and not finished.has_activation_gradients:
            self._forgotten.note_no_backward(finished.step)
        if finished.expects_forward and not finished.ran_forward:
            self._gaps.warn_of_missed_forward(finished.step, hint)
        elif finished.monitored and self._is_bypassed():
            self._gaps.warn_once("bypassed", finished.step, _BYPASSED)

    def after(self, finished: StepCollector, *, is_first: bool) -> None:
        """Look at a step that was kept; at more, if it ``is_first``."""
        if not finished.ran_forward:
            return
        if is_first:
            self._tell(finished.step, warning_of(silent_modules(self._twin, self._had_gradient)))
            self._look_for_rows(finished)
        self._tell(finished.step, self._news())

    def _look_for_rows(self, finished: StepCollector) -> None:
        """Say that a step function has run and nothing of its ``module=`` was measured."""
        spec, attribution = self._twin.plan.spec, self._twin.attribution
        is_asked = spec.is_strict and spec.measures("activation")
        seen = any(map(attribution.how_measured, attribution.names))
        is_known = seen or finished.holds_rows or bool(attribution.unmeasured)
        if self._twin.root.module is None and is_asked and not is_known:
            self._gaps.warn_once("module", finished.step, _NO_ROWS.format(step=finished.step))

    def _tell(self, step: int, text: str | None) -> None:
        if text is not None:
            self._gaps.tell(step, text)

    def _news(self) -> str | None:
        """What had the key of something else, and attentions, since the last call."""
        twin = self._twin
        refused, lost = twin.recorder.registry.owners.refused, twin.attribution.lost_attention
        if len(refused) + len(lost) == self._known:
            return None
        is_first, self._known = self._known < 0, len(refused) + len(lost)
        found = {**refused, **lost}
        if is_first and not lost and twin.plan.spec.measures(ATTENTION.name):
            found |= _attention_nowhere(twin)
        new = {name: reason for name, reason in found.items() if name not in self._said}
        self._said |= dict.fromkeys(new)
        if not new:
            return None
        listed = "; ".join(f"{name}: {new[name]}" for name in list(new)[:_SHOWN])
        more = f"; and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        return f"not measured: {listed}{more} (tmm.explain(model).unmeasured has all of them)"


def _attention_nowhere(twin: Twin) -> dict[str, str]:
    """The rules of attention, where nothing was found that they could measure."""
    if any(measurement.is_of_attention for measurement in twin.attribution.rows):
        return {}
    return {
        str(rule): f"no attention that is known was found in the {len(names)} modules it matches"
        for rule, names in twin.plan.matched.items()
        if rule.family == ATTENTION.name
    }
