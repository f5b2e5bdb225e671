"""Runs side by side: how they were set up, how their metrics went, and where they part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias, get_args

import numpy as np

from tmm.analysis.anomaly import EqualWithNaN
from tmm.analysis.order import execution_ranks
from tmm.analysis.series import BoolArray
from tmm.core.keys import is_family, is_loss, words_of
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray
from tmm.core.series_by_key import Recorded

Direction: TypeAlias = Literal["min", "max"]
"""Which end of a metric is the better one."""

MORE_IS_BETTER = frozenset(("accuracy", "acc", "f1", "auc", "auroc", "bleu", "reward", "rewards"))


@dataclass(frozen=True, eq=False)
class ComparedKey:
    """One key in the runs that have it.

    ``steps``, shape (n,), are those that all of them recorded, and ``values`` holds a series of
    shape (n,) per run. ``final`` is the last value of each run, whenever that was. ``best`` names
    the run with the best final value: None without a ``direction``, for a tie, and where no final
    value is finite.
    """

    key: str
    direction: Direction | None
    steps: StepArray
    values: Mapping[str, FloatArray]
    final: Mapping[str, float]
    best: str | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """``configuration`` maps the entries that differ to their value in each run that has them.

    Entries of nested dictionaries are joined with dots. ``metrics`` has one item per key, in the
    order of execution of the runs.
    """

    runs: tuple[str, ...]
    configuration: Mapping[str, Mapping[str, object]]
    metrics: tuple[ComparedKey, ...]

    def metric(self, key: str) -> ComparedKey:
        """What there is about ``key``; KeyError for a key that was not compared."""
        for compared in self.metrics:
            if compared.key == key:
                return compared
        raise KeyError(f"{key!r} was not compared; compared: {[m.key for m in self.metrics]}")


def compare(
    runs: Mapping[str, Recorded],
    keys: Iterable[str] | None = None,
    directions: Mapping[str, Direction | None] | None = None,
    configs: Mapping[str, Mapping[str, object]] | None = None,
) -> Comparison:
    """Compare runs by name.

    ``keys`` are by default all that two runs (the only run) have. Of losses less is better, of keys
    with one of the words accuracy, acc, f1, auc, bleu, reward more; of others neither, unless
    ``directions`` says so by key. ``configs`` are the settings of the runs.

    Raises:
        KeyError: for a key that no run has.
        ValueError: for a direction that is neither "min", "max" nor None.
    """
    directions = directions or {}
    for key, direction in directions.items():
        if direction not in (*get_args(Direction), None):
            raise ValueError(f"directions[{key!r}]={direction!r} is neither 'min' nor 'max'")
    holders: dict[str, list[str]] = {}
    for name, recorded in runs.items():
        names = recorded.keys()
        for key in names:
            holders.setdefault(key, []).append(name)
    least = min(2, len(runs))
    chosen = [k for k, names in holders.items() if len(names) >= least] if keys is None else keys
    metrics = []
    for key in chosen:
        if key not in holders:
            raise KeyError(f"no run has the key {key!r}")
        held = {name: runs[name].series(key) for name in holders[key]}
        if all(values.ndim == 1 for _, values in held.values()):
            info = runs[holders[key][0]].key_info(key)
            direction = directions[key] if key in directions else direction_of(info)
            metrics.append(_compared(key, direction, held))
    return Comparison(tuple(runs), _differences(configs or {}), tuple(metrics))


def direction_of(info: KeyInfo) -> Direction | None:
    """Which end of a metric is the better one, by its name; None where that is not known."""
    if is_loss(info):
        return "min"
    words = {word for name in words_of(info.key) for word in (name, name.rstrip("0123456789"))}
    return "max" if not is_family(info.kind) and words & MORE_IS_BETTER else None


def _compared(
    key: str, direction: Direction | None, held: dict[str, tuple[StepArray, FloatArray]]
) -> ComparedKey:
    steps = reduce(np.intersect1d, (steps for steps, _ in held.values()))
    values = {name: series[np.isin(own, steps)] for name, (own, series) in held.items()}
    final = {name: float(series[-1]) for name, (_, series) in held.items() if len(series)}
    return ComparedKey(key, direction, steps, values, final, _best(final, direction))


def _best(final: dict[str, float], direction: Direction | None) -> str | None:
    finite = {name: value for name, value in final.items() if np.isfinite(value)}
    if direction is None or not finite:
        return None
    best = min(finite.values()) if direction == "min" else max(finite.values())
    names = [name for name, value in finite.items() if value == best]
    return names[0] if len(names) == 1 else None


def _differences(
    configs: Mapping[str, Mapping[str, object]],
) -> dict[str, dict[str, object]]:
    flat = {name: _flattened(config) for name, config in configs.items()}
    entries = dict.fromkeys(entry for config in flat.values() for entry in config)
    differences = {}
    for entry in entries:
        values = {name: config[entry] for name, config in flat.items() if entry in config}
        first, *others = values.values()
        if len(values) < len(flat) or not all(_same(first, other) for other in others):
            differences[entry] = values
    return differences


def _flattened(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _same(left: object, right: object) -> bool:
    """Equal, and of a truth value only to a truth value; arrays and NaN by what they print."""
    if isinstance(left, bool) is not isinstance(right, bool):
        return False
    try:
        return bool(left == right) or repr(left) == repr(right)
    except (TypeError, ValueError):  # arrays have no single answer
        return repr(left) == repr(right)


@dataclass(frozen=True, eq=False)
class Divergence(EqualWithNaN):
    """The first step at which two runs differ, and the first key in the execution of that step.

    ``a`` and ``b`` are its values in them; ``others`` differ at the same step, in the order of
    execution.
    """

    step: int
    key: str
    site: str
    a: float
    b: float
    others: tuple[str, ...]


def first_divergence(
    a: Recorded,
    b: Recorded,
    *,
    relative: float = 0.1,
    absolute: float = 1e-8,
    keys: Iterable[str] | None = None,
) -> Divergence | None:
    """The first common step at which a common key differs; None where there is none.

    Two values differ if they are further apart than ``absolute + relative * max(|a|, |b|)``, if one
    of them is NaN, or if one is infinite and the other is not the same. ``keys`` are by default all
    common ones but those of the system (``system/…``), which differ by themselves. Raises KeyError
    for a key that one of them lacks.
    """
    if keys is None:
        names, common = a.keys(), set(b.keys())
        keys = [k for k in names if k in common and a.key_info(k).kind != "system"]
    first: dict[str, tuple[int, float, float]] = {}
    for key in keys:
        (steps_a, values_a), (steps_b, values_b) = a.series(key), b.series(key)
        if values_a.ndim != 1 or values_b.ndim != 1:
            continue
        steps, in_a, in_b = np.intersect1d(steps_a, steps_b, True, return_indices=True)
        left, right = values_a[in_a], values_b[in_b]
        found = np.flatnonzero(_differ(left, right, relative, absolute))
        if len(found):
            place = found[0]
            first[key] = (int(steps[place]), float(left[place]), float(right[place]))
    if not first:
        return None
    step = min(found_step for found_step, _, _ in first.values())
    ranks = execution_ranks(a, first)
    key, *others = sorted((k for k in first if first[k][0] == step), key=lambda k: ranks[k])
    _, value_a, value_b = first[key]
    return Divergence(step, key, a.key_info(key).site, value_a, value_b, tuple(others))


def _differ(a: FloatArray, b: FloatArray, relative: float, absolute: float) -> BoolArray:
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.maximum(np.abs(a), np.abs(b))
        apart: BoolArray = np.abs(a - b) > absolute + relative * largest
    strange = ~(np.isfinite(a) & np.isfinite(b))
    unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
    return np.where(strange, unequal, apart)
