"""Equality of results that may hold NaN: two answers to one question are equal."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any


class EqualWithNaN:
    """Base of frozen dataclasses (``eq=False``) in which NaN equals NaN."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))


def _values(item: Any) -> tuple[object, ...]:
    values = [getattr(item, field.name) for field in fields(item)]
    return tuple("NaN" if isinstance(v, float) and math.isnan(v) else v for v in values)
