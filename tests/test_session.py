"""What the callbacks of all frameworks share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import tmm
from tmm.integrations.session import Session

SPEC = tmm.Spec(tmm.activation("rms"), tmm.gradient("norm"), tmm.update("norm"), every=2)


def session(root: Path, spec: tmm.Spec | None = SPEC) -> Session:
    return Session(spec, None, {"project": "p", "root": root, "system_seconds": None})


def train(driven: Session, steps: range, model: nn.Module, micro_batches: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model = driven.instrument(model)
    driven.watch(optimizer)
    for step in steps:
        for _ in range(micro_batches):
            driven.begin_step(step)
            model(torch.ones(2, 2)).sum().backward()
            driven.end_micro_batch()
        driven.measure_before_clip()
        optimizer.step()
        optimizer.zero_grad()
        driven.end_step()
        with driven.paused():
            model(torch.full((2, 2), 9.0))
        driven.log({"loss": step, "epoch": "first", "val": {"loss": torch.tensor(1.0)}})


def test_a_training_is_recorded(tmp_path: Path) -> None:
    driven = session(tmp_path)
    driven.open(config={"lr": 0.1})
    train(driven, range(3), nn.Linear(2, 2), micro_batches=2)
    driven.close()
    (record,) = tmm.list_runs(tmp_path)
    assert record.status == "finished"
    with tmm.open_run(record.path) as run:
        assert run.info["config"] == {"lr": 0.1}
        assert run.series("loss")[0].tolist() == [0, 1, 2]
        assert run.series("val/loss")[1].tolist() == [1, 1, 1]
        assert run.series("gradient_before_clip/weight/norm")[0].tolist() == [0, 2]
        assert run.series("update/weight/norm")[0].tolist() == [0, 2]


def test_gradients_are_those_before_the_first_of_several_clips(tmp_path: Path) -> None:
    driven = session(tmp_path)
    driven.open()
    model = driven.instrument(nn.Linear(2, 2))
    driven.begin_step(0)
    model(torch.ones(2, 2)).sum().backward()
    expected = model.weight.grad.norm().item()
    for _ in range(2):
        driven.measure_before_clip()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    driven.end_step()
    driven.close()
    with tmm.open_run(tmm.list_runs(tmp_path)[0].path) as run:
        assert run.at(0)["gradient_before_clip/weight/norm"] == pytest.approx(expected)


def test_a_training_goes_on_with_its_run(tmp_path: Path) -> None:
    first = session(tmp_path)
    first.open()
    train(first, range(4), nn.Linear(2, 2))
    state = first.state
    first.close(lambda run: run.fail(RuntimeError("killed")))
    second = session(tmp_path)
    second.open(step=2, resume=state["run"])
    train(second, range(2, 6), nn.Linear(2, 2))
    second.close()
    (record,) = tmm.list_runs(tmp_path)
    assert record.status == "finished"
    with tmm.open_run(record.path) as run:
        assert run.steps.tolist() == list(range(6))


def test_a_step_that_is_discarded_has_not_begun(tmp_path: Path) -> None:
    driven = session(tmp_path)
    driven.open()
    model = nn.Linear(2, 2)
    driven.instrument(model)
    for step in (0, 1):
        driven.begin_step(step)
        model(torch.ones(2, 2))
        if step == 0:
            driven.end_step()
    driven.discard_step()
    driven.discard_step()
    driven.log({"late": 1.0})
    driven.begin_step(1)
    driven.log({"loss": 1.0})
    driven.end_step()
    driven.close()
    with tmm.open_run(tmm.list_runs(tmp_path)[0].path) as run:
        assert run.steps.tolist() == [0, 1]
        assert run.series("late")[0].tolist() == [0]
        assert run.series("loss")[0].tolist() == [1]


def test_a_run_that_is_gone_is_started_anew(tmp_path: Path) -> None:
    driven = session(tmp_path)
    with pytest.warns(tmm.MonitoringWarning, match="is gone; a new one"):
        driven.open(step=5, resume=str(tmp_path / "nowhere"))
    train(driven, range(5, 7), nn.Linear(2, 2))
    driven.close()
    with tmm.open_run(tmm.list_runs(tmp_path)[0].path) as run:
        assert run.steps.tolist() == [5, 6]


def test_a_given_run_is_left_to_its_owner(tmp_path: Path) -> None:
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        driven = Session(SPEC, run)
        driven.open()
        train(driven, range(2), nn.Linear(2, 2))
        driven.close(lambda run: run.fail(RuntimeError("its owner decides")))
        run.log({"after": 1.0})
        assert not run.is_finished
    (record,) = tmm.list_runs(tmp_path)
    assert record.status == "finished"


def test_keys_of_tmm_are_warned_of_once(tmp_path: Path) -> None:
    driven = session(tmp_path)
    driven.open()
    with pytest.warns(tmm.MonitoringWarning, match="tmm's own"):
        driven.log({"activation/x": 1.0, "loss": 1.0})
    driven.log({"activation/x": 1.0})
    driven.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rms", None), "spec='rms' is not a tmm.Spec"),
        ((None, "runs/x"), "run='runs/x' is no run; make one with tmm.start_run"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Session(*arguments)


def test_options_do_not_go_with_a_run(tmp_path: Path) -> None:
    with (
        tmm.start_run("p", root=tmp_path, system_seconds=None) as run,
        pytest.raises(TypeError, match=r"project: the run is given; tell tmm.start_run"),
    ):
        Session(None, run, {"project": "q"})


@pytest.mark.parametrize("name", ["resume", "step"])
def test_where_to_go_on_is_not_an_option(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}= is what a checkpoint tells"):
        Session(None, None, {name: 1})


class Doubled(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@pytest.mark.parametrize(
    ("make", "captures"),
    [
        (lambda: nn.Linear(2, 2), False),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), False),
        (lambda: nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), False),
        (lambda: nn.Sequential(nn.Linear(2, 2), Doubled(nn.ReLU())), True),
        (lambda: Doubled(nn.Linear(2, 2)), True),
    ],
)
def test_it_is_said_where_compiling_in_place_captures_no_graph(
    tmp_path: Path, make: Any, captures: bool
) -> None:
    counter = CompileCounter()
    model = make()
    model.compile(backend=counter)
    model(torch.ones(1, 2, 2))
    assert bool(counter.frame_count) is captures
    driven = session(tmp_path, tmm.Spec(tmm.activation("rms")))
    driven.open()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        driven.instrument(model)
    driven.close()
    expected = [] if captures else ["no graph was captured"]
    assert [str(warning.message)[:21] for warning in caught] == expected


@pytest.mark.parametrize("compiled", [lambda model: model, torch.compile])
def test_nothing_is_said_of_other_ways_to_compile(tmp_path: Path, compiled: Any) -> None:
    driven = session(tmp_path)
    driven.open()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        driven.instrument(compiled(nn.Linear(2, 2)))
    driven.close()


def test_an_option_that_nothing_takes_is_named() -> None:
    with pytest.raises(TypeError, match="projekt= is no argument of the callback.*project, name"):
        Session(SPEC, None, {"projekt": "p"})
