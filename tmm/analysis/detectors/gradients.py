"""Gradients that explode, vanish or are zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith, any_finite, jumping
from tmm.analysis.recent import Newest
from tmm.analysis.robust import bridged, early_median, jumps
from tmm.analysis.series import BoolArray, Series, loss_unit, named, series_of, skipped_steps
from tmm.core.families import GRADIENT, GRADIENT_BEFORE_CLIP, STEP
from tmm.core.keys import GRAD_SCALE, block_of_norm, is_total_loss, is_total_norm, metric_of
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray
from tmm.core.series_by_key import Recorded

_FAMILIES = (GRADIENT.name, GRADIENT_BEFORE_CLIP.name)
_LARGE = 100.0
_FACTOR, _SCORE, _WINDOW, _LEAST = 10.0, 8.0, 50, 10
_SMALLEST = 1e-6
_PART = 0.15
_SMALL = 1e-7


def exploding_gradients(
    recorded: Recorded,
    *,
    high: float = _LARGE,
    critical: float = 1000.0,
    factor: float = _FACTOR,
    score: float = _SCORE,
    window: int = _WINDOW,
    least: int = _LEAST,
    smallest: float = _SMALLEST,
    part: float = _PART,
) -> Iterator[Anomaly]:
    """Norms of gradients, all together, of blocks and of parameters, that are or become large.

    A norm above ``high`` is high, above ``critical`` critical; as many times more as the first
    loss was above 10, for the scale of the loss, such as of a sum, is that of its gradients.
    So is a jump: at least ``factor`` times the median of the ``window`` recorded values before
    (of ``least`` at the least) and more than ``score`` spreads above it, in decades: high for
    all gradients or a block, medium for one parameter; what stays below ``smallest``, or below
    ``part`` of what it was at first (the median of ten), is no jump: where hardly anything is
    left to learn, norms vary by any factor. A norm that falls to no less than half of ``high``
    in between is one episode. Steps that a ``GradScaler`` skipped are left out, and so are
    jumps that vanish when norms are divided by ``step/grad_scale``.
    """
    skipped = skipped_steps(recorded)
    scale = named(recorded, GRAD_SCALE)
    unit = loss_unit(recorded)
    high, critical = unit * high, unit * critical
    for series in series_of(recorded, _is_norm):
        norms = series.without(skipped).finite()
        jumped, usual = jumps(norms.values, factor=factor, score=score, window=window, least=least)
        if scale is not None and jumped.any():
            with np.errstate(over="ignore"):
                scaled = norms.values / _scale_at(scale, norms)
            jumped &= jumps(scaled, factor=factor, score=score, window=window, least=least)[0]
        jumped &= norms.values > max(smallest, part * early_median(norms.values))
        flagged = bridged(jumped | (norms.values > high), norms.values > high / 2)
        for episode in episodes(norms, flagged):
            value, place = episode.value, episode.worst
            severity: Severity = "critical" if value > critical else "high"
            if value <= high and series.info.kind in _FAMILIES:
                severity = "medium"
            text = f"{_named(series)} reached {number(value)} {episode.when}"
            limit = critical if value > critical else high
            if value > high:
                text += f", more than {number(limit)}"
                if episode.places.start == 0:
                    text += "; it has been large from the first recorded step (is the loss a sum?)"
            if jumped[place]:
                limit = limit if value > high else factor * usual[place]
                with np.errstate(over="ignore"):
                    times = value / usual[place]
                text += (
                    f"; it was {number(times)} times its median of the"
                    f" {min(place, window)} recorded steps before ({number(usual[place])})"
                )
            yield episode.anomaly("gradient_explosion", severity, limit, text + ".")


def vanishing_gradients(
    recorded: Recorded, *, limit: float = _SMALL, least: int = 3
) -> Iterator[Anomaly]:
    """Norms of gradients below ``limit`` in ``least`` recorded steps in a row: medium.

    Below ten times that in between, it is one episode. Of all gradients together, of blocks, and of
    parameters, where those of their module are below it together. Zeros before the first other
    value (an adapter that starts at zero) are nothing, and parameters and blocks that have nothing
    else are left to `idle_parameters`.
    """
    modules = _norms_by_module(recorded)
    for norms in (norms for siblings in modules.values() for norms in siblings):
        if _is_frozen(norms):
            continue
        flagged = norms.values < limit
        if norms.info.kind != STEP.name:
            flagged &= _together(modules[_module(norms.info)], norms.steps) < limit
        flagged = bridged(flagged, norms.values < 10 * limit)
        if not _is_of_all(norms.info):
            flagged &= np.logical_or.accumulate(norms.values > 0)
        for episode in episodes(norms, flagged, badness=-norms.values, least=least):
            text = (
                f"{_named(norms)} was below {number(limit)} {episode.when} (as small as"
                f" {number(episode.value)}): hardly anything is learned there."
            )
            yield episode.anomaly("gradient_vanishing", "medium", limit, text)


def idle_parameters(
    recorded: Recorded, *, limit: float = 1e-7, least: int = 3
) -> Iterator[Anomaly]:
    """Parameters and blocks without a gradient to speak of, by design as it seems: low.

    The norm is exactly zero in every recorded step (frozen by what follows, or not used), or it is
    below ``limit`` in most of at least ``least`` recorded steps while other parameters of the
    module have more (a bias before a normalization, whose gradient is rounding noise). One row
    each.
    """
    modules = _norms_by_module(recorded)
    for norms in (norms for siblings in modules.values() for norms in siblings):
        count = len(norms.values)
        if _is_frozen(norms):
            text = f"{_named(norms)} is exactly zero in all {count} recorded steps."
        else:
            others = _together(modules[_module(norms.info)], norms.steps)
            small = int(((norms.values < limit) & (others >= limit)).sum())
            if norms.info.kind == STEP.name or small < least or 2 * small < count:
                continue
            text = (
                f"{_named(norms)} is below {number(limit)} in {small} of {count} recorded steps;"
                " other parameters of the module do have gradients."
            )
        always = np.ones(count, dtype=np.bool_)
        (episode,) = episodes(norms, always, badness=-norms.values)
        yield episode.anomaly("gradient_idle", "low", limit, text)


def _is_norm(info: KeyInfo) -> bool:
    if info.kind == STEP.name:
        return is_total_norm(info)
    return info.kind in _FAMILIES and metric_of(info) == "norm"


def _is_frozen(norms: Series) -> bool:
    zeros: BoolArray = norms.values == 0
    return bool(len(zeros) and zeros.all()) and not _is_of_all(norms.info)


def _is_of_all(info: KeyInfo) -> bool:
    """Whether it is the norm of all gradients together."""
    return is_total_norm(info) and not block_of_norm(info)


def _named(series: Series) -> str:
    clip = " before clipping" if "before_clip" in series.key else ""
    if series.info.kind == STEP.name:
        block = block_of_norm(series.info)
        whose = f"of block {block}" if block else "of all parameters"
        return f"The gradient norm {whose}{clip}"
    return f"The gradient norm of {series.site}{clip}"


def _module(info: KeyInfo) -> tuple[str, str]:
    return info.kind, info.site.rpartition(".")[0]


def _norms_by_module(recorded: Recorded) -> dict[tuple[str, str], list[Series]]:
    """The finite norms of gradients at steps that were not skipped."""
    skipped = skipped_steps(recorded)
    modules: dict[tuple[str, str], list[Series]] = {}
    for series in series_of(recorded, _is_norm):
        modules.setdefault(_module(series.info), []).append(series.without(skipped).finite())
    return modules


def _together(parameters: list[Series], steps: StepArray) -> FloatArray:
    """The norm of the gradients of ``parameters`` together at ``steps``."""
    together = np.zeros(len(steps))
    with np.errstate(over="ignore"):
        for norms in parameters:
            together = np.hypot(together, np.nan_to_num(norms.on(steps)))
    return together


def _scale_at(scale: Series, norms: Series) -> FloatArray:
    """The scale at each step of ``norms``: the last one recorded until then."""
    known = scale.where(np.isfinite(scale.values) & (scale.values > 0))
    if not len(known.steps):
        return np.ones(len(norms.steps))
    places = np.searchsorted(known.steps, norms.steps, side="right") - 1
    scales: FloatArray = known.values[places.clip(min=0)]
    return scales


def _exploding(newest: Newest) -> Ending:
    jumps_now = jumping(newest, factor=_FACTOR, score=_SCORE, window=_WINDOW, least=_LEAST)
    large, counts = newest.values > _LARGE, newest.values > _SMALLEST
    jump = jumps_now.possible
    unsure = jump & counts & ~large & (not newest.has_scaler)  # whose skipped steps do not count
    for place in np.flatnonzero(unsure).tolist():
        first = early_median(newest.series(place).finite().values)
        counts[place] = newest.values[place] > _PART * first
    if newest.skipped_within(_WINDOW + 1):
        jump = counts  # what was skipped is to be left out of the median
    sure = jumps_now.sure & counts & (not newest.has_scaler)  # for large is what the loss says
    return Ending.of(newest, large | (jump & counts), sure, unless_skipped=True)


def _vanishing(newest: Newest) -> Ending:
    small = newest.values < _SMALL
    if not small.any():
        return Ending.of(newest, small)
    together: dict[tuple[str, str], float] = {}
    modules = [_module(newest.info(place)) for place in range(len(small))]
    for module, value in zip(modules, np.nan_to_num(newest.values).tolist(), strict=True):
        together[module] = float(np.hypot(together.get(module, 0.0), value))
    is_small = [module[0] == "step" or together[module] < _SMALL for module in modules]
    return Ending.of(newest, small & np.array(is_small), unless_skipped=True)


EXPLOSIONS_END = (
    EndsWith("gradient_explosion", "critical", _is_norm, _exploding, None, is_total_loss),
)
VANISHING_ENDS = (EndsWith("gradient_vanishing", "medium", _is_norm, _vanishing, _module),)
IDLE_ENDS = (EndsWith("gradient_idle", "low", _is_norm, any_finite, _module),)
