"""The built-in metrics, as arithmetic on partial sums that merge exactly.

A tensor is reduced to a short row of *columns* (count, sum, sum of squares, ...). Rows of several
calls, micro-batches or ranks merge into the row of the joined data, and only then is a metric
computed from it. Everything here is numpy in float64; the reduction of tensors to rows is in
``tmm.kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

Columns: TypeAlias = dict[str, FloatArray]
"""Column name to an array of shape ``(rows,)``."""

MetricFunction: TypeAlias = Callable[..., object]
"""A user's metric: a detached tensor in, a scalar or a tensor out."""

AggregateName: TypeAlias = Literal["mean", "sum", "min", "max", "norm"]
Aggregate: TypeAlias = AggregateName | Callable[..., object]

TENSOR_COLUMNS = (
    "count",
    "sum",
    "sum_squares",
    "sum_absolute",
    "mean",
    "moment2",
    "moment3",
    "moment4",
    "absmax",
    "minimum",
    "maximum",
    "zeros",
    "nans",
    "infinities",
)
"""The columns that are computed from one tensor, in the order in which a row holds them.

``mean`` and ``moment2`` to ``moment4`` (sums of powers of the deviation from that mean) describe
one another and merge together, without the cancellation of raw power sums.
"""

PAIR_COLUMNS = ("reference_sum_squares", "own_sum_squares", "dot")
"""Columns that need the tensor that is compared with a reference, and the reference."""

COLUMN_ORDER = (*TENSOR_COLUMNS, *PAIR_COLUMNS)
"""Every column, in order."""

COLUMN_SEPARATOR = ","
"""Between columns where they are one argument of an operator."""

_POWERS_OF_TWO = np.exp2(np.arange(-40, 17, dtype=np.float64))
HISTOGRAM_EDGES: FloatArray = np.concatenate(
    [[-np.inf], -_POWERS_OF_TWO[::-1], _POWERS_OF_TWO, [np.inf]]
)
"""Edges of the bins of ``histogram``, shape ``(116,)``: powers of two from 2⁻⁴⁰ to 2¹⁶ of each
sign. Bin *i* counts values in ``[edges[i], edges[i+1])``; the last bin holds +inf, NaN is in none.
"""
HISTOGRAM_EDGES.setflags(write=False)


@dataclass(frozen=True)
class Metric:
    """A built-in metric.

    ``columns`` are the partial sums it is computed from and ``value`` computes it, for all rows at
    once; it may read further columns that happen to be there. ``ordered`` metrics need an order
    or a sign, which complex numbers do not have. ``may_be_undefined`` tells that it may be NaN or
    infinite for finite tensors, ``is_bounded`` that pictures show it on a linear scale, whatever
    its values.
    """

    columns: tuple[str, ...]
    value: Callable[[Columns], FloatArray]
    ordered: bool = False
    may_be_undefined: bool = False
    is_bounded: bool = False


@dataclass(frozen=True)
class StateMetric(Metric):
    """A metric of what optimizers keep of a parameter.

    ``kept`` is its name in their ``state``; empty for what is computed from several.
    """

    kept: str = ""


# NaN exactly when the data held one. Sums are not among them: inf - inf is NaN as well.
_NAN_CARRIERS = ("sum_squares", "sum_absolute", "absmax", "minimum", "maximum")


def _or_nan(values: FloatArray, columns: Columns) -> FloatArray:
    """NaN where the data held a NaN, which these columns do not carry by themselves."""
    for name in _NAN_CARRIERS:
        if name in columns:
            return np.where(np.isnan(columns[name]), np.nan, values)
    return np.where(columns["nans"] > 0, np.nan, values)


def _std(columns: Columns) -> FloatArray:
    variance = columns["moment2"] / (columns["count"] - 1)  # 0/0 for one element, as torch.std
    return np.sqrt(np.maximum(variance, 0.0))


def _kurtosis(columns: Columns) -> FloatArray:
    variance = columns["moment2"] / columns["count"]
    # A constant leaves rounding noise in its moments, whose quotient would look like a kurtosis.
    constant = variance <= (1e-12 * columns["mean"]) ** 2
    return np.where(constant, np.nan, columns["moment4"] / columns["count"] / variance**2)


METRICS: Mapping[str, Metric] = {
    "mean": Metric(("sum",), lambda c: c["sum"] / c["count"], ordered=True),
    "std": Metric(("mean", "moment2"), _std, may_be_undefined=True),
    "rms": Metric(("sum_squares",), lambda c: np.sqrt(c["sum_squares"] / c["count"])),
    "norm": Metric(("sum_squares",), lambda c: np.sqrt(c["sum_squares"])),
    "mean_abs": Metric(("sum_absolute",), lambda c: c["sum_absolute"] / c["count"]),
    "absmax": Metric(("absmax",), lambda c: c["absmax"]),
    "min": Metric(("minimum",), lambda c: c["minimum"], ordered=True),
    "max": Metric(("maximum",), lambda c: c["maximum"], ordered=True),
    "zero_fraction": Metric(
        ("zeros",), lambda c: _or_nan(c["zeros"] / c["count"], c), is_bounded=True
    ),
    "nan_count": Metric(("nans",), lambda c: c["nans"]),
    "inf_count": Metric(("infinities",), lambda c: c["infinities"]),
    "kurtosis": Metric(("mean", "moment2", "moment3", "moment4"), _kurtosis, may_be_undefined=True),
}
"""The scalar built-in metrics; ``histogram`` is the one that is not a scalar."""

HISTOGRAM = "histogram"
METRIC_NAMES = (*METRICS, HISTOGRAM)

_norm, _mean = METRICS["norm"], METRICS["mean"]
STATE_METRICS: Mapping[str, StateMetric] = {
    "exp_avg_norm": StateMetric(_norm.columns, _norm.value, kept="exp_avg"),
    "exp_avg_sq_norm": StateMetric(_norm.columns, _norm.value, kept="exp_avg_sq"),
    "effective_lr": StateMetric(_mean.columns, _mean.value, may_be_undefined=True),
}
"""Metrics of the state of an optimizer."""

ALIGNMENT = "alignment"
"""The metric of an update that is taken of it and of the parameter before."""


_cosine = Metric(
    PAIR_COLUMNS,
    lambda c: c["dot"] / np.sqrt(c["own_sum_squares"] * c["reference_sum_squares"]),
    may_be_undefined=True,
    is_bounded=True,
)

DERIVED_METRICS: Mapping[str, Metric] = {
    "relative_norm": Metric(
        ("sum_squares", "reference_sum_squares"),
        lambda c: np.sqrt(c["sum_squares"] / c["reference_sum_squares"]),
        may_be_undefined=True,
    ),
    "cosine": _cosine,
    ALIGNMENT: _cosine,
    "l2": _mean,
    "l2norm": _mean,
    **STATE_METRICS,
}
"""Metrics of single families: of differences and updates, and of the state of an optimizer.

``l2`` and ``l2norm`` are means of the 2-norms of the rows (the last dimension) of a tensor.
"""

_bounded_mean = replace(_mean, is_bounded=True)
ATTENTION_METRICS: Mapping[str, Metric] = {
    "entropy": _bounded_mean,
    "normalized_entropy": _bounded_mean,
    "max_logit": Metric(("maximum",), lambda c: c["maximum"]),
    "logsumexp": _mean,
    "max_probability": _bounded_mean,
    "sink_mass": _bounded_mean,
}
"""What is measured of the distributions of an attention head: means over its queries, and the
largest logit. Each is a family of its own, so that the name of the metric is not in a key twice.
"""

ROW_NORMS = ("l2", "l2norm")

MEANS = (*("mean", "mean_abs", "rms", "zero_fraction", "relative_norm", "cosine", *ROW_NORMS),)
"""Metrics that are means over elements, or quotients and roots of such: a part of the elements
estimates them."""

_ALL_METRICS: Mapping[str, Metric] = {**METRICS, **DERIVED_METRICS, **ATTENTION_METRICS}
BOUNDED = tuple(n for n, m in {**METRICS, **DERIVED_METRICS}.items() if m.is_bounded)
BOUNDED_OF_ATTENTION = tuple(n for n, m in ATTENTION_METRICS.items() if m.is_bounded)
UNDEFINED = (*(n for n, m in _ALL_METRICS.items() if m.may_be_undefined), HISTOGRAM)
"""Metrics that are NaN or infinite for finite tensors, too."""

_OF_OTHER_TENSORS = (ALIGNMENT, *STATE_METRICS, *ROW_NORMS, *ATTENTION_METRICS)

AGGREGATE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "mean": ("count", "sum"),
    "sum": ("count", "sum"),
    "min": ("count", "minimum"),
    "max": ("count", "maximum"),
    "norm": ("count", "sum_squares"),
}
"""The columns of rows of values that are joined so."""

AGGREGATE_NAMES = ("mean", "sum", "min", "max")
"""Those that users may ask for; ``norm``, the root of the sum of squares, joins parts of norms."""


@dataclass(frozen=True)
class Reduction:
    """What is computed together from one tensor: built-in metrics, or one user function.

    ``columns`` are the partial sums of a row, in order. They are empty for a callable
    ``aggregate``, which needs all the values, and for ``histogram``, whose row is the count of
    elements and then the bins. How a function is run makes no difference to what it is: without
    ``trace`` eagerly, with ``falls_back`` eagerly where it cannot be traced.
    """

    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    function: MetricFunction | None = None
    aggregate: Aggregate = "mean"
    trace: bool = field(default=True, compare=False)
    falls_back: bool = field(default=False, compare=False)

    @property
    def is_histogram(self) -> bool:
        """Whether a row is the bins of a histogram."""
        return self.function is None and self.metrics == (HISTOGRAM,)

    @property
    def is_row_norm(self) -> bool:
        """Whether a row holds sums over the 2-norms of the tensor's rows."""
        return self.function is None and self.metrics[0] in ROW_NORMS

    @property
    def is_of_attention(self) -> bool:
        """Whether a row describes the distributions of an attention head."""
        return self.function is None and self.metrics[0] in ATTENTION_METRICS

    @property
    def width(self) -> int:
        """Number of float64 values in a row; the first is always the count of elements."""
        return len(HISTOGRAM_EDGES) if self.is_histogram else len(self.columns)

    @property
    def collects_values(self) -> bool:
        """Whether all values are kept until the end of the step, for a callable aggregate."""
        return self.function is not None and not isinstance(self.aggregate, str)

    @property
    def leaves_whole(self) -> bool:
        """Whether a graph hands out a tensor of its own instead of a row."""
        return self.collects_values or not self.trace

    @property
    def aggregate_name(self) -> str:
        """The aggregate as text, for the metadata of a key."""
        if self.function is None:
            return "joined"
        if isinstance(self.aggregate, str):
            return self.aggregate
        return getattr(self.aggregate, "__name__", type(self.aggregate).__name__)


def builtin_reductions(names: tuple[str, ...], *, is_complex: bool) -> tuple[Reduction, ...]:
    """Reductions that compute the built-in metrics ``names`` of a real or complex tensor.

    One row serves all the scalars; a histogram has a row of its own. Metrics that complex numbers
    do not have are left out.
    """
    scalars = tuple(
        n for n in names if n != HISTOGRAM and not (is_complex and _ALL_METRICS[n].ordered)
    )
    reductions: list[Reduction] = []
    # What is taken of other tensors than the rest has a row of its own.
    apart = tuple(name for name in scalars if name in _OF_OTHER_TENSORS)
    scalars = tuple(name for name in scalars if name not in apart)
    reductions += [
        Reduction(
            (name,), tuple(c for c in COLUMN_ORDER if c in ("count", *_ALL_METRICS[name].columns))
        )
        for name in apart
    ]
    if scalars:
        needed = {"count"}.union(*(_ALL_METRICS[name].columns for name in scalars))
        if "zero_fraction" in scalars and needed.isdisjoint(_NAN_CARRIERS):
            needed.add("nans")
        columns = tuple(name for name in COLUMN_ORDER if name in needed)
        reductions.append(Reduction(scalars, columns))
    if HISTOGRAM in names:
        reductions.append(Reduction((HISTOGRAM,), ()))
    return tuple(reductions)


def function_reduction(
    name: str,
    function: MetricFunction,
    aggregate: Aggregate,
    *,
    trace: bool = True,
    falls_back: bool = False,
) -> Reduction:
    """Reduction of a user function's values to the row that ``aggregate`` needs."""
    columns = AGGREGATE_COLUMNS[aggregate] if isinstance(aggregate, str) else ()
    return Reduction((name,), columns, function, aggregate, trace, falls_back)


_KNOWN: Mapping[str, Metric] = {
    **{name: METRICS[name] for name in ("mean", "mean_abs", "std", "rms", "norm")},
    **{name: METRICS[name] for name in ("absmax", "min", "max")},
    "sum": Metric(("sum",), lambda c: c["sum"]),
    "mean_square": Metric(("sum_squares",), lambda c: c["sum_squares"] / c["count"]),
    "variance": Metric(("mean", "moment2"), lambda c: c["moment2"] / (c["count"] - 1)),
    "zero_fraction": Metric(("zeros",), lambda c: c["zeros"] / c["count"]),  # NaN is not zero
}


@dataclass(frozen=True)
class KnownMetric:
    """What a user's function computes, if that follows from partial sums.

    ``name`` is one of ``_KNOWN``. With a ``row_length`` the function gives the mean of each row of
    so many elements instead of one number.
    """

    name: str
    row_length: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The partial sums that it is computed from."""
        needed = ("count", *_KNOWN[self.name].columns)
        return tuple(column for column in COLUMN_ORDER if column in needed)

    def can_serve(self, reduction: Reduction) -> bool:
        """Whether ``reduction`` joins the function's values in a way that its sum is enough for."""
        joins = ("mean", "sum") if self.row_length else AGGREGATE_NAMES
        return reduction.aggregate in joins

    def rows(self, reduction: Reduction, rows: FloatArray) -> FloatArray:
        """The rows of ``reduction``, of the function's values, from rows of ``columns``.

        Each row is that of one call.
        """
        columns = {name: rows[:, index] for index, name in enumerate(self.columns)}
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            values = _KNOWN[self.name].value(columns)
        if self.row_length:
            count = columns["count"] / self.row_length
            return np.stack([count, values * count], axis=1)
        return np.stack([np.ones_like(values), values], axis=1)


def finalize(reduction: Reduction, rows: FloatArray) -> FloatArray:
    """Values of the metrics of rows with at least one element.

    The shape is ``(rows, metrics)``; of a histogram it is ``(rows, bins)``.
    """
    if reduction.is_histogram:
        return rows[:, 1:].copy()  # rows may be a view of what a graph gave
    columns = _split(reduction, rows)
    values = np.empty((len(rows), len(reduction.metrics)))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if reduction.function is None:
            for index, name in enumerate(reduction.metrics):
                values[:, index] = _ALL_METRICS[name].value(columns)
        elif reduction.aggregate == "mean":
            values[:, 0] = columns["sum"] / columns["count"]
        else:
            values[:, 0] = columns[reduction.columns[1]]
    return values


def _split(reduction: Reduction, rows: FloatArray) -> Columns:
    return {name: rows[:, index] for index, name in enumerate(reduction.columns)}
