"""What is read of a record beside anomalies: summaries, comparisons, divergence, the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tmm
from tmm.analysis import (
    Anomaly,
    Divergence,
    KeySummary,
    Recorded,
    RecordedSeries,
    compare,
    find_anomalies,
    first_divergence,
    registry,
    summarize,
)
from tmm.analysis.compare import direction_of
from tmm.analysis.order import execution_ranks
from tmm.analysis.recorded import ReadOnce
from tmm.analysis.robust import before, bridged, jumps, runs
from tmm.core.keys import info_of, is_inside, is_loss, is_total_loss, metric_of
from tmm.core.records import ROOT_NAME
from tmm.runtime.store.run_writer import RunWriter

NAN, INF = math.nan, math.inf
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def recorded(**series: Any) -> RecordedSeries:
    """Series from step 0 on; ``__`` in a name is a slash."""
    return RecordedSeries(
        {k.replace("__", "/"): (range(len(v)), list(v)) for k, v in series.items()}
    )


# Records


def test_series_in_memory_are_read_like_a_run() -> None:
    record = RecordedSeries(
        {
            "activation/a/rms": ([1, 3], [1.0, NAN]),
            "loss": ([2, 3], [0.5, 0.25]),
            "activation/a/mean": ([1], [0.0]),
        }
    )
    assert record.steps.tolist() == [1, 2, 3]
    assert record.keys() == ["activation/a/rms", "activation/a/mean", "loss"]
    assert record.keys("l") == ["loss"]
    info = record.key_info("activation/a/mean")
    assert (info.kind, info.site, info.position, metric_of(info)) == ("activation", "a", 0, "mean")
    assert record.key_info("loss").position == 1
    with pytest.raises(KeyError):
        record.series("none")


def test_series_in_memory_say_what_is_wrong_like_a_run() -> None:
    for record in (recorded(loss=[1.0]), ReadOnce(recorded(loss=[1.0]))):
        with pytest.raises(KeyError, match="no key 'los'; nearest: \\['loss'\\]"):
            record.key_info("los")
        with pytest.raises(ValueError, match="pattern '\\['"):
            record.keys("[")


@pytest.mark.parametrize(
    ("series", "words"),
    [(([0, 1], [1.0]), "shape"), (([1, 1], [0.0, 0.0]), "increase"), (([[1]], [[1.0]]), "shape")],
)
def test_series_that_cannot_be_are_refused(series: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"'loss'.*{words}"):
        RecordedSeries({"loss": series})


def test_a_run_on_disk_and_its_series_in_memory_say_the_same(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    tmm.instrument(model, tmm.Spec(tmm.activation("rms")), run=tmp_path)
    monitor = tmm.monitor(model)
    for step in range(3):
        with monitor.step(step):
            monitor.log_scalar("train/loss", model(torch.randn(8, 4)).square().mean())
    tmm.remove(model)
    with tmm.open_run(tmp_path) as run:
        memory = RecordedSeries({key: run.series(key) for key in run.keys()})  # noqa: SIM118
        assert memory.keys() == run.keys()
        for key in memory.keys():  # noqa: SIM118
            mine, its = memory.key_info(key), run.key_info(key)
            assert (mine.kind, mine.site) == (its.kind, its.site)
            assert metric_of(mine) == metric_of(its)
        assert summarize(run) == summarize(memory)
        assert find_anomalies(run) == find_anomalies(memory) == ()
        assert first_divergence(run, memory) is None


def test_a_view_reads_each_series_once_and_stays_as_it_is() -> None:
    reads = []

    class Counting(RecordedSeries):
        def series(self, key: str) -> Any:
            reads.append(key)
            return super().series(key)

    view = ReadOnce(Counting({"loss": ([0], [1.0])}))
    assert view.series("loss")[1] is view.series("loss")[1]
    assert reads == ["loss"]
    with pytest.raises(ValueError, match="read-only"):
        view.series("loss")[1][0] = 2.0


# Names and order


@pytest.mark.parametrize("key", ["loss", "train/loss", "val_loss", "loss.total", "Loss/train"])
def test_losses_are_known_by_name(key: str) -> None:
    assert is_loss(info_of(key))
    assert is_total_loss(info_of(key))


@pytest.mark.parametrize(
    "key",
    ["loss_scale", "gloss", "activation/loss/rms", "attention_entropy/loss.head_0", "closs/lr"],
)
def test_what_is_no_loss(key: str) -> None:
    assert not is_loss(info_of(key))


def test_terms_of_a_loss_are_no_totals() -> None:
    assert is_loss(info_of("kl_loss"))
    assert not is_total_loss(info_of("kl_loss"))
    assert is_total_loss(info_of("trainLoss"))


def test_what_lies_inside_of_what() -> None:
    assert is_inside("blocks.0.mlp", "blocks.0")
    assert is_inside("blocks.0.mlp", "blocks.0[1]")
    assert is_inside("blocks.0", ROOT_NAME)
    assert not is_inside("blocks.01", "blocks.0")
    assert not is_inside("blocks.0", "blocks.0")
    assert not is_inside(ROOT_NAME, ROOT_NAME)


def test_values_of_a_step_in_the_order_in_which_they_come_about() -> None:
    keys = (
        *("activation_gradient/a/rms", "activation_gradient/b/rms"),
        *("activation/a/rms", "gate", "activation/b/rms", f"activation/{ROOT_NAME}/rms"),
        *("parameter/a.weight/rms", "update/a.weight/norm"),
        *("step/gradient_norm", "gradient/a.weight/norm", "gradient/b.weight/norm"),
        *("loss", "system/process_memory"),
    )
    ranks = execution_ranks(RecordedSeries({key: ([], []) for key in keys}))
    assert sorted(keys, key=lambda key: ranks[key]) == [
        *("activation/a/rms", "gate", "activation/b/rms", f"activation/{ROOT_NAME}/rms"),
        *("loss", "activation_gradient/b/rms", "activation_gradient/a/rms"),
        *("gradient/b.weight/norm", "gradient/a.weight/norm", "step/gradient_norm"),
        *("update/a.weight/norm", "parameter/a.weight/rms", "system/process_memory"),
    ]


# Statistics


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.integers(1, 12), st.integers(1, 5))
def test_medians_and_spreads_are_of_what_came_before(
    values: list[float], window: int, least: int
) -> None:
    medians, spreads = before(np.array(values), window, least)
    for place in range(len(values)):
        past = np.array(values[max(place - window, 0) : place])
        if len(past) < least:
            assert math.isnan(medians[place])
            assert math.isnan(spreads[place])
        else:
            assert medians[place] == pytest.approx(np.median(past))
            spread = 1.4826 * np.median(np.abs(past - np.median(past)))
            assert spreads[place] == pytest.approx(spread)


def test_jumps_of_a_constant_series() -> None:
    values = np.array([2.0] * 10 + [19.0, 21.0, 0.0, NAN, INF, 2.0])
    flagged, usual = jumps(values, factor=10, score=8, window=50, least=10)
    assert np.flatnonzero(flagged).tolist() == [11]
    assert usual[11] == pytest.approx(2.0)
    assert np.isnan(usual[12:15]).all()


@given(st.lists(st.booleans(), max_size=20), st.lists(st.booleans(), min_size=20, max_size=20))
def test_runs_and_bridges(flags: list[bool], lasting: list[bool]) -> None:
    flagged, holds = np.array(flags, dtype=bool), np.array(lasting[: len(flags)], dtype=bool)
    found = list(runs(flagged))
    covered = [place for places in found for place in range(places.start, places.stop)]
    assert covered == np.flatnonzero(flagged).tolist()
    joined = bridged(flagged, holds)
    assert (joined >= flagged).all()
    assert (joined <= (flagged | holds)).all()
    assert (bridged(joined, holds) == joined).all()


# Summaries


def test_a_summary_is_of_the_finite_values() -> None:
    record = RecordedSeries({"loss": ([3, 5, 6, 9], [2.0, NAN, -1.0, INF]), "none": ([0], [NAN])})
    first, second = summarize(record)
    assert first == KeySummary("loss", 4, 2, 2.0, -1.0, -1.0, 6, 2.0, 3, 0.5)
    assert second == KeySummary("none", 1, 1)
    assert [found.key for found in summarize(record, "no")] == ["none"]
    assert summarize(recorded(a=[1.7e308, 1.7e308]))[0].mean == pytest.approx(1.7e308)


# Comparisons


def test_runs_are_compared_on_the_steps_that_they_share() -> None:
    comparison = compare(
        {
            "slow": RecordedSeries({"loss": ([0, 1, 2], [3, 2, 1]), "accuracy": ([2], [0.5])}),
            "fast": RecordedSeries({"loss": ([0, 2, 4], [3, 0.5, 0.1]), "accuracy": ([2], [0.9])}),
            "lost": RecordedSeries({"loss": ([0, 2], [3, NAN]), "width": ([0], [8])}),
        }
    )
    loss = comparison.metric("loss")
    assert loss.steps.tolist() == [0, 2]
    assert len(loss.steps) == 2
    assert loss.values["fast"].tolist() == [3, 0.5]
    assert (loss.final["slow"], loss.final["fast"]) == (1, 0.1)
    assert loss.best == "fast"
    assert comparison.metric("accuracy").best == "fast"
    with pytest.raises(KeyError, match="width"):
        comparison.metric("width")


def test_directions_ties_and_keys() -> None:
    runs = {"a": recorded(speed=[2.0], loss=[1.0]), "b": recorded(speed=[1.0], loss=[1.0])}
    assert compare(runs).metric("speed").best is None
    assert compare(runs).metric("loss").best is None
    chosen = compare(runs, ["speed"], {"speed": "min"})
    assert [metric.key for metric in chosen.metrics] == ["speed"]
    assert chosen.metric("speed").best == "b"
    assert compare({"a": runs["a"]}).metric("loss").best == "a"
    assert compare({}).metrics == ()
    with pytest.raises(KeyError, match="none"):
        compare(runs, ["none"])
    with pytest.raises(ValueError, match="'up'"):
        compare(runs, directions={"speed": "up"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "direction"),
    [
        *[("val_loss", "min"), ("val/acc", "max"), ("acc1", "max"), ("macroF1", "max")],
        *[("AUC", "max"), ("mean_reward", "max"), ("accumulated", None), ("lr", None)],
        ("activation/reward/rms", None),
    ],
)
def test_directions_by_name(key: str, direction: str | None) -> None:
    assert direction_of(info_of(key)) == direction


def test_differences_of_configurations() -> None:
    configs: dict[str, dict[str, object]] = {
        "a": {"lr": 0.1, "model": {"width": 8, "depth": 2, "bias": True}, "seed": NAN},
        "b": {"lr": 0.1, "model": {"width": 16, "depth": 2, "bias": 1}, "seed": NAN, "extra": []},
    }
    found = compare({}, configs=configs).configuration
    assert found == {
        "model.width": {"a": 8, "b": 16},
        "model.bias": {"a": True, "b": 1},
        "extra": {"b": []},
    }


# Divergence


def test_the_first_difference_in_the_order_of_execution() -> None:
    keys = ["activation_gradient/a/rms", "activation/a/rms", "activation/b/rms", "loss"]
    a = RecordedSeries({key: ([0, 2, 4], [1.0, 1.0, 1.0]) for key in keys})
    b = RecordedSeries({key: ([0, 2, 4], [1.05, 2.0, 9.0]) for key in reversed(keys)})
    found = first_divergence(a, b)
    assert found == Divergence(
        2,
        "activation/a/rms",
        "a",
        1.0,
        2.0,
        ("activation/b/rms", "loss", "activation_gradient/a/rms"),
    )
    assert first_divergence(b, a, keys=["loss"]) == Divergence(2, "loss", "loss", 2.0, 1.0, ())
    assert first_divergence(a, b, relative=10) is None
    assert first_divergence(a, a) is None
    with pytest.raises(KeyError):
        first_divergence(a, b, keys=["none"])


@pytest.mark.parametrize(
    ("left", "right", "differ"),
    [
        *[(NAN, 1.0, True), (NAN, NAN, False), (INF, INF, False), (INF, -INF, True)],
        *[(INF, 1e308, True), (1e308, -1e308, True), (0.0, 1e-9, False), (-2.0, -3.0, True)],
        *[(-2.0, -2.1, False), (NAN, INF, True)],
    ],
)
def test_what_differs(left: float, right: float, differ: bool) -> None:
    a, b = recorded(loss=[left]), recorded(loss=[right])
    assert (first_divergence(a, b) is not None) == differ
    assert first_divergence(a, b) == first_divergence(a, b)


def test_steps_and_keys_of_one_run_only_are_no_difference() -> None:
    a = RecordedSeries({"loss": ([0, 1], [1.0, 5.0]), "mine": ([0], [1.0])})
    b = RecordedSeries({"loss": ([0, 2], [1.0, 9.0]), "system/process_memory": ([0], [9.0])})
    assert first_divergence(a, b) is None
    memory = RecordedSeries({"system/process_memory": ([0], [1.0])})
    assert first_divergence(memory, b) is None


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=8), st.lists(NUMBERS, max_size=8))
def test_anything_can_be_summed_up_and_compared(left: list[float], right: list[float]) -> None:
    a, b = recorded(loss=left, other=right), recorded(loss=right)
    assert summarize(a) == summarize(a)
    assert first_divergence(a, b) == first_divergence(a, b)
    assert len(compare({"a": a, "b": b}).metric("loss").steps) == min(len(left), len(right))


# The registry


class Offer:
    """An entry point as another package has it."""

    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self._found = name, f"package:{name}", found

    def load(self) -> Any:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def constant_losses(record: Recorded) -> Iterator[Anomaly]:
    for key in record.keys("loss"):
        yield Anomaly("constant", "high", 7, 7, key, key, NAN, 0.0, "The loss is constant.")


def failing(record: Recorded) -> Iterator[Anomaly]:
    yield from constant_losses(record)
    raise RuntimeError("no luck")


def test_detectors_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [
        *[Offer("broken", ImportError("no module")), Offer("failing", failing)],
        Offer("good", constant_losses),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: offers)
    record = recorded(loss=[1.0] * 10 + [NAN])
    with pytest.warns(UserWarning, match="the detector") as warned:
        found = find_anomalies(record)
    texts = [str(warning.message) for warning in warned]
    assert any("'broken'" in text and "no module" in text for text in texts)
    assert any("'failing'" in text and "no luck" in text for text in texts)
    assert [anomaly.kind for anomaly in found] == ["nonfinite", "constant"]


def test_the_worst_comes_first_then_the_earliest() -> None:
    def detector(record: Recorded) -> Iterator[Anomaly]:
        for severity, step in (("low", 0), ("high", 5), ("high", 2), ("critical", 9), ("high", 2)):
            yield Anomaly("x", severity, step, step, "loss", "loss", NAN, 0.0, "")  # type: ignore[arg-type]

    found = find_anomalies(recorded(loss=[1.0]), [("mine", detector)])
    order = [(anomaly.severity, anomaly.step) for anomaly in found]
    assert order == [("critical", 9), ("high", 2), ("high", 5), ("low", 0)]
    assert found == find_anomalies(recorded(loss=[1.0]), [("mine", detector)])


def test_an_unknown_severity_is_refused() -> None:
    with pytest.raises(ValueError, match="'bad'"):
        Anomaly("x", "bad", 0, 0, "loss", "loss", 0.0, 0.0, "")  # type: ignore[arg-type]


def test_a_run_without_steps_has_nothing_to_say(tmp_path: Path) -> None:
    RunWriter(tmp_path, info={}).close()
    with tmm.open_run(tmp_path) as run:
        assert find_anomalies(run) == ()
        assert summarize(run) == ()
