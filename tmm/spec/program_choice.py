"""Whether steps that are not monitored run the user's own program or the measured one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from tmm.core.families import ACTIVATION, ACTIVATION_GRADIENT, ATTENTION, BRANCH_FAMILIES
from tmm.core.metrics import HISTOGRAM
from tmm.spec.spec import Spec

LARGE = 2**16
"""Elements of a tensor that take as long to read as the call that reads them."""

Programs: TypeAlias = Literal[1, 2, "auto"]


@dataclass(frozen=True)
class ProgramChoice:
    """How many programs of a compiled model its training runs, and ``why``.

    With two of them, steps that are not monitored run the user's own program; with one, they run
    the measured program, too, and drop its rows. ``is_open`` while the sizes of tensors, which a
    trace tells, may speak against one.
    """

    count: Literal[1, 2]
    why: str
    is_open: bool = False

    def __str__(self) -> str:
        if self.count == 1:
            return f"one program, {self.why}: all steps run the measured one"
        return f"two programs, {self.why}: steps that are not monitored run the model's own"

    def settled(self, readings: Sequence[int]) -> ProgramChoice:
        """The choice, now that the elements of each measured tensor are known."""
        if self.is_open and sum(readings) < LARGE * len(readings):
            why = "as tensors are so small that the calls which measure them cost more than reading"
            return ProgramChoice(2, why)
        return replace(self, is_open=False)


def check_programs(asked: object) -> None:
    """Raise ``ValueError`` for anything but 1, 2 and "auto"."""
    if isinstance(asked, bool) or asked not in (1, 2, "auto"):
        raise ValueError(
            f"programs={asked!r} is neither 1, 2 nor 'auto': with 1 all steps run the measured"
            " program, with 2 those that are not monitored run the model's own"
        )


def choose_programs(
    asked: Programs, spec: Spec, *, own_is_compiled: bool, shares_tensors: bool = False
) -> ProgramChoice:
    """What ``tmm.instrument(..., programs=)`` comes to.

    ``own_is_compiled`` tells whether the user's own program is compiled, too, ``shares_tensors``
    that ranks share the tensors of a forward pass.
    """
    if asked != "auto":
        return ProgramChoice(asked, "as programs= asks for")
    if not own_is_compiled:
        return ProgramChoice(2, "as the model's own is not compiled")
    if (further := next(_further_work(spec), None)) is not None:
        return ProgramChoice(2, f"as {further}")
    if shares_tensors and spec.measures(ACTIVATION_GRADIENT.name):
        return ProgramChoice(2, "as ranks may have to sum gradients of activations")
    why = "as reading what is there costs less than compiling twice"
    return ProgramChoice(1, why, is_open=True)


def _further_work(spec: Spec) -> Iterator[str]:
    """What a measured program does besides reading tensors that are there."""
    for family in BRANCH_FAMILIES:
        if spec.measures(family):
            yield "the reference runs a forward pass"
    for rule in spec.rules:
        if rule.family == ATTENTION.name:
            yield "attention is computed once more"
        elif rule.family in (ACTIVATION.name, ACTIVATION_GRADIENT.name):
            if rule.functions:
                yield f"nobody knows how long the function {rule.functions[0][0]!r} takes"
            elif HISTOGRAM in rule.metrics:
                yield "histograms take longer than a reading"
