"""Alerts: what `tmm anomalies` would find, said at the step where it happens, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tmm
from tmm.analysis import Anomaly, Recorded, RecordedSeries, find_anomalies, registry
from tmm.analysis.detectors.nonfinite_values import nonfinite
from tmm.analysis.recent import RecentSeries
from tmm.analysis.registry import ENDINGS
from tmm.core.keys import info_of
from tmm.core.records import StepRecord, Table
from tmm.spec.alert_settings import AlertSettings
from tmm.spec.alerts import Alerts


def records(series: dict[str, Sequence[float]]) -> list[StepRecord]:
    infos = tuple(info_of(key, place) for place, key in enumerate(series))
    rows = np.array(list(series.values()), dtype=np.float64).T
    return [StepRecord(step, (Table(infos, row),)) for step, row in enumerate(rows)]


def alerts_of(series: dict[str, Sequence[float]], alerts: object = True) -> list[Anomaly]:
    built = AlertSettings.build(alerts, "warn")  # type: ignore[arg-type]
    assert built is not None
    looking = Alerts(built)
    found = []
    for record in records(series):
        new = looking.look_at(record)
        assert all(anomaly.last_step == record.step for anomaly in new)
        found.extend(new)
    return found


def whole(series: dict[str, Sequence[float]]) -> set[tuple[str, str]]:
    recorded = RecordedSeries({key: (range(len(v)), v) for key, v in series.items()})
    return {
        (anomaly.kind, anomaly.key)
        for anomaly in find_anomalies(recorded)
        if anomaly.severity != "low"
    }


def noise(count: int, level: float = 1.0, seed: int = 0) -> np.ndarray:
    return level * np.exp(0.05 * np.random.default_rng(seed).standard_normal(count))


def test_alerts_come_at_the_step_and_are_those_of_the_whole_record() -> None:
    count = 120
    series: dict[str, Sequence[float]] = {
        "activation/0/rms": noise(count, seed=1),
        "activation/0/zero_fraction": np.where(np.arange(count) < 40, 0.4, 0.995),
        "activation/1/rms": np.where(np.arange(count) < 70, noise(count, seed=2), 40.0),
        "activation/1/nan_count": (np.arange(count) >= 100).astype(float),
        "loss": np.where(np.arange(count) == 60, 30.0, noise(count, seed=3)),
        "gradient/0.weight/norm": np.where(np.arange(count) == 50, 500.0, noise(count, seed=4)),
        "update/0.weight/relative_norm": np.where(np.arange(count) < 80, 1e-3, 0.5),
    }
    found = alerts_of(series)
    assert {(anomaly.kind, anomaly.key) for anomaly in found} == whole(series)
    when = {anomaly.kind: anomaly.last_step for anomaly in found}
    assert when == {
        "dead_units": 44,  # five in a row
        "gradient_explosion": 50,
        "loss_spike": 60,
        "activation_explosion": 70,
        "update_large": 80,  # all weights, which are one
        "nonfinite": 100,
    }
    assert len(found) == len(when)  # each episode once


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_series_gives_the_alerts_of_its_whole_record(data: st.DataObject) -> None:
    # Detectors that judge the first values by later ones, such as a median, are left out.
    count = data.draw(st.integers(1, 120))
    jumps = st.dictionaries(
        st.integers(0, count - 1), st.sampled_from([0.0, 1e-9, 30.0, 2e3, np.nan, np.inf])
    )
    keys = (
        "activation/a/rms",
        "activation/a/absmax",
        "gradient/a.weight/norm",
    )
    series: dict[str, Sequence[float]] = {}
    for place, key in enumerate(keys):
        values = noise(count, seed=place)
        for where, value in data.draw(jumps).items():
            values[where] = value
        series[key] = values
    causal = ["nonfinite", "exploding_gradients", "exploding_activations"]
    found = {(anomaly.kind, anomaly.key) for anomaly in alerts_of(series, causal)}
    kinds = {"gradient_explosion", "activation_explosion"}
    assert {known for known in found if known[0] in kinds} == {
        known for known in whole(series) if known[0] in kinds
    }
    # From one tensor to the next it is one episode, that began where the whole record says.
    assert found <= whole(series)
    assert ("nonfinite" in dict(found)) == ("nonfinite" in dict(whole(series)))


def test_what_ends_and_begins_again_is_said_again() -> None:
    values = np.ones(30)
    values[[5, 6, 7, 20, 21]] = np.nan
    found = alerts_of({"loss": values})
    assert [anomaly.step for anomaly in found] == [5, 20]


def test_an_episode_that_pauses_is_said_once() -> None:
    values = np.ones(40)
    values[10:] = np.where(np.arange(30) % 2, 150.0, 80.0)  # about the limit of 100
    found = alerts_of({"gradient/a.weight/norm": values}, ["exploding_gradients"])
    assert len(found) == 1


def test_a_long_training_says_nothing_twice() -> None:
    values = np.where(np.arange(1500) < 100, noise(1500), 5e3)
    assert len(alerts_of({"activation/a/rms": values}, ["activation_outliers"])) == 1


def test_the_severity_can_be_chosen() -> None:
    values = np.where(np.arange(40) < 20, noise(40), 500.0)
    assert alerts_of({"gradient/a.weight/norm": values}, "high")
    assert not alerts_of({"gradient/a.weight/norm": values}, "critical")
    values[30:] = 5e3
    (critical,) = alerts_of({"gradient/a.weight/norm": values}, "critical")
    assert critical.last_step == 30


def test_own_detectors_are_asked() -> None:
    def odd(recorded: Recorded) -> list[Anomaly]:
        step = int(recorded.steps[-1])
        if step != 7:
            return []
        return [Anomaly("odd", "high", step, step, "loss", "loss", 1.0, 0.0, "It is odd.")]

    (found,) = alerts_of({"loss": np.ones(10)}, [odd])
    assert (found.kind, found.step) == ("odd", 7)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=600))
@settings(max_examples=50, deadline=None)
def test_recent_values_are_the_first_and_the_newest(steps: list[int]) -> None:
    recent = RecentSeries()
    kept: dict[int, float] = {}
    info = info_of("loss")
    for place, step in enumerate(steps):
        recent.add(StepRecord(step, (Table((info,), np.array([float(place)])),)))
        kept = {known: value for known, value in kept.items() if known < step} | {step: place}
        got_steps, got = recent.series("loss")
        expected = sorted(kept.items())
        pairs = list(zip(got_steps.tolist(), got.tolist(), strict=True))
        assert pairs[:16] == expected[:16] or len(expected) > 280
        assert pairs[-200:] == expected[-200:] or len(expected) > 280


def test_recent_values_are_bounded() -> None:
    recent, infos = RecentSeries(), (info_of("loss"),)
    for step in range(5000):
        recent.add(StepRecord(step, (Table(infos, np.array([float(step)])),)))
        steps, values = recent.series("loss")
        assert steps.tolist() == values.tolist()
        assert len(steps) <= 280
        assert steps[:16].tolist() == list(range(min(16, step + 1)))
        assert steps[-200:].tolist() == list(range(max(0, step - 199), step + 1))


class WholeAlerts(Alerts):
    """The same by the whole detectors, which look at everything that is remembered."""

    def look_at(self, record: StepRecord) -> tuple[Anomaly, ...]:
        self._recent.add(record)
        step = record.step
        detectors = [
            (name, partial(nonfinite, since=step) if detector is nonfinite else detector)
            for name, detector in self.settings.detectors
        ]
        found = find_anomalies(self._recent, detectors)
        heard = {
            (anomaly.kind, anomaly.key): anomaly
            for anomaly in reversed(found)
            if anomaly.last_step == step and self._counts(anomaly.severity)
        }
        new = tuple(
            anomaly
            for anomaly in found
            if heard.get((anomaly.kind, anomaly.key)) is anomaly and self._is_new(anomaly)
        )
        measured = set(self._recent.keys())
        self._active = {known for known in self._active if known[1] not in measured} | heard.keys()
        self._seen |= dict.fromkeys(heard, step)
        return new


USUAL = {
    "activation/a/rms": 1.0,
    "activation/a/absmax": 1.0,
    "activation/a.b/rms": 1.0,
    "activation/a/nan_count": 0.0,
    "activation/a/inf_count": 0.0,
    "activation/a.b/min": 1.0,
    "activation/a.b/max": 1.0,
    "activation/c/own": 1.0,
    "activation/a.b/kurtosis": 3.0,
    "activation/a.b/zero_fraction": 0.3,
    "value": 1.0,
    "attention_entropy/a.head_0": 2.0,
    "attention_normalized_entropy/a.head_1": 0.7,
    "attention_max_logit/a.head_0": 2.0,
    "loss": 2.0,
    "kl_loss": 1.0,
    "activation_gradient/a/rms": 1.0,
    "gradient/c.weight/norm": 1.0,
    "gradient/c.bias/norm": 1.0,
    "gradient_before_clip/a.weight/norm": 1.0,
    "step/gradient_norm": 1.0,
    "step/gradient_norm/0": 1.0,
    "parameter/c.weight/rms": 1.0,
    "update/c.weight/relative_norm": 0.001,
    "update/c.bias/relative_norm": 0.001,
    "system/process_memory": 1000000000.0,
    "step/skipped": 0.0,
    "step/grad_scale": 1024.0,
}
UNUSUAL = (
    *(0.0, 1e-12, 1e-8, 5e-7, 0.01, 0.05, 0.15, 0.85, 0.95, 0.992, 0.999, 1.0, 3.0, 12.0, 30.0),
    *(60.0, 80.0, 120.0, 300.0, 2e3, 2e4, float("nan"), float("inf"), float("-inf")),
)


def sick_series(random: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Series of which many are unusual for a while, once or again and again."""
    keys = [key for key in USUAL if random.random() < 0.6]
    if random.random() < 0.5:
        keys = [key for key in keys if key not in ("step/skipped", "step/grad_scale")]
    series = {}
    for key in keys:
        values = USUAL[key] * np.exp(0.05 * random.standard_normal(count))
        for _ in range(random.choice([0, 0, 1, 1, 2, 4])):
            start, length = random.integers(count), random.choice([1, 1, 2, 5, 8, 20, 60, count])
            part = slice(start, start + (min(length, 2) if key == "step/skipped" else length))
            part = slice(part.start, part.stop, random.choice([1, 1, 1, 2]))
            level = 1.0 if key == "step/skipped" else random.choice(UNUSUAL)
            values[part] = level * np.exp(0.05 * random.standard_normal(len(values[part])))
        series[key] = values
    return series


@pytest.mark.parametrize(
    ("seed", "alerts", "count"),
    [
        (1, True, 60),
        (2, True, 60),
        (3, "low", 60),
        (4, "high", 60),
        (5, "critical", 60),
        (6, True, 320),
    ],
)
def test_only_what_ends_is_looked_at_and_the_findings_are_those_of_all(
    seed: int, alerts: object, count: int
) -> None:
    random = np.random.default_rng(seed)
    series = sick_series(random, count)
    missing = {
        site: random.random(count) < random.choice([0.0, 0.0, 0.2])
        for site in {key.rpartition("/")[0] or key for key in series}
    }
    built = AlertSettings.build(alerts, "warn")  # type: ignore[arg-type]
    assert built is not None
    # Those that judge several series together are not asked in each step.
    built = replace(built, detectors=tuple(d for d in built.detectors if d[1] in ENDINGS))
    quick, complete = Alerts(built), WholeAlerts(built)
    infos = {key: info_of(key, place) for place, key in enumerate(series)}
    told = 0
    for step in range(count):
        here = [key for key in series if not missing[key.rpartition("/")[0] or key][step]]
        values = np.array([series[key][step] for key in here])
        record = StepRecord(step, (Table(tuple(infos[key] for key in here), values),))
        found = quick.look_at(record)
        assert found == complete.look_at(record), step
        told += len(found)
    assert told


def test_a_step_that_stays_sick_judges_no_series_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = np.arange(40) >= 20
    series = {
        f"activation/{place}/{metric}": np.where(sick, np.nan if bad else 900.0, noise(40))
        for place in range(5)
        for metric, bad in (("rms", False), ("absmax", False), ("mean", True))
    }
    built = AlertSettings.build(True, "warn")
    assert built is not None
    looking, told = Alerts(built), []
    judged: list[str] = []

    def found_by(name: str, *arguments: object) -> list[Anomaly]:
        judged.append(name)
        return registry.found_by(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("tmm.spec.alerts.found_by", found_by)
    for record in records(series):
        if record.step in (20, 21):
            judged.clear()
        told.append(len(looking.look_at(record)))
        if record.step == 20:
            assert set(judged) == {"activation_outliers", "exploding_activations"}
    assert told[20] > 10
    assert sum(told) == told[20]
    assert not judged  # since step 21


# In a training


class Trained:
    """A small model whose second layer can be made to fail."""

    def __init__(self, path: Path, *, first: int = 0, **options: object) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )
        spec = tmm.Spec(
            tmm.activation("rms", "nan_count"), tmm.gradient("norm"), every=1, **options
        )
        self.model = tmm.instrument(self.net, spec, run=path)
        self.monitor = tmm.monitor(self.model)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        self.monitor.watch(self.optimizer)
        self.step = first

    def train(self, steps: int, before: Callable[[int], None] = lambda step: None) -> None:
        for _ in range(steps):
            step, self.step = self.step, self.step + 1
            with self.monitor.step(step):
                before(step)
                self.model(torch.randn(16, 4)).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def poison(self, step: int) -> None:
        if step == 6:
            with torch.no_grad():
                self.net[2].bias.fill_(float("nan"))


def test_raising_ends_the_training_at_its_step_and_loses_nothing(tmp_path: Path) -> None:
    trained = Trained(tmp_path, alerts=True, on_alert="raise")
    with pytest.raises(tmm.AlertError, match=r"^step 6: .*first in the output of 2") as caught:
        trained.train(10, trained.poison)
    assert caught.value.step == 6
    assert caught.value.anomalies[0].key == "activation/2/nan_count"
    tmm.remove(trained.model)
    with tmm.open_run(tmp_path) as run:
        assert run.steps.tolist() == list(range(7))
        assert run.at(6)["activation/2/nan_count"] == 16
        event = next(event for event in run.events if event.kind == "alert")
        assert event.step == 6
        assert event.text.startswith("critical: ")


def test_the_training_can_go_on_after_it(tmp_path: Path) -> None:
    trained = Trained(tmp_path, alerts=["nonfinite"], on_alert="raise")
    with pytest.raises(tmm.AlertError):
        trained.train(10, trained.poison)
    trained.train(3)  # the same episode
    tmm.remove(trained.model)
    with tmm.open_run(tmp_path) as run:
        assert run.steps.tolist() == list(range(10))


def test_warning_names_the_layer_once(tmp_path: Path) -> None:
    trained = Trained(tmp_path, alerts=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.train(10, trained.poison)
    texts = [str(item.message) for item in caught if item.category is tmm.AlertWarning]
    assert len(texts) == 1
    assert "first in the output of 2" in texts[0]


def test_a_function_gets_them_and_its_errors_are_raised(tmp_path: Path) -> None:
    heard: list[tuple[Anomaly, ...]] = []
    trained = Trained(tmp_path, alerts=True, on_alert=heard.append)
    trained.train(10, trained.poison)
    assert len(heard) == 1
    assert heard[0][0].severity == "critical"
    assert {anomaly.step for anomaly in heard[0]} == {6}


def test_logged_losses_are_judged_between_monitored_steps(tmp_path: Path) -> None:
    heard: list[tuple[Anomaly, ...]] = []
    spec = tmm.Spec(tmm.activation("rms"), every=1000, alerts=True, on_alert=heard.append)
    with tmm.start_run("alerts", root=tmp_path, system_seconds=None) as run:
        run.watch(torch.nn.Linear(2, 2), spec)
        for step in range(40):
            run.log({"loss": 50.0 if step == 30 else 1.0})
            run.step()
    ((spike,),) = heard
    assert (spike.kind, spike.step) == ("loss_spike", 30)


def test_a_resumed_training_is_judged_as_one(tmp_path: Path) -> None:
    unusual = {19: np.nan, 20: np.nan, 22: 50.0, 35: 50.0}

    def train(path: Path, parts: list[range], heard: list[tuple[Anomaly, ...]]) -> None:
        query: str | None = None
        for part in parts:
            spec = tmm.Spec(tmm.activation("rms"), every=1000, alerts=True, on_alert=heard.append)
            with tmm.start_run("a", root=path, resume=query, system_seconds=None) as run:
                query = run.id
                run.watch(torch.nn.Linear(2, 2), spec)
                for step in part:
                    run.log({"loss": unusual.get(step, 1.0)})
                    run.step()

    once: list[tuple[Anomaly, ...]] = []
    train(tmp_path / "once", [range(40)], once)
    twice: list[tuple[Anomaly, ...]] = []
    train(tmp_path / "twice", [range(20), range(20, 40)], twice)
    assert [found[0].step for found in once] == [19, 35]  # what is at 22 follows from the first
    assert twice == once


def test_healthy_trainings_and_skipped_steps_are_silent(tmp_path: Path) -> None:
    trained = Trained(tmp_path, alerts=True, on_alert="raise")
    trained.train(40)
    scaled = alerts_of(
        {
            "gradient/a.weight/norm": [1.0, np.inf, 1.0],
            "step/skipped": [0.0, 1.0, 0.0],
            "step/grad_scale": [2.0, 2.0, 1.0],
        }
    )
    assert not scaled


@pytest.mark.parametrize("watched", [False, True])
def test_the_training_is_not_disturbed(tmp_path: Path, watched: bool) -> None:
    plain, judged = Trained(tmp_path / "a"), Trained(tmp_path / "b", alerts=watched)
    for trained in (plain, judged):
        torch.manual_seed(1)
        trained.train(5)
    for one, other in zip(plain.net.parameters(), judged.net.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("alerts", "on_alert", "message"),
    [
        ("loud", "warn", "no severity.*low, medium, high, critical"),
        (["nonfinit"], "warn", "no detector 'nonfinit'; there are nonfinite"),
        ([], "warn", "no detectors"),
        (3, "warn", "neither True, a severity nor a list"),
        (True, "mail", "on_alert='mail' is neither"),
    ],
)
def test_wrong_settings_are_refused(alerts: object, on_alert: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tmm.Spec(tmm.activation("rms"), alerts=alerts, on_alert=on_alert)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        ("requires_grad", "parameter_frozen"),
        ("optimizer", "parameter_without_optimizer"),
        ("detach", "parameter_without_gradient"),
    ],
)
def test_what_nothing_trains_is_told_at_the_first_monitored_step(
    tmp_path: Path, spoil: str, kind: str
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            result: torch.Tensor = self.last(x.detach() if spoil == "detach" else x)
            return result

    net, told = Net(), []
    if spoil == "requires_grad":
        net.first.requires_grad_(False)
    part = net.last if spoil == "optimizer" else net
    optimizer = torch.optim.Adam(part.parameters(), lr=1e-3)
    spec = tmm.Spec(
        *(tmm.activation("rms"), tmm.gradient("norm"), tmm.parameter("rms")),
        diagnosis=True,
        alerts="low",
        on_alert=told.append,
    )
    with (
        tmm.start_run("a", root=tmp_path, system_seconds=None) as run,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model = run.watch(net, spec, optimizer=optimizer)
        for _ in range(2):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    ((found, *_), *_) = told
    assert (found.kind, found.site, found.step) == (kind, "first", 0)
