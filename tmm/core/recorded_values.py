"""The values that a model records by name, with ``tmm.record``."""

from __future__ import annotations

import torch

from tmm.core.keys import own_family
from tmm.core.metrics import AGGREGATE_NAMES, Aggregate, Reduction, function_reduction


class RecordError(ValueError):
    """A call of ``tmm.record`` that cannot be recorded."""


class RecordedValues:
    """How each recorded value is joined, by name."""

    def __init__(self) -> None:
        self.reductions: dict[str, Reduction] = {}

    def declare(
        self, name: str, value_type: type, aggregate: Aggregate | None, *, any_family: bool = False
    ) -> None:
        """Know of a value; without an aggregate it is the one known, or the mean.

        Raises ``RecordError`` for a name that is taken or, unless ``any_family``, reserved, an
        unknown aggregate, or what is not a tensor.
        """
        known = self.reductions.get(name)
        if aggregate is None:
            aggregate = "mean" if known is None else known.aggregate
        if known is None:
            _check(name, value_type, aggregate, any_family=any_family)
            self.reductions[name] = function_reduction("", _itself, aggregate)
        elif not _same(known.aggregate, aggregate):
            raise RecordError(
                f"tmm.record({name!r}): the name is used with aggregate={aggregate!r} and with"
                f" aggregate={known.aggregate!r}; give the two values different names"
            )


def _check(name: str, value_type: type, aggregate: Aggregate, *, any_family: bool) -> None:
    if not isinstance(name, str) or not name:
        raise RecordError(f"tmm.record: name={name!r} is not a key; give it as text")
    if not issubclass(value_type, torch.Tensor):
        raise RecordError(
            f"tmm.record({name!r}): tensor is a {value_type.__name__}; record a number with"
            " monitor.log_scalar, or make it a tensor"
        )
    family = own_family(name)
    if not any_family and family is not None:
        raise RecordError(
            f"tmm.record({name!r}): keys that start with {family!r} are tmm's own; choose"
            f" another name, such as {'my_' + name!r}"
        )
    if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
        raise RecordError(
            f"tmm.record({name!r}): aggregate={aggregate!r} is neither callable nor one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )


def _same(left: Aggregate, right: Aggregate) -> bool:
    """Equal; a function that is defined anew in each call of a forward stays the same."""
    return getattr(left, "__code__", left) == getattr(right, "__code__", right)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs() if tensor.is_complex() else tensor
