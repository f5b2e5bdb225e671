"""What users log: numbers by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tmm.core.keys import reserved_start
from tmm.steps.logged_values import values_here

_MOST_LEVELS = 100


def numbers_in(
    values: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each number in ``values`` as a tensor of one element, by key; mappings are flattened.

    Raises:
        TypeError: for what is no number.
        ValueError: for arrays, numbers that are not real, empty keys and those of tmm itself.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"log({values!r}): give a dictionary, such as {{'loss': 0.5}}")
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"log: the key {key!r} is not text, or empty")
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and prefix.count("/") > _MOST_LEVELS:
            raise ValueError(f"log: {name[:40]!r}... is nested too deeply, or holds itself")
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{name}/")
            continue
        if isinstance(value, torch.Tensor):
            number = values_here("log", name, value)
        else:
            number = torch.tensor(_number(name, value), dtype=torch.float64, device="cpu")
        if number.numel() != 1 or number.is_complex():
            raise ValueError(
                f"log: {name!r} has shape {tuple(number.shape)} and dtype {number.dtype}, and is"
                " not one real number; log a mean, or log_samples the array"
            )
        if number.layout is not torch.strided or number.device.type == "meta":
            raise ValueError(f"log: {name!r} is a {number.layout} tensor; log a dense one")
        if (start := reserved_start(name)) is not None:
            raise ValueError(
                f"log: keys that start with {start!r} are tmm's own; choose another name, such as"
                f" {'my_' + name!r}"
            )
        yield name, number


def _number(name: str, value: object) -> float:
    """A number of Python or numpy."""
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        if value.dtype.kind not in "biuf" or value.size != 1:
            raise ValueError(
                f"log: {name!r} has shape {value.shape} and dtype {value.dtype}, and is not one"
                " real number; log a mean, or log_samples the array"
            )
        return float(value.reshape(-1)[0])
    if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
        raise TypeError(f"log: {name!r} is {value!r}, not a number; log_samples takes texts")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"log: {name!r} is too large for a float64") from error


def checked_count(name: str, value: object) -> int | None:
    """How many, as ``LiveRun.step`` is told; raises ``TypeError`` and ``ValueError``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"step: {name}={value!r} is not an integer")
    if value < 0:
        raise ValueError(f"step: {name}={value} is negative")
    return int(value)
