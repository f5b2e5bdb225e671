"""Parameters that are not trained, and steps that optimizers do not take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import has_activation, is_output
from tmm.analysis.recent import Newest
from tmm.analysis.series import Series, is_metric, named, series_of
from tmm.core.families import GRADIENT, PARAMETER
from tmm.core.keys import OPTIMIZER_AGE, SKIPPED, layer_of, untrained_of
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

_SHOWN = 4
_SKIPS = 8
_WORDS = {
    "frozen": "frozen (requires_grad is False)",
    "without_optimizer": "in no optimizer that is watched, so that it is not trained",
    "without_gradient": "without a gradient when its optimizer steps",
}
_is_parameter = is_metric(PARAMETER.name, "rms")
_is_norm = is_metric(GRADIENT.name, "norm")


def untrained_parameters(recorded: Recorded) -> Iterator[Anomaly]:
    """Parameters that nothing trains: one row for each reason and step at which it is told.

    Without an optimizer: medium. Without a gradient: medium where the module runs, else low, for
    it is not used. Frozen by ``requires_grad``: low, as it is mostly meant. A gradient that
    was there in nearly all recorded steps and is in none of the last ten, while the module
    runs and others have theirs, has been lost: medium.
    """
    found: dict[tuple[str, int], list[Series]] = {}
    for series in series_of(recorded, lambda info: untrained_of(info) is not None):
        told = untrained_of(series.info)
        assert told is not None
        for step in series.steps[series.values > 0].tolist():
            found.setdefault((told[0], step), []).append(series)
    runs = has_activation(recorded)
    count = sum(1 for _ in series_of(recorded, _is_parameter))
    for (reason, step), some in found.items():
        names = [_parameter(series) for series in some]
        used = [name for name in names if name.rpartition(".")[0] in runs or "." not in name]
        severity: Severity = "low" if reason == "frozen" else "medium"
        if reason == "without_gradient" and runs and not used:
            severity = "low"
        shown = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        of = f" ({len(names)} of {count} parameters)" if count else ""
        text = f"{shown}{more}{of}: {_WORDS[reason]}, since step {step}."
        kind = f"parameter_{reason}"
        key, place = some[0].key, _place(names)
        yield Anomaly(kind, severity, step, step, key, place, float(len(names)), 0.0, text)
    known = {_parameter(series) for some in found.values() for series in some}
    for (step, key), lost in _lost(recorded, known).items():
        names = [series.site for series in lost]
        shown = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        before = int(lost[0].steps[-1])
        text = (
            f"{shown}{more}: without a gradient since step {step}; at step {before} there was one."
        )
        yield Anomaly(
            *("parameter_without_gradient", "medium", step, step, key, _place(names)),
            *(float(len(names)), 0.0, text),
        )


def _lost(
    recorded: Recorded, told: set[str], *, least: int = 10, part: float = 0.9
) -> dict[tuple[int, str], list[Series]]:
    """The norms of gradients that end before those of others.

    By the first step without, and the key of a module of them that ran in it.
    """
    norms = [series for series in series_of(recorded, _is_norm) if len(series.steps) >= least]
    if len({int(series.steps[-1]) for series in norms}) < 2:
        return {}
    steps = np.unique(np.concatenate([series.steps for series in norms]))
    outputs = {layer_of(s.info): s for s in series_of(recorded, is_output)}
    found: dict[int, list[Series]] = {}
    keys: dict[int, str] = {}
    for series in norms:
        first, last = series.steps[0], series.steps[-1]
        later = steps[steps > last]
        possible = int(((steps >= first) & (steps <= last)).sum())
        output = outputs.get(series.site.rpartition(".")[0])
        if len(later) < least or len(series.steps) < part * possible or series.site in told:
            continue
        if output is not None and np.isin(later[:least], output.steps).all():
            found.setdefault(int(later[0]), []).append(series)
            keys.setdefault(int(later[0]), output.key)
    return {(step, keys[step]): some for step, some in found.items()}


def skipped_optimizer_steps(recorded: Recorded, *, least: int = _SKIPS) -> Iterator[Anomaly]:
    """Steps that a ``GradScaler`` skips, one after the other.

    ``least`` recorded ones in a row: medium, as a scale that is found at the beginning of a
    training takes fewer; twice as many, or all of the run, high.
    """
    skips = named(recorded, SKIPPED)
    if skips is None:
        return
    for episode in episodes(skips, skips.values > 0, least=least):
        is_all = episode.count == len(skips.values)
        severity: Severity = "high" if is_all or episode.count >= 2 * least else "medium"
        text = (
            f"The GradScaler skipped the step of the optimizer {episode.when}, in"
            f" {'all' if is_all else episode.count} recorded steps: nothing is learned, for"
            " gradients are not finite."
        )
        yield episode.anomaly("steps_skipped", severity, float(least), text)


def optimizer_resets(recorded: Recorded) -> Iterator[Anomaly]:
    """The state of an optimizer that began anew: medium.

    It has seen fewer steps than at the recorded step before.
    """
    age = named(recorded, OPTIMIZER_AGE)
    if age is None:
        return
    ages = age.finite()
    for place in np.flatnonzero(np.diff(ages.values) < 0) + 1:
        before, now = ages.values[place - 1], ages.values[place]
        text = (
            f"The state of the optimizer has seen {now:.0f} steps at step {ages.steps[place]}, and"
            f" {before:.0f} at step {ages.steps[place - 1]}: it was lost. Is it in the checkpoint?"
        )
        flagged = np.arange(len(ages.values)) == place
        (episode,) = episodes(ages, flagged)
        yield episode.anomaly("optimizer_reset", "medium", float(before), text)


def _parameter(series: Series) -> str:
    told = untrained_of(series.info)
    assert told is not None
    return told[1]


def _place(names: list[str]) -> str:
    """The module that all are of, else the first parameter's."""
    modules = [name.rpartition(".")[0] for name in names]
    parts = [module.split(".") for module in modules]
    same = itertools.takewhile(lambda some: len(set(some)) == 1, zip(*parts, strict=False))
    return ".".join(some[0] for some in same) or modules[0] or names[0]


def _is_untrained(info: KeyInfo) -> bool:
    return untrained_of(info) is not None


def _told(newest: Newest) -> Ending:
    return Ending.of(newest, newest.values > 0)


def _is_skipped(info: KeyInfo) -> bool:
    return info.key == SKIPPED


def _is_age(info: KeyInfo) -> bool:
    return info.key == OPTIMIZER_AGE


def _younger(newest: Newest) -> Ending:
    before = newest.before(1)[:, 0] if len(newest) else newest.values
    return Ending.of(newest, newest.values < before)


def _of_model(info: KeyInfo) -> bool:
    return _is_parameter(info) or info.kind == "activation"


def _one(info: KeyInfo) -> int:
    return 0


UNTRAINED_END = (
    EndsWith("parameter_without_optimizer", "medium", _is_untrained, _told, _one, _of_model),
)
SKIPS_END = (EndsWith("steps_skipped", "high", _is_skipped, _told),)
RESETS_END = (EndsWith("optimizer_reset", "medium", _is_age, _younger),)
