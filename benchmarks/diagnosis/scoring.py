"""Whether what a diagnosis says is true of a planted fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tmm
from benchmarks.diagnosis.faults import Fault
from benchmarks.diagnosis.training import Training


@dataclass(frozen=True)
class Said:
    """One thing that a diagnosis says: what, how grave, where and since when."""

    kind: str
    severity: str
    key: str
    site: str
    step: int

    def __str__(self) -> str:
        return f"{self.severity} {self.kind} {self.site or self.key} @{self.step}"


def says(path: Path) -> tuple[Said, ...]:
    """What tmm says of a run, the most important first: the causes of its stories."""
    with tmm.open_run(path) as run:
        if hasattr(run, "findings"):
            found = [story.cause for story in run.findings()]
        else:  # before there were stories
            found = list(tmm.analysis.find_anomalies(run))
    return tuple(Said(a.kind, a.severity, a.key, a.site, a.step) for a in found)


def is_true(said: Said, fault: Fault, training: Training) -> bool:
    """Whether it names the fault: kind, place and step."""
    first, last = fault.steps
    slack = training.every - 1  # until the next monitored step
    if said.kind not in fault.kinds or not first <= said.step <= last + slack:
        return False
    return is_in_place((said.site, said.key), fault, training)


def is_in_place(names: Sequence[str], fault: Fault, training: Training) -> bool:
    """Whether a site or key is where the fault is; all are, where it is of the whole model."""
    if fault.places is None:
        return True
    return any(
        name == place or name.startswith((f"{place}.", f"{place}/", f"{place}["))
        for place in fault.places(training)
        for name in names
    )


def rank(said: Sequence[Said], fault: Fault, training: Training) -> int | None:
    """The place of the first that is true, from 0; None where none is."""
    return next((i for i, one in enumerate(said) if is_true(one, fault, training)), None)
