"""What a user may have forgotten about steps: noticed here, told once, and kept in the run."""

from __future__ import annotations

from tmm.core.failures import Gaps
from tmm.steps.step_block import StepBlock

_MANY_PASSES = 20  # of a training that has opened no step
_MANY_REPLACED = 3  # records that gave way to others of the same step

_NO_STEP = (
    "{count} forward passes of the instrumented model ran in training mode, and no step was opened,"
    " so that nothing is recorded. Put each step of the training into a block"
    " `with tmm.monitor(model).step(step):`"
)
_NO_WITH = (
    "monitor.step({step}) opens no step by itself, and nothing of it is recorded: write"
    " `with monitor.step({step}):` around the step"
)
_REPLACED = (
    "{count} records gave way to later ones of the same step, the last time in step {step}: each"
    " replaces the one before. Count the steps of the training, not its epochs: each optimizer step"
    " has a number of its own"
)
_NOT_ENDED = (
    "step {step} was not ended before step {next}, and nothing of it is recorded: call"
    " monitor.end_step(), or write `with monitor.step(step):`"
)
_NESTED = "step {step} begins inside of the block of step {outer}, and steps are not nested: {what}"
_CLOSED = (
    "the monitor was taken off its model, by tmm.remove or as its run ended: nothing is recorded."
    " tmm.monitor(model) gives the one of a model that was instrumented anew"
)

_NONE_MONITORED = (
    "{count} steps were opened and none of them is monitored, so that nothing is measured: {spec}"
    " monitors other steps; choose another every="
)

_NO_BACKWARD = (
    "no gradient of an activation came in the monitored step {step}, so that rules of"
    " activation_gradient have no rows in it: end a step after loss.backward();"
    " tmm.explain(model).unmeasured names those that cannot be measured"
)
_IN_VAIN = (
    "watch(optimizer): nothing is measured at its steps, as the spec has no rule of gradients,"
    " updates, parameters or optimizer state: {spec}. For another spec call tmm.remove(model),"
    " tmm.instrument(model, spec) and tmm.monitor(model) once more"
)

STEPS = "steps"
"""Where ``tmm.explain`` tells it."""


class Forgotten:
    """Follows what happens around the steps of a monitor.

    ``unmeasured`` is what ``tmm.explain`` has of things that are not measured, by name.
    """

    def __init__(self, gaps: Gaps, unmeasured: dict[str, str]) -> None:
        self.is_unused = True  # no step was opened so far
        self._gaps, self._unmeasured = gaps, unmeasured
        self._passes = 0
        self._opened = self._monitored = 0
        self._block: StepBlock | None = None
        self._last: int | None = None
        self._replaced = 0

    # Steps that nobody opens

    def note_pass(self) -> bool:
        """A forward pass of a training without steps; tells whether the user has been told."""
        self._passes += 1
        if self._passes == _MANY_PASSES:
            self._tell_of_no_step()
        return self._passes >= _MANY_PASSES

    def note_block(self, block: StepBlock) -> None:
        """``monitor.step()`` was called; what it gave before should have been entered by now."""
        known, self._block = self._block, block
        if known is not None and not known.was_entered:
            self._tell("no with", known.step, _NO_WITH.format(step=known.step), "gap")

    def note_begin(self, *, monitored: bool) -> None:
        """A step was opened."""
        self.is_unused = False
        self._opened += 1
        self._monitored += monitored

    def note_end(self, spec: str, *, is_recorded: bool) -> None:
        """The monitor is closed; ``is_recorded`` tells whether there is a run to be empty."""
        if is_recorded and self._opened > 1 and not self._monitored:
            text = _NONE_MONITORED.format(count=self._opened, spec=spec)
            self._tell("none monitored", 0, text, "note")
        if self._block is not None:
            self.note_block(self._block)
        was_entered = self._block is None or self._block.was_entered  # else that was told
        if self.is_unused and self._passes and is_recorded and was_entered:
            self._tell_of_no_step()
        if self._replaced > _MANY_REPLACED:
            text = f"{self._replaced} records gave way to later ones of the same step"
            self._gaps.add(self._last or 0, text)

    def _tell_of_no_step(self) -> None:
        self._tell("no step", 0, _NO_STEP.format(count=self._passes), "gap")

    # Steps that are opened in another way than is meant

    def note_record(self, step: int) -> None:
        """A step was recorded."""
        self._replaced += step == self._last
        self._last = step
        if self._replaced == _MANY_REPLACED:
            self._tell("replaced", step, _REPLACED.format(step=step, count=_MANY_REPLACED), "gap")

    def note_not_ended(self, step: int, following: int) -> None:
        """A step was begun and another one begins; the run has a gap there already."""
        text = _NOT_ENDED.format(step=step, next=following)
        self._tell("not ended", step, text, "note")

    def note_nested(self, step: int, outer: int) -> None:
        """A step begins while the block of another one is open."""
        if step == outer:
            what = "it is one with that"
        else:
            what = f"what runs in it is not recorded, and step {outer} goes on after it"
        text = _NESTED.format(step=step, outer=outer, what=what)
        self._tell("nested", step, text, "note" if step == outer else "gap")

    def note_no_backward(self, step: int) -> None:
        """Gradients of activations are asked for, and a step had none."""
        text = _NO_BACKWARD.format(step=step)
        self._tell("no backward", step, text, "note", "activation_gradient")

    def note_watched_in_vain(self, step: int, spec: str) -> None:
        """An optimizer is watched, and the spec asks for nothing that its steps tell."""
        self._tell("in vain", step, _IN_VAIN.format(spec=spec), "note", "watch(optimizer)")

    def note_closed(self, step: int) -> None:
        """A step is opened after the end."""
        self._gaps.warn_once("closed", step, _CLOSED)

    def tell(self, kind: str, step: int, text: str) -> None:
        """Say, once of a kind, what was done otherwise than it is meant."""
        self._tell(kind, step, text, "gap")

    def _tell(self, kind: str, step: int, text: str, event: str, subject: str = STEPS) -> None:
        if self._gaps.warn_once(kind, step, text, event=event):
            told = self._unmeasured
            told[subject] = f"{told[subject]}; {text}" if subject in told else text
