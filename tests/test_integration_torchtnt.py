"""Trainings inside TorchTNT against loops written by hand, which know nothing of tmm."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import tmm

pytest.importorskip("torchtnt")
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torchtnt.framework.auto_unit import SWAParams
from torchtnt.framework.callback import Callback
from torchtnt.framework.callbacks import (
    DistributedCheckpointSaver,
    EarlyStopping,
    IterationTimeLogger,
    LearningRateMonitor,
    PyTorchProfiler,
    SystemResourcesMonitor,
    TensorBoardParameterMonitor,
    ThroughputLogger,
    TimeLimitInterrupter,
    TorchCompile,
)
from torchtnt.framework.callbacks.checkpointer_types import RestoreOptions
from torchtnt.framework.evaluate import evaluate
from torchtnt.framework.fit import fit
from torchtnt.framework.predict import predict
from torchtnt.framework.train import train
from torchtnt.framework.unit import EvalUnit, TrainUnit
from torchtnt.utils.early_stop_checker import EarlyStopChecker
from torchtnt.utils.loggers import CSVLogger, InMemoryLogger, JSONLogger, TensorBoardLogger
from torchtnt.utils.prepare_module import (
    ActivationCheckpointParams,
    CheckpointImpl,
    TorchCompileParams,
)

from tests.torchtnt_units import (
    COMPILED,
    SETTINGS,
    SPEC,
    Batch,
    Failing,
    Interrupting,
    Net,
    Recording,
    Unit,
    assert_equal_values,
    assert_equal_weights,
    auto_unit,
    batches,
    by_hand,
    new_scaler,
    record,
)
from tmm.integrations.torchtnt import TMMCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# What is measured


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, "uncompiled") for name in SETTINGS),
        *(("clip_norm", compiled) for compiled in COMPILED[1:]),
        ("fp16_clip", "parameters"),
        ("bf16", "parameters"),
    ],
)
def test_values_and_training_are_those_of_a_loop_by_hand(
    tmp_path: Path, name: str, compiled: str
) -> None:
    settings, data = SETTINGS[name], batches(8)
    unit, callback = auto_unit(settings, compiled), Recording(tmp_path)
    torch.manual_seed(0)
    train(unit, data, max_epochs=2, callbacks=[callback])
    after = torch.get_rng_state()
    torch.manual_seed(0)
    scaler = new_scaler() if unit.grad_scaler else None
    module, truth = by_hand(data, epochs=2, scaler=scaler, **settings)
    assert torch.equal(after, torch.get_rng_state())
    assert_equal_weights(unit.module, module)
    half = settings.get("precision") is not None
    assert_equal_values(callback.values(), truth, 1e-3 if half else 1e-5)
    if scaler is not None and unit.grad_scaler is not None:
        assert {values["step/skipped"] for values in truth} == {0.0, 1.0}
        assert unit.grad_scaler.state_dict() == scaler.state_dict()


def test_gradients_after_clipping_are_the_lesser(tmp_path: Path) -> None:
    callback = Recording(tmp_path)
    train(auto_unit({"clip_norm": 0.5}), batches(8), max_epochs=1, callbacks=[callback])
    seen = set()
    for values in callback.values():
        before, after = values["step/gradient_norm_before_clip"], values["step/gradient_norm"]
        assert after == pytest.approx(min(before, 0.5), rel=1e-4)
        seen.add(before > 0.5)
    assert seen == {True, False}


def test_without_clipping_nothing_is_measured_before_it(tmp_path: Path) -> None:
    callback = Recording(tmp_path)
    train(auto_unit({}), batches(1), max_epochs=1, callbacks=[callback])
    assert not [key for key in callback.values()[0] if "before_clip" in key]


def test_a_window_that_spans_epochs_is_one_step(tmp_path: Path) -> None:
    # TorchTNT steps at the end of the data, but not where max_steps_per_epoch cuts it off.
    losses: list[float] = []

    class Collecting(Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            losses.append(state.train_state.step_output[0].item())

    unit, callback = auto_unit({"accumulation": 2}), Recording(tmp_path)
    callbacks = [callback, Collecting()]
    train(unit, batches(9), max_epochs=3, max_steps_per_epoch=3, callbacks=callbacks)
    expected = [sum(losses[:2]), sum(losses[2:5]), sum(losses[5:8])]
    assert [values["loss"] for values in callback.values()] == pytest.approx(expected)
    assert unit.tmm_run.state_dict()["step"] == 3
    assert record(tmp_path).status == "finished"


@pytest.mark.parametrize(
    "further",
    [
        {"activation_checkpoint_params": ActivationCheckpointParams(CheckpointImpl.NO_REENTRANT)},
        {"swa_params": SWAParams(warmup_steps_or_epochs=0, step_or_epoch_update_freq=1)},
        {"detect_anomaly": True},
    ],
    ids=["activation_checkpoint", "average", "anomaly"],
)
def test_further_settings_of_a_unit(tmp_path: Path, further: dict[str, Any]) -> None:
    data = batches(4)
    unit, callback = auto_unit({"accumulation": 2}, **further), Recording(tmp_path)
    torch.manual_seed(0)
    train(unit, data, max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    module, truth = by_hand(data, epochs=2, accumulation=2)
    assert_equal_values(callback.values(), truth)
    for left, right in zip(unit.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_learning_rate_is_the_one_of_the_step(tmp_path: Path) -> None:
    unit = Unit(module=Net(), device=torch.device("cpu"), step_lr_interval="step")
    callback = Recording(tmp_path)
    train(unit, batches(4), max_epochs=1, callbacks=[callback])
    rates = [values["learning_rate"] for values in callback.values()]
    assert rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


# Compiling


class Counting:
    def __init__(self) -> None:
        self.graphs = 0

    def backend(self) -> Callable[..., Any]:
        def compile_graph(graph: Any, example: Any) -> Any:  # a function: instances are copied
            self.graphs += 1
            return graph.forward

        return compile_graph


def test_no_graph_break_and_no_recompilation_is_added(tmp_path: Path) -> None:
    def graphs(callbacks: list[Any]) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        counting = Counting()
        parameters = TorchCompileParams(backend=counting.backend())
        unit = Unit(module=Net(), torch_compile_params=parameters, device=torch.device("cpu"))
        data = [batches(1)[0]] * 6
        fit(unit, data, data[:2], max_epochs=2, evaluate_every_n_steps=2, callbacks=callbacks)
        return counting.graphs, sum(counters["graph_break"].values())

    plain = graphs([])
    spec = tmm.Spec(*SPEC.rules, every=2)
    assert plain == (2, 0)  # training and evaluation
    assert graphs([Recording(tmp_path, spec)]) == (3, 0)  # one more that measures


def test_it_is_said_that_no_graph_was_captured(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    parameters = TorchCompileParams(backend="aot_eager")
    unit = Unit(module=module, torch_compile_params=parameters, device=torch.device("cpu"))
    callback = Recording(tmp_path)
    with pytest.warns(tmm.MonitoringWarning, match=r"no graph was captured: Sequential.compile"):
        train(unit, batches(2), max_epochs=1, callbacks=[callback])
    assert "activation/2/rms" in callback.values()[1]


# Evaluation and prediction


@pytest.mark.parametrize("accumulation", [1, 3])
def test_evaluation_does_not_mix_with_training(tmp_path: Path, accumulation: int) -> None:
    data, other = batches(8), batches(3, seed=9)
    unit, callback = auto_unit({"accumulation": accumulation}), Recording(tmp_path)

    class Predicting(Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            predict(unit, other, callbacks=[callback])

        def on_eval_step_start(self, state: Any, unit: Any) -> None:
            with callback.paused():  # ends before the evaluation does
                unit.module(torch.ones(2, 4))

    torch.manual_seed(0)
    fit(
        unit,
        data,
        other,
        max_epochs=2,
        evaluate_every_n_steps=2,
        callbacks=[Predicting(), callback],
    )
    torch.manual_seed(0)
    module, truth = by_hand(data, epochs=2, accumulation=accumulation)
    assert_equal_weights(unit.module, module)
    values = callback.values()
    with torch.no_grad():
        losses = [cross_entropy(unit.module.eval()(x), y).item() for x, y in other]
    assert values[-1]["eval/loss"] == pytest.approx(sum(losses) / 3)
    evaluated = [step for step, row in enumerate(values) if "eval/loss" in row]
    assert evaluated == ([1, 3, 5, 7, 9, 11, 13, 15] if accumulation == 1 else [0, 1, 2, 3, 4, 5])
    for row in values:
        row.pop("eval/loss", None)
    assert_equal_values(values, truth)


def test_evaluation_and_prediction_alone_record_nothing(tmp_path: Path) -> None:
    unit, callback = auto_unit({}), Recording(tmp_path)
    evaluate(unit, batches(2), callbacks=[callback])
    predict(unit, batches(2), callbacks=[callback])
    assert callback.run is None
    assert not tmm.list_runs(tmp_path)
    train(unit, batches(2), max_epochs=1, callbacks=[callback])
    before = callback.values()
    evaluate(unit, batches(2), callbacks=[callback])
    assert callback.values() == before


def test_an_error_of_a_prediction_inside_a_training_is_not_its_error(tmp_path: Path) -> None:
    unit, callback = auto_unit({"accumulation": 2}), Recording(tmp_path)

    class Predicting(Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            with pytest.raises(TypeError):
                predict(auto_unit({}), [("text", 0)], callbacks=[callback])

    data = batches(4)
    torch.manual_seed(0)
    train(unit, data, max_epochs=1, callbacks=[Predicting(), callback])
    torch.manual_seed(0)
    assert_equal_values(callback.values(), by_hand(data, accumulation=2)[1])
    assert record(tmp_path).status == "finished"


# Units of one's own


class OwnUnit(TrainUnit[Batch], EvalUnit[Batch]):
    """Accumulates over ``accumulation`` batches, clips by itself, and returns a dictionary."""

    def __init__(self, callback: TMMCallback | None = None, accumulation: int = 1) -> None:
        super().__init__()
        self.network = Net()
        self.callback, self.accumulation = callback, accumulation
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.05)

    def train_step(self, state: Any, data: Batch) -> Any:
        loss = cross_entropy(self.network(data[0]), data[1])
        (loss / self.accumulation).backward()
        if (self.train_progress.num_steps_completed + 1) % self.accumulation == 0:
            if self.callback is not None:
                self.callback.measure_before_clip()
            nn.utils.clip_grad_norm_(self.network.parameters(), 0.3)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss, "half": loss.item() / 2, "outputs": data[0], "name": "text"}

    def eval_step(self, state: Any, data: Batch) -> Any:
        return {"accuracy": float(len(data[0]))}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_train_unit(tmp_path: Path, accumulation: int) -> None:
    data = batches(6)
    callback = Recording(tmp_path)
    unit = OwnUnit(callback, accumulation)
    torch.manual_seed(0)
    fit(unit, data, data[:2], max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    module, truth = by_hand(data, epochs=2, accumulation=accumulation, clip_norm=0.3)
    assert_equal_weights(unit.network, module)
    values = callback.values()
    assert values[6 // accumulation - 1].pop("eval/accuracy") == values[-1].pop("eval/accuracy")
    assert [row.pop("half") * 2 for row in values] == pytest.approx([row["loss"] for row in truth])
    assert_equal_values(values, truth)


class IteratorUnit(TrainUnit[Iterator[Batch]], EvalUnit[Batch]):
    def __init__(self) -> None:
        super().__init__()
        self.network = Net()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.05)

    def train_step(self, state: Any, data: Iterator[Batch]) -> torch.Tensor:
        inputs, targets = next(data)
        loss = cross_entropy(self.network(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def eval_step(self, state: Any, data: Batch) -> Any:
        return {"size": len(data[0])}


# TorchTNT looks at the annotation, and does not read one that is text.
IteratorUnit.train_step.__annotations__["data"] = Iterator[Batch]


def test_a_unit_that_takes_its_batches_from_an_iterator(tmp_path: Path) -> None:
    data, callback = batches(3), Recording(tmp_path)
    torch.manual_seed(0)
    fit(IteratorUnit(), data, data, max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    values = callback.values()
    assert [row.pop("eval/size", None) for row in values] == [None, None, 4, None, None, 4]
    assert_equal_values(values, by_hand(data, epochs=2)[1])
    assert record(tmp_path).status == "finished"
    with tmm.open_run(record(tmp_path).path) as run:
        assert not run.events  # no step that was opened for a batch that there was not


class Adversarial(TrainUnit[Batch]):
    """Two networks, with an optimizer and a scaler each; the second steps every third batch."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__()
        self.judge, self.maker = Net(), Net()
        self.judges = torch.optim.SGD(self.judge.parameters(), lr=0.1)
        maker = torch.optim.SGD(self.maker.parameters(), lr=0.1)
        self.makers: Any = [maker] if hidden else maker  # a list is not tracked

    def train_step(self, state: Any, data: Batch) -> torch.Tensor:
        cross_entropy(self.judge(data[0]), data[1]).backward()
        self.judges.step()
        self.judges.zero_grad()
        loss = cross_entropy(self.maker(data[0]), data[1])
        loss.backward()
        if self.train_progress.num_steps_completed % 3 == 2:
            optimizer = self.makers[0] if isinstance(self.makers, list) else self.makers
            optimizer.step()
            optimizer.zero_grad()
        return loss


def test_one_of_two_networks(tmp_path: Path) -> None:
    both = [Recording(tmp_path, module="judge"), Recording(tmp_path, module="maker")]
    train(Adversarial(), batches(7), max_epochs=1, callbacks=both)
    assert [len(callback.values()) for callback in both] == [7, 2]
    rates = [set(callback.values()[0]) & {"learning_rate"} for callback in both]
    assert rates == [{"learning_rate"}] * 2
    assert [run.status for run in tmm.list_runs(tmp_path)] == ["finished"] * 2


def test_an_optimizer_that_the_unit_does_not_track(tmp_path: Path) -> None:
    callback = Recording(tmp_path, module="maker")
    train(Adversarial(hidden=True), batches(7), max_epochs=1, callbacks=[callback])
    values = callback.values()
    assert len(values) == 2
    assert "gradient/last.weight/norm" in values[0]


class Joined(Unit):
    def compute_loss(self, state: Any, data: Batch) -> Any:
        return cross_entropy(self.module(data[0]) + self.other(data[0]), data[1]), None


@pytest.mark.parametrize("order", [1, -1])
def test_two_modules_of_one_auto_unit(tmp_path: Path, order: int) -> None:
    unit = Joined(module=Net(), device=torch.device("cpu"), clip_grad_norm=0.1)
    unit.other = Net()
    parameters = [*unit.module.parameters(), *unit.other.parameters()]
    unit.optimizer = torch.optim.AdamW(parameters, lr=0.05)
    both = [Recording(tmp_path / name, module=name) for name in ("module", "other")]
    train(unit, batches(2), max_epochs=1, callbacks=both[::order])
    for callback in both:
        values = callback.values()
        assert len(values) == 2
        assert "step/gradient_norm_before_clip" in values[1]
    assert "_update_weights" not in vars(unit)


def test_two_networks_without_a_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The unit has judge, maker; .*module='name'"):
        train(Adversarial(), batches(1), max_epochs=1, callbacks=[Recording(tmp_path)])
    with pytest.raises(ValueError, match="module='x' is none of the unit's: judge, maker"):
        callback = Recording(tmp_path, module="x")
        train(Adversarial(), batches(1), max_epochs=1, callbacks=[callback])
    assert not tmm.list_runs(tmp_path)


def test_several_scalers_need_a_choice(tmp_path: Path) -> None:
    unit = OwnUnit()
    unit.first, unit.second = new_scaler(), new_scaler()
    with pytest.raises(ValueError, match="unit has first, second; .*scaler='name'"):
        train(unit, batches(1), max_epochs=1, callbacks=[Recording(tmp_path)])
    with pytest.raises(ValueError, match="scaler='third' is no GradScaler"):
        train(unit, batches(1), max_epochs=1, callbacks=[Recording(tmp_path, scaler="third")])
    train(unit, batches(1), max_epochs=1, callbacks=[Recording(tmp_path, scaler="first")])


class Bypassing(OwnUnit):
    def train_step(self, state: Any, data: Batch) -> torch.Tensor:
        loss = cross_entropy(self.network.forward(data[0]), data[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def test_parts_are_measured_where_the_call_of_the_whole_is_bypassed(tmp_path: Path) -> None:
    callback = Recording(tmp_path)
    train(Bypassing(), batches(2), max_epochs=1, callbacks=[callback])
    assert any(key.startswith("activation/") for key in callback.values()[0])
    assert not any(key.startswith("activation/[root module]") for key in callback.values()[0])


def test_it_is_said_that_no_optimizer_has_stepped(tmp_path: Path) -> None:
    unit = OwnUnit(accumulation=100)
    with pytest.warns(tmm.MonitoringWarning, match="no optimizer .* has stepped"):
        train(unit, batches(2), max_epochs=1, callbacks=[Recording(tmp_path)])


def test_a_forward_pass_to_look_at_can_be_left_out(tmp_path: Path) -> None:
    data, callback = batches(4), Recording(tmp_path)

    class Looking(Unit):
        def on_train_step_end(self, *_: Any) -> None:
            with callback.paused(), torch.no_grad():
                self.module.eval()(torch.ones(2, 4))
                self.module.train()

    unit = Looking(module=Net(), device=torch.device("cpu"), gradient_accumulation_steps=2)
    unit.lr_scheduler = None
    torch.manual_seed(0)
    train(unit, data, max_epochs=1, callbacks=[callback])
    torch.manual_seed(0)
    assert_equal_values(callback.values(), by_hand(data, accumulation=2)[1])


# Checkpoints


def saver(root: Path, **options: Any) -> DistributedCheckpointSaver:
    return DistributedCheckpointSaver(str(root / "checkpoints"), **options)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_goes_on_with_its_run(tmp_path: Path, accumulation: int, order: int) -> None:
    data, settings = batches(5), {"accumulation": accumulation, "clip_norm": 0.3}

    def start(unit: Unit, further: list[Callback]) -> Recording:
        callback = Recording(tmp_path / "runs")
        callback.track(unit)
        saving = saver(tmp_path, save_every_n_epochs=1)
        DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit)
        torch.manual_seed(unit.train_progress.num_epochs_completed)
        train(unit, data, max_epochs=2, callbacks=[*[callback, saving][::order], *further])
        return callback

    with pytest.raises(RuntimeError, match="out of memory"):
        start(auto_unit(settings), [Failing(at=8)])
    broken = record(tmp_path / "runs")
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: out of memory")
    resumed = auto_unit(settings)
    callback = start(resumed, [])
    assert record(tmp_path / "runs").status == "finished"
    assert callback.run is not None
    assert callback.run.id == broken.id

    class Seeding(Callback):
        def on_train_epoch_start(self, state: Any, unit: Any) -> None:
            torch.manual_seed(unit.train_progress.num_epochs_completed)

    whole, other = auto_unit(settings), Recording(tmp_path / "other")
    train(whole, data, max_epochs=2, callbacks=[other, Seeding()])
    assert_equal_weights(resumed.module, whole.module)
    assert_equal_values(callback.values(), other.values(), tolerance=0)
    assert len(callback.values()) == (10 if accumulation == 1 else 6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_checkpoint_within_an_epoch_knows_the_step(tmp_path: Path, order: int) -> None:
    saving, callback = saver(tmp_path, save_every_n_train_steps=1), Recording(tmp_path / "runs")
    unit = auto_unit({"accumulation": 2})
    train(unit, batches(5), max_epochs=1, callbacks=[callback, saving][::order])
    steps = []
    for number in range(2, 6):  # optimizers that have not stepped cannot be restored
        fresh = auto_unit({"accumulation": 2})
        callback.track(fresh)
        (path,) = (tmp_path / "checkpoints").glob(f"epoch_0*step_{number}")
        DistributedCheckpointSaver.restore(str(path), fresh)
        state = fresh.tmm_run.state_dict()
        assert Path(state["path"]).name == record(tmp_path / "runs").id
        steps.append(state["step"])
    assert steps == [1, 1, 2, 3]


def test_checkpoints_load_without_tmm(tmp_path: Path) -> None:
    saving, unit = saver(tmp_path), auto_unit({}, "parameters")
    train(unit, batches(3), max_epochs=1, callbacks=[Recording(tmp_path / "runs"), saving])
    keys = set(unit.app_state()) - {"tmm_run"}
    fresh = auto_unit({})
    assert set(fresh.app_state()) == keys
    assert DistributedCheckpointSaver.restore_from_latest(saving.dirpath, fresh)
    assert_equal_weights(fresh.module, unit.module)
    assert fresh.module.state_dict().keys() == Net().state_dict().keys()


def test_an_older_checkpoint_is_restored_before_the_unit_is_tracked(tmp_path: Path) -> None:
    saving, data = saver(tmp_path, save_every_n_epochs=1), batches(5)
    train(auto_unit({"accumulation": 2}), data, max_epochs=2, callbacks=[saving])
    unit, callback = auto_unit({"accumulation": 2}), Recording(tmp_path / "runs")
    callback.track(unit)
    with pytest.raises(CheckpointException, match=r"Missing key .*app_state\.tmm_run"):
        DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit)
    in_part = auto_unit({"accumulation": 2})
    callback.track(in_part)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    DistributedCheckpointSaver.restore_from_latest(saving.dirpath, in_part, planner=planner)
    train(in_part, data, max_epochs=2, callbacks=[Recording(tmp_path / "in_part")])
    assert in_part.tmm_run.state_dict()["step"] == 6
    unit = auto_unit({"accumulation": 2})
    DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit)
    train(unit, data, max_epochs=3, callbacks=[callback, saving])
    with tmm.open_run(record(tmp_path / "runs").path) as run:
        assert run.steps.tolist() == [6, 7, 8]
    fresh = auto_unit({"accumulation": 2})
    callback.track(fresh)
    DistributedCheckpointSaver.restore_from_latest(saving.dirpath, fresh)
    assert fresh.tmm_run.state_dict()["step"] == 9


def test_a_training_that_starts_anew_from_a_checkpoint_has_a_run_of_its_own(tmp_path: Path) -> None:
    saving, callback = saver(tmp_path), Recording(tmp_path / "runs")
    train(auto_unit({}), batches(3), max_epochs=1, callbacks=[callback, saving])
    unit = auto_unit({})
    callback.track(unit)
    options = RestoreOptions(restore_train_progress=False)
    DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit, restore_options=options)
    train(unit, batches(2), max_epochs=1, callbacks=[callback])
    assert len(callback.values()) == 2
    assert sorted(run.steps for run in tmm.list_runs(tmp_path / "runs")) == [2, 3]


def test_a_checkpoint_may_be_restored_in_the_middle_of_a_training(tmp_path: Path) -> None:
    data = batches(6)
    saving, callback = saver(tmp_path, save_every_n_train_steps=2), Recording(tmp_path / "runs")

    class GoingBack(Callback):
        is_done = False

        def on_train_step_end(self, state: Any, unit: Any) -> None:
            if unit.train_progress.num_steps_completed == 5 and not self.is_done:
                self.is_done = True
                (path,) = (tmp_path / "checkpoints").glob("*step_2")
                DistributedCheckpointSaver.restore(str(path), unit)

    unit = auto_unit({})
    train(unit, data, max_steps=6, callbacks=[GoingBack(), saving, callback])
    assert len(callback.values()) == 6
    assert unit.train_progress.num_steps_completed == 6
    assert record(tmp_path / "runs").status == "finished"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    unit = auto_unit({})
    unit.tmm_run = "mine"
    with pytest.raises(ValueError, match="has an attribute 'tmm_run' already"):
        Recording(tmp_path).track(unit)


# Several trainings


def test_one_callback_and_two_units(tmp_path: Path) -> None:
    callback = Recording(tmp_path)
    for _ in range(2):
        train(auto_unit({}), batches(3), max_epochs=1, callbacks=[callback])
        assert len(callback.values()) == 3
    assert len(tmm.list_runs(tmp_path)) == 2


def test_two_callbacks_for_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two TMMCallbacks measure the same module"):
        both = [Recording(tmp_path), Recording(tmp_path)]
        train(auto_unit({}), batches(1), max_epochs=1, callbacks=both)
    assert record(tmp_path).status == "failed"


def test_a_unit_that_trains_on_goes_on_with_its_run(tmp_path: Path) -> None:
    unit, callback = auto_unit({"accumulation": 2}), Recording(tmp_path)
    train(unit, batches(3), max_epochs=1, callbacks=[callback])
    train(unit, batches(3), max_epochs=2, callbacks=[Recording(tmp_path)])
    assert len(callback.values()) == 4
    assert record(tmp_path).status == "finished"


def test_a_run_that_is_given(tmp_path: Path) -> None:
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        callback, unit = TMMCallback(SPEC, run=run), auto_unit({})
        train(unit, batches(3), max_epochs=1, callbacks=[callback])
        evaluate(unit, batches(2), callbacks=[callback])
        run.log({"after": 1.0})
        with pytest.raises(ValueError, match="at step 2 already; .* a run of its own"):
            train(auto_unit({}), batches(3), max_epochs=1, callbacks=[callback])
        assert not run.is_finished
    with tmm.open_run(run.path) as recorded:
        assert recorded.steps.tolist() == [0, 1, 2]
        assert {"after", "eval/loss", "activation/last/rms"} <= recorded.at(2).keys()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    from torch.optim import optimizer as hooks

    found = hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks
    before = [dict(each) for each in found]
    unit = auto_unit(SETTINGS["fp16_clip"])
    kind = type(unit.grad_scaler)
    for callbacks in ([], [Failing(at=1)]):
        train_or_fail(unit, [Recording(tmp_path), *callbacks])
        assert [dict(each) for each in found] == before
        assert "_update_weights" not in vars(unit)
        assert type(unit.grad_scaler) is kind
        assert unit.tmm_run.training is None
        with pytest.raises(ValueError, match="not instrumented"):
            tmm.monitor(unit.module)


def train_or_fail(unit: Unit, callbacks: list[Any]) -> None:
    unit.train_progress._num_steps_completed = unit.train_progress._num_epochs_completed = 0
    if len(callbacks) == 1:
        train(unit, batches(2), max_epochs=1, callbacks=callbacks)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            train(unit, batches(2), max_epochs=1, callbacks=callbacks)


def test_copies_of_a_unit_in_training_are_whole(tmp_path: Path) -> None:
    copies: list[Unit] = []

    class Copying(Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            unit._prefetch_stream = None
            copies.append(copy.deepcopy(unit))
            copies.append(pickle.loads(pickle.dumps(unit)))

    unit = auto_unit({"clip_norm": 0.3})
    callback = Recording(tmp_path)
    train(unit, batches(1), max_epochs=1, callbacks=[callback, Copying()])
    weights = copy.deepcopy(unit.module.state_dict())
    truth = auto_unit({"clip_norm": 0.3})
    torch.manual_seed(5)
    train(truth, batches(1), max_epochs=1)
    torch.manual_seed(5)
    train(truth, batches(2), max_epochs=2)
    for each in copies:
        assert each.tmm_run.training is None
        torch.manual_seed(5)
        train(each, batches(2), max_epochs=2)
        assert not torch.equal(each.module.last.weight, weights["last.weight"])
    assert all(torch.equal(value, weights[key]) for key, value in unit.module.state_dict().items())
    assert len(callback.values()) == 1


# How a training ends


def test_a_failed_training(tmp_path: Path) -> None:
    callback = Recording(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(auto_unit({}), batches(4), max_epochs=1, callbacks=[callback, Failing(at=2)])
    assert record(tmp_path).status == "failed"
    assert len(callback.values()) == 2


def test_an_alert_that_raises_ends_the_training(tmp_path: Path) -> None:
    spec = tmm.Spec(tmm.activation("nan_count"), alerts=True, on_alert="raise")
    data = [*batches(2), (torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(tmm.AlertError):
        train(auto_unit({}), data, max_epochs=1, callbacks=[Recording(tmp_path, spec)])
    assert record(tmp_path).status == "failed"
    assert record(tmp_path).last_step == 2


def test_a_wrong_pattern_fails_at_the_start(tmp_path: Path) -> None:
    callback = Recording(tmp_path, tmm.Spec(tmm.activation("rms", modules="attention")))
    unit = auto_unit({})
    with pytest.raises(ValueError, match="attention"):
        train(unit, batches(1), max_epochs=1, callbacks=[callback])
    assert unit.train_progress.num_steps_completed == 0
    assert record(tmp_path).status == "failed"


def test_a_training_that_is_stopped_early(tmp_path: Path) -> None:
    unit, callback = auto_unit({}), Recording(tmp_path)
    unit.value = 1.0
    stopping = EarlyStopping("value", EarlyStopChecker("min", patience=2), interval="step")
    train(unit, batches(9), max_epochs=1, callbacks=[stopping, callback])
    found = record(tmp_path)
    assert (found.status, found.last_step) == ("stopped", 2)
    assert "state.stop() was called" in found.reason


def test_after_a_keyboard_interrupt(tmp_path: Path) -> None:
    data, unit, callback = batches(4), auto_unit({}), Recording(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(unit, data, max_epochs=1, callbacks=[callback, Interrupting(at=2)])
    assert record(tmp_path).status == "running"
    train(unit, data, max_epochs=1, callbacks=[Recording(tmp_path)])  # a new one, the same unit
    assert record(tmp_path).status == "finished"
    with pytest.raises(KeyboardInterrupt):
        train(auto_unit({}), data, max_epochs=1, callbacks=[callback, Interrupting(at=2)])
    callback.stop()
    assert sorted(run.status for run in tmm.list_runs(tmp_path)) == ["finished", "stopped"]


INTERRUPTED = """
import sys
import tmm
assert "torchtnt" not in sys.modules
from pathlib import Path
from torchtnt.framework.train import train
from tests.torchtnt_units import Interrupting, Recording, auto_unit, batches

callbacks = [Recording(Path(sys.argv[1])), Interrupting(at=2)]
train(auto_unit({}), batches(4), max_epochs=1, callbacks=callbacks)
"""


def test_a_process_that_is_interrupted_ends_and_leaves_a_failed_run(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "KeyboardInterrupt" in result.stderr
    assert result.returncode
    found = record(tmp_path)
    assert (found.status, found.last_step) == ("failed", 1)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tmm.integrations.torchtnt")
    monkeypatch.setitem(sys.modules, "torchtnt.framework.auto_unit", None)
    message = r"needs TorchTNT: pip install 'tmm-compile\[torchtnt\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("tmm.integrations.torchtnt")


# Neighbours


def neighbours(root: Path, unit: Unit, loggers: list[Any]) -> list[Callback]:
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    board = TensorBoardLogger(str(root / "board"))
    unit.value = 1.0
    return [
        LearningRateMonitor(loggers, logging_interval="step"),
        TensorBoardParameterMonitor(board),
        SystemResourcesMonitor([board], logging_interval="step"),
        ThroughputLogger(board, {"Batches": 1}),
        IterationTimeLogger(board),
        EarlyStopping("value", EarlyStopChecker("min", patience=2), interval="epoch"),
        PyTorchProfiler(profiler),
        TorchCompile(step_shutdown_compile_workers=1),
        TimeLimitInterrupter(duration="00:10:00"),
        saver(root, save_every_n_train_steps=7, save_every_n_epochs=2),
    ]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_neighbours_do_what_they_do_without_tmm(tmp_path: Path) -> None:
    plain = train_beside_neighbours(tmp_path / "plain", None)
    for position in (0, -1):
        root = tmp_path / str(position)
        callback = Recording(root / "runs")
        watched = train_beside_neighbours(root, callback, position)
        assert watched[:-1] == plain[:-1]
        assert all(torch.equal(value, watched[-1][key]) for key, value in plain[-1].items())
        assert record(root / "runs").status == "stopped"  # by EarlyStopping, after three epochs
        rows = callback.values()
        assert len(rows) == 9
        # What others log as a batch begins belongs to its step, whatever the order of callbacks.
        (rate,) = {key for row in rows for key in row if key.startswith("optimizers/")}
        assert [row[rate] for row in rows] == [row["learning_rate"] for row in rows]
        assert len({row[rate] for row in rows}) == 3


def train_beside_neighbours(root: Path, callback: Recording | None, position: int = 0) -> list[Any]:
    root.mkdir(exist_ok=True)
    data, memory = batches(1) * 5, InMemoryLogger()
    unit = auto_unit({"clip_norm": 0.3, "accumulation": 2}, "parameters")
    unit.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(unit.optimizer, 0.5)
    table, lines = CSVLogger(str(root / "a.csv")), JSONLogger(str(root / "a.json"))
    loggers = [memory, table, lines]
    callbacks = neighbours(root, unit, loggers)
    if callback is not None:
        loggers.append(callback.logger)
        callbacks.insert(position if position == 0 else len(callbacks), callback)
    torch.manual_seed(0)
    fit(unit, data, data[:2], max_epochs=9, callbacks=callbacks)
    table.close()
    lines.close()
    assert list((root / "board").iterdir())
    return [
        [{k: v for k, v in row.items() if k != "time"} for row in memory.log_buffer.values()],
        sorted(path.name for path in (root / "checkpoints").iterdir()),
        [len((root / name).read_text().splitlines()) for name in ("a.csv", "a.json")],
        unit.train_progress.state_dict(),
        unit.eval_progress.state_dict(),
        unit.module.state_dict(),
    ]


def test_a_snapshot(tmp_path: Path) -> None:
    pytest.importorskip("torchsnapshot.knobs")  # newer than what is released
    from torchtnt.framework.callbacks import TorchSnapshotSaver

    saving = TorchSnapshotSaver(str(tmp_path / "snapshots"), save_every_n_epochs=1)
    callback = Recording(tmp_path / "runs")
    train(auto_unit({}), batches(3), max_epochs=1, callbacks=[callback, saving])
    unit = auto_unit({})
    callback.track(unit)
    TorchSnapshotSaver.restore_from_latest(saving.dirpath, unit)
    train(unit, batches(3), max_epochs=2, callbacks=[callback, saving])
    assert len(callback.values()) == 6


@pytest.mark.usefixtures("process_group")
def test_a_module_in_distributed_data_parallel(tmp_path: Path) -> None:
    data, callback = batches(5), Recording(tmp_path)
    unit = auto_unit({"accumulation": 2, "clip_norm": 0.3}, strategy="ddp")
    torch.manual_seed(0)
    train(unit, data, max_epochs=1, callbacks=[callback])
    torch.manual_seed(0)
    _, truth = by_hand(data, accumulation=2, clip_norm=0.3)
    assert_equal_values(callback.values(), truth)


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    (example,) = re.findall(r"^## TorchTNT\n.*?```python\n(.*?)```", text, flags=re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names = {"Unit": Unit, "Net": Net, "loader": batches(4), "evaluation": batches(2, seed=3)}
    for _ in range(2):  # as a job that is started again
        exec(compile(example, "integrations.md", "exec"), names)
    found = record(tmp_path / "runs")
    assert found.status == "finished"
