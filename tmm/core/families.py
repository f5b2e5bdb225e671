"""The families of keys: the one table of what each is of, and when its values come about.

Rules are made by it, keys are composed and parsed by it (``tmm.core.keys``), and views order and
group by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Literal, TypeAlias

from tmm.core.metrics import ALIGNMENT, ATTENTION_METRICS, HISTOGRAM, METRIC_NAMES, STATE_METRICS

Subject: TypeAlias = Literal["modules", "parameters"]


class Phase(IntEnum):
    """The parts of a step, in the order in which values come about."""

    FORWARD = 0
    LOSS = 1
    BACKWARD = 2
    GRADIENT = 3
    UPDATE = 4
    PARAMETER = 5
    REST = 6


@dataclass(frozen=True)
class Family:
    """What is measured alike, and has keys that begin alike: ``family/site/metric``.

    ``subject`` says whether its sites are outputs of modules or parameters; None for what is of a
    whole step. ``metrics`` are the built-in ones that its rule takes. A family with ``terms`` has
    keys that begin with that text and a term, such as ``RCC (W_t-W_0)x_t``; one without
    ``ends_with_metric`` has keys that end with their site. ``needs_reference`` tells that it
    compares with the reference of a spec, ``runs_branch`` that the reference runs a forward pass
    for it.
    """

    name: str
    subject: Subject | None
    phase: Phase
    metrics: tuple[str, ...] = ()
    terms: str = ""
    ends_with_metric: bool = True
    needs_reference: bool = False
    runs_branch: bool = False

    @property
    def is_of_outputs(self) -> bool:
        """Whether it is measured of the outputs of modules as they come about, and of no more."""
        is_forward = self.subject == "modules" and self.phase is Phase.FORWARD
        return is_forward and self.ends_with_metric

    def of(self, term: str) -> str:
        """What the keys of a term begin with."""
        return self.terms + term

    def begins(self, start: str) -> bool:
        """Whether keys that begin with ``start``, up to their first slash, are of this family."""
        if self.terms:
            return start.startswith(self.terms) or start == self.terms[:-1]
        return start == self.name


_DIFFERENCE_METRICS = (*METRIC_NAMES, "relative_norm", "cosine", "l2")
_HEAD_METRICS = tuple(name for name in METRIC_NAMES if name != HISTOGRAM)

MODEL_INPUT = Family("model_input", None, Phase.FORWARD)
MODEL_OUTPUT = Family("model_output", None, Phase.FORWARD)
ACTIVATION = Family("activation", "modules", Phase.FORWARD, METRIC_NAMES)
ACTIVATION_DIFFERENCE = Family(
    *("activation_difference", "modules", Phase.REST, _DIFFERENCE_METRICS),
    needs_reference=True,
    runs_branch=True,
)
ACTIVATION_GRADIENT = Family("activation_gradient", "modules", Phase.BACKWARD, METRIC_NAMES)
ATTENTION = Family(
    *("attention", "modules", Phase.FORWARD, (*ATTENTION_METRICS, *_HEAD_METRICS)),
    terms="attention_",
    ends_with_metric=False,
)
RCC = Family(
    *("rcc", "modules", Phase.REST, ("l2norm",)),
    terms="RCC ",
    needs_reference=True,
    runs_branch=True,
)
GRADIENT = Family("gradient", "parameters", Phase.GRADIENT, METRIC_NAMES)
GRADIENT_BEFORE_CLIP = Family("gradient_before_clip", "parameters", Phase.GRADIENT, METRIC_NAMES)
UPDATE = Family("update", "parameters", Phase.UPDATE, (*METRIC_NAMES, "relative_norm", ALIGNMENT))
OPTIMIZER_STATE = Family(
    *("optimizer_state", "parameters", Phase.UPDATE, tuple(STATE_METRICS)),
)
PARAMETER = Family("parameter", "parameters", Phase.PARAMETER, METRIC_NAMES)
PARAMETER_DIFFERENCE = Family(
    *("parameter_difference", "parameters", Phase.REST, _DIFFERENCE_METRICS),
    needs_reference=True,
)
STEP = Family("step", None, Phase.REST, ends_with_metric=False)
SYSTEM = Family("system", None, Phase.REST, ends_with_metric=False)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            *(
                MODEL_INPUT,
                MODEL_OUTPUT,
                ACTIVATION,
                ACTIVATION_DIFFERENCE,
                ACTIVATION_GRADIENT,
                ATTENTION,
                RCC,
            ),
            *(GRADIENT, GRADIENT_BEFORE_CLIP, UPDATE, OPTIMIZER_STATE),
            *(PARAMETER, PARAMETER_DIFFERENCE, STEP, SYSTEM),
        )
    }
)
"""By the names of their rules."""

VALUE_FAMILY = ""
"""The family of values that a model records by name: their keys have no family."""

BRANCH_FAMILIES = tuple(family.name for family in FAMILIES.values() if family.runs_branch)


def families_of_outputs() -> tuple[str, ...]:
    """The names of the families that are measured of the outputs of modules."""
    return tuple(family.name for family in FAMILIES.values() if family.is_of_outputs)


def family_of(start: str) -> Family | None:
    """That of keys that begin with ``start``, up to their first slash; None if a user chose it."""
    exact = FAMILIES.get(start)
    if exact is not None and exact.begins(start):
        return exact
    return next((family for family in (ATTENTION, RCC) if family.begins(start)), None)


def rule_family(family: str) -> str:
    """The name of the rules that ask for rows of ``family``, as keys name it."""
    found = family_of(family)
    return family if found is None else found.name
