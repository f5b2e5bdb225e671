"""Stories: which finding is the cause, what it explains, and how it is told."""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tmm
from tests.test_detectors import ANY, KEYS
from tmm.analysis import Anomaly, RecordedSeries, Story, find_anomalies, find_stories
from tmm.analysis.advice import KNOWLEDGE, known_of
from tmm.analysis.anomaly import SEVERITIES
from tmm.analysis.story import tell
from tmm.steps.ends_of_model import names_of_places

NOISE = np.random.default_rng(0).standard_normal(1000)
RECORD = RecordedSeries({"loss": (np.arange(100), 1 + 0.01 * NOISE[:100])})


def anomaly(kind: str, step: int, severity: str = "high", **more: Any) -> Anomaly:
    fields = {"last_step": step, "key": "loss", "site": "loss", **more}
    return Anomaly(
        kind=kind,
        severity=severity,  # type: ignore[arg-type]
        step=step,
        value=1.0,
        threshold=0.0,
        text=f"{kind} at {step}.",
        **fields,
    )


def kinds(stories: tuple[Story, ...]) -> list[tuple[str, list[str]]]:
    return [(s.cause.kind, [c.kind for c in s.consequences]) for s in stories]


def test_of_one_step_the_data_come_before_what_they_do() -> None:
    found = [
        anomaly("update_large", 37),
        anomaly("gradient_explosion", 37, "critical"),
        anomaly("loss_spike", 37),
        anomaly("activation_explosion", 37),
        anomaly("input_jump", 37),
    ]
    (story,) = tell(found, RECORD)
    assert story.cause.kind == "input_jump"
    assert story.severity == "critical"
    assert sum(story.counts.values()) == 4
    assert "It explains 4 more" in story.text


@pytest.mark.parametrize("kind", ["input_jump", "parameter_jump", "initialisation"])
def test_what_overflows_comes_before_the_nan_of_its_step(kind: str) -> None:
    nan, other = anomaly("nonfinite", 37, "critical"), anomaly("loss_spike", 37)
    (story,) = tell([nan, other, anomaly(kind, 37)], RECORD)
    assert (story.cause.kind, story.severity) == (kind, "critical")
    stories = tell([nan, anomaly("update_large", 37), anomaly(kind, 37, "low")], RECORD)
    assert stories[0].cause.kind == "nonfinite"


def test_what_comes_long_after_is_another_story() -> None:
    found = [anomaly("loss_spike", 10), anomaly("dead_units", 15), anomaly("loss_spike", 60)]
    assert kinds(tell(found, RECORD)) == [("loss_spike", ["dead_units"]), ("loss_spike", [])]


def test_a_cause_that_lasts_explains_what_comes_late() -> None:
    found = [anomaly("update_large", 0, last_step=80), anomaly("loss_spike", 85)]
    assert len(tell(found, RECORD)) == 1


def test_what_does_not_spread_explains_its_own_layer_only() -> None:
    found = [
        anomaly("parameter_frozen", 0, "low", site="2"),
        anomaly("update_small", 1, "low", site="2.weight"),
        anomaly("gradient_explosion", 2, site="4.weight"),
    ]
    assert kinds(tell(found, RECORD)) == [
        ("gradient_explosion", []),
        ("parameter_frozen", ["update_small"]),
    ]


def test_nothing_explains_what_was_set_up() -> None:
    found = [anomaly("initialisation", 0), anomaly("parameter_without_optimizer", 0, "medium")]
    assert {story.cause.kind for story in tell(found, RECORD)} == {found[0].kind, found[1].kind}


def test_low_findings_of_one_kind_are_one_story() -> None:
    found = [anomaly("gradient_idle", 0, "low", site=f"{n}.bias") for n in range(12)]
    (story,) = tell(found, RECORD)
    assert story.counts == {"gradient_idle": 11}


def test_evidence_is_the_series_around_the_onset() -> None:
    (story,) = tell([anomaly("loss_spike", 40)], RECORD)
    (part,) = story.evidence
    assert part.steps.tolist() == list(range(35, 46))
    before, after = part.told(40).removeprefix("loss: ").split(" | ")
    assert (len(before.split(",")), len(after.split(","))) == (5, 6)


def test_evidence_of_most_parameters_is_one_that_moved_as_much_as_the_finding_says() -> None:
    moves = {"embed": 0.015, "0": 0.7, "1": 0.82, "2": 0.8, "3": 9.0}
    record = RecordedSeries(
        {f"update/{n}.weight/relative_norm": (range(3), [m] * 3) for n, m in moves.items()}
    )
    (story,) = find_stories(record)
    assert story.cause.value == 0.8
    assert [part.key for part in story.evidence] == ["update/2.weight/relative_norm"]


def test_every_kind_of_a_detector_is_known() -> None:
    source = "".join(
        path.read_text()
        for path in (Path(tmm.__file__).parent / "analysis" / "detectors").glob("*.py")
    )
    for kind in KNOWLEDGE:
        name = "parameter_" if kind.startswith("parameter_") else kind
        assert f'"{kind}"' in source or name in source, kind
        assert known_of(kind).try_


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.sampled_from(KEYS), ANY))
def test_stories_hold_each_finding_once(series: dict[str, list[float]]) -> None:
    record = RecordedSeries({key: (np.arange(len(v)), v) for key, v in series.items()})
    stories = find_stories(record)
    told = [a for story in stories for a in (story.cause, *story.consequences)]
    assert sorted(told, key=repr) == sorted(find_anomalies(record), key=repr)
    weights = [SEVERITIES.index(story.severity) for story in stories]
    assert weights == sorted(weights, reverse=True)
    for story in stories:
        assert all(later.step >= story.step for later in story.consequences)
        assert json.dumps(story.to_dict())


# In a training


class Trained:
    """A small training, with faults that a test may plant."""

    def __init__(self, path: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)),
            *(torch.nn.ReLU(), torch.nn.Linear(32, 4)),
        )
        self.path = path
        self.options = options
        self.spec: tmm.Spec = tmm.default_spec(every=1)

    def train(self, steps: int = 40, corrupt: int = -1, lr: float = 1e-3) -> Path:
        held = self.options.get("held", self.net.parameters())
        optimizer = torch.optim.Adam(held, lr=lr)
        generator = torch.Generator().manual_seed(0)
        model = torch.compile(self.net, backend="eager") if "compiled" in self.options else self.net
        with tmm.start_run("p", root=self.path, system_seconds=None) as run:
            called = run.watch(model, self.spec, optimizer=optimizer)
            for step in range(steps):
                inputs = torch.randn(32, 16, generator=generator)
                targets = (inputs[:, 0] > 0).long()
                inputs = inputs * 1000 if step == corrupt else inputs
                loss = torch.nn.functional.cross_entropy(called(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.log({"loss": loss})
                run.step()
            self.live = run.findings()
        return run.path


@pytest.mark.parametrize("options", [{}, {"compiled": True}])
def test_inputs_are_measured_as_they_are(tmp_path: Path, options: dict[str, Any]) -> None:
    path = Trained(tmp_path, **options).train(steps=3)
    batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    with tmm.open_run(path) as run:
        (first, *_) = run.series("model_input/input/rms")[1]
        assert first == pytest.approx(float(batch.double().square().mean().sqrt()), rel=1e-6)
        assert run.series("model_input/input/elements")[1].tolist() == [512.0] * 3
        assert run.series("step/optimizer_age")[1].tolist() == [1.0, 2.0, 3.0]
        assert run.keys()[0].startswith("model_input/")
        assert 0 < run.series("model_output/output/spread")[1][0] < 2
        assert run.findings() == ()


class Called:
    def __call__(self, x: object, /, y: object) -> None:
        """Another object than a function."""

    def method(self, x: object, y: object = 1, *rest: object, z: object = 2) -> None:
        """With all kinds of parameters."""

    @functools.wraps(method)
    def wrapped(self, *arguments: object, **keywords: object) -> None:
        """Has the parameters of what it wraps."""


@pytest.mark.parametrize(
    "forward",
    [
        *(Called(), Called().method, Called().wrapped, Called.method),
        *(functools.partial(Called.method, Called()), len, lambda *values: None),
    ],
)
def test_inputs_have_the_names_of_the_parameters(forward: Callable[..., object]) -> None:
    known = inspect.signature(forward).parameters.values()
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    right = [parameter.name for parameter in known if parameter.kind in kinds]
    assert list(names_of_places(forward)) == right


def test_evaluations_are_not_inputs_of_the_training(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        run.watch(net, tmm.default_spec(every=1), optimizer=optimizer)
        for _ in range(3):
            net(torch.ones(8, 4)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                net(1000 * torch.ones(800, 4))
            run.step()
    with tmm.open_run(run.path) as recorded:
        assert recorded.series("model_input/input/elements")[1].tolist() == [32.0] * 3
        assert recorded.series("model_input/input/rms")[1].tolist() == [1.0] * 3


def test_one_corrupt_batch_is_one_story(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    path = trained.train(corrupt=25)
    with tmm.open_run(path) as run:
        first = run.findings()[0]
    assert (first.cause.kind, first.cause.site, first.step) == ("input_jump", "input", 25)
    assert [story.to_dict() for story in trained.live] == [
        story.to_dict() for story in tmm.open_run(path).findings()
    ]


def test_one_warning_at_the_line_of_the_user(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    default = tmm.default_spec(every=1)
    trained.spec = tmm.Spec(*default.rules, alerts=True, diagnosis=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.train(corrupt=25)
    (told,) = [item for item in caught if item.category is tmm.AlertWarning]
    assert told.filename == __file__
    assert str(told.message).startswith("step 25: The input input has a")
    assert "Try: look at the batch" in str(told.message)


def test_what_is_in_no_optimizer_is_named_at_the_first_step(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    trained.options["held"] = [*trained.net[0].parameters(), *trained.net[4].parameters()]
    trained.net[0].bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = trained.train(steps=2)
    with tmm.open_run(path) as run:
        found = {s.cause.kind: (s.cause.site, s.step) for s in run.findings()}
    assert found["parameter_without_optimizer"] == ("2", 0)
    assert found["parameter_frozen"] == ("0", 0)


def test_a_rate_that_is_too_high_comes_first_with_few_recorded_steps(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    trained.spec = tmm.default_spec(every=10)
    with tmm.open_run(trained.train(steps=31, lr=5.0)) as run:
        first = run.findings()[0]
    assert (first.cause.kind, first.severity, first.step) == ("update_large", "critical", 0)


def test_runs_without_what_diagnosis_measures_are_told_of_as_well() -> None:
    values = np.ones(40)
    values[20:] = math.nan
    (story,) = find_stories(RecordedSeries({"loss": (np.arange(40), values)}))
    assert story.cause.kind == "nonfinite"
