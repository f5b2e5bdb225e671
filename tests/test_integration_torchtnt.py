"""Trainings inside TorchTNT against loops written by hand, which know nothing of tmm."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import tmm
from tests.interpreters import ROOT, Interpreters
from tests.lazily import Lazily

if TYPE_CHECKING:
    from torchtnt.framework.callback import Callback

    from tests.torchtnt_units import Recording, Unit

units = Lazily("tests.torchtnt_units")
tnt_callbacks, tnt_loggers = (
    Lazily("torchtnt.framework.callbacks"),
    Lazily("torchtnt.utils.loggers"),
)
tnt_stopping = Lazily("torchtnt.utils.early_stop_checker")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(find_spec("torchtnt") is None, reason="needs TorchTNT"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": 3},
    "clip_norm": {"clip_norm": 0.3},
    "clip_value": {"clip_value": 0.02, "accumulation": 2},
    "bf16": {"precision": torch.bfloat16, "clip_norm": 0.3},
    "fp16": {"precision": torch.float16},
    "fp16_clip": {"precision": torch.float16, "clip_norm": 0.3, "accumulation": 2},
}
COMPILED = ["uncompiled", "parameters", "handed_in", "in_place"]


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
    settings, data = SETTINGS[name], units.batches(8)
    unit, callback = units.auto_unit(settings, compiled), units.Recording(tmp_path)
    torch.manual_seed(0)
    units.train(unit, data, max_epochs=2, callbacks=[callback])
    after = torch.get_rng_state()
    torch.manual_seed(0)
    scaler = units.new_scaler() if unit.grad_scaler else None
    module, truth = units.by_hand(data, epochs=2, scaler=scaler, **settings)
    assert torch.equal(after, torch.get_rng_state())
    units.assert_equal_weights(unit.module, module)
    half = settings.get("precision") is not None
    units.assert_equal_values(callback.values(), truth, 1e-3 if half else 1e-5)
    if scaler is not None and unit.grad_scaler is not None:
        assert {values["step/skipped"] for values in truth} == {0.0, 1.0}
        assert unit.grad_scaler.state_dict() == scaler.state_dict()


def test_gradients_after_clipping_are_the_lesser(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path)
    units.train(
        units.auto_unit({"clip_norm": 0.5}), units.batches(8), max_epochs=1, callbacks=[callback]
    )
    seen = set()
    for values in callback.values():
        before, after = values["step/gradient_norm_before_clip"], values["step/gradient_norm"]
        assert after == pytest.approx(min(before, 0.5), rel=1e-4)
        seen.add(before > 0.5)
    assert seen == {True, False}


def test_without_clipping_nothing_is_measured_before_it(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path)
    units.train(units.auto_unit({}), units.batches(1), max_epochs=1, callbacks=[callback])
    assert not [key for key in callback.values()[0] if "before_clip" in key]


def test_a_window_that_spans_epochs_is_one_step(tmp_path: Path) -> None:
    # TorchTNT steps at the end of the data, but not where max_steps_per_epoch cuts it off.
    losses: list[float] = []

    class Collecting(units.Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            losses.append(state.train_state.step_output[0].item())

    unit, callback = units.auto_unit({"accumulation": 2}), units.Recording(tmp_path)
    callbacks = [callback, Collecting()]
    units.train(unit, units.batches(9), max_epochs=3, max_steps_per_epoch=3, callbacks=callbacks)
    expected = [sum(losses[:2]), sum(losses[2:5]), sum(losses[5:8])]
    assert [values["loss"] for values in callback.values()] == pytest.approx(expected)
    assert unit.tmm_run.state_dict()["step"] == 3
    assert units.record(tmp_path).status == "finished"


@pytest.mark.parametrize(
    "further",
    [
        lambda: {
            "activation_checkpoint_params": units.ActivationCheckpointParams(
                units.CheckpointImpl.NO_REENTRANT
            )
        },
        lambda: {
            "swa_params": units.SWAParams(warmup_steps_or_epochs=0, step_or_epoch_update_freq=1)
        },
        lambda: {"detect_anomaly": True},
    ],
    ids=["activation_checkpoint", "average", "anomaly"],
)
def test_further_settings_of_a_unit(tmp_path: Path, further: Callable[[], dict[str, Any]]) -> None:
    data = units.batches(4)
    unit, callback = units.auto_unit({"accumulation": 2}, **further()), units.Recording(tmp_path)
    torch.manual_seed(0)
    units.train(unit, data, max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    module, truth = units.by_hand(data, epochs=2, accumulation=2)
    units.assert_equal_values(callback.values(), truth)
    for left, right in zip(unit.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_learning_rate_is_the_one_of_the_step(tmp_path: Path) -> None:
    unit = units.Unit(module=units.Net(), device=torch.device("cpu"), step_lr_interval="step")
    callback = units.Recording(tmp_path)
    units.train(unit, units.batches(4), max_epochs=1, callbacks=[callback])
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
        parameters = units.TorchCompileParams(backend=counting.backend())
        unit = units.Unit(
            module=units.Net(), torch_compile_params=parameters, device=torch.device("cpu")
        )
        data = [units.batches(1)[0]] * 6
        units.fit(unit, data, data[:2], max_epochs=2, evaluate_every_n_steps=2, callbacks=callbacks)
        return counting.graphs, sum(counters["graph_break"].values())

    plain = graphs([])
    spec = tmm.Spec(*units.SPEC.rules, every=2)
    assert plain == (2, 0)  # training and evaluation
    assert graphs([units.Recording(tmp_path, spec)]) == (3, 0)  # one more that measures


def test_it_is_said_that_no_graph_was_captured(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    parameters = units.TorchCompileParams(backend="aot_eager")
    unit = units.Unit(module=module, torch_compile_params=parameters, device=torch.device("cpu"))
    callback = units.Recording(tmp_path)
    with pytest.warns(tmm.MonitoringWarning, match=r"no graph was captured: Sequential.compile"):
        units.train(unit, units.batches(2), max_epochs=1, callbacks=[callback])
    assert "activation/2/rms" in callback.values()[1]


# Evaluation and prediction


@pytest.mark.parametrize("accumulation", [1, 3])
def test_evaluation_does_not_mix_with_training(tmp_path: Path, accumulation: int) -> None:
    data, other = units.batches(8), units.batches(3, seed=9)
    unit, callback = units.auto_unit({"accumulation": accumulation}), units.Recording(tmp_path)

    class Predicting(units.Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            units.predict(unit, other, callbacks=[callback])

        def on_eval_step_start(self, state: Any, unit: Any) -> None:
            with callback.paused():  # ends before the evaluation does
                unit.module(torch.ones(2, 4))

    torch.manual_seed(0)
    units.fit(
        unit,
        data,
        other,
        max_epochs=2,
        evaluate_every_n_steps=2,
        callbacks=[Predicting(), callback],
    )
    torch.manual_seed(0)
    module, truth = units.by_hand(data, epochs=2, accumulation=accumulation)
    units.assert_equal_weights(unit.module, module)
    values = callback.values()
    with torch.no_grad():
        losses = [cross_entropy(unit.module.eval()(x), y).item() for x, y in other]
    assert values[-1]["eval/loss"] == pytest.approx(sum(losses) / 3)
    evaluated = [step for step, row in enumerate(values) if "eval/loss" in row]
    assert evaluated == ([1, 3, 5, 7, 9, 11, 13, 15] if accumulation == 1 else [0, 1, 2, 3, 4, 5])
    for row in values:
        row.pop("eval/loss", None)
    units.assert_equal_values(values, truth)


def test_evaluation_and_prediction_alone_record_nothing(tmp_path: Path) -> None:
    unit, callback = units.auto_unit({}), units.Recording(tmp_path)
    units.evaluate(unit, units.batches(2), callbacks=[callback])
    units.predict(unit, units.batches(2), callbacks=[callback])
    assert callback.run is None
    assert not tmm.list_runs(tmp_path)
    units.train(unit, units.batches(2), max_epochs=1, callbacks=[callback])
    before = callback.values()
    units.evaluate(unit, units.batches(2), callbacks=[callback])
    assert callback.values() == before


def test_an_error_of_a_prediction_inside_a_training_is_not_its_error(tmp_path: Path) -> None:
    unit, callback = units.auto_unit({"accumulation": 2}), units.Recording(tmp_path)

    class Predicting(units.Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            with pytest.raises(TypeError):
                units.predict(units.auto_unit({}), [("text", 0)], callbacks=[callback])

    data = units.batches(4)
    torch.manual_seed(0)
    units.train(unit, data, max_epochs=1, callbacks=[Predicting(), callback])
    torch.manual_seed(0)
    units.assert_equal_values(callback.values(), units.by_hand(data, accumulation=2)[1])
    assert units.record(tmp_path).status == "finished"


# Units of one's own


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_train_unit(tmp_path: Path, accumulation: int) -> None:
    data = units.batches(6)
    callback = units.Recording(tmp_path)
    unit = units.OwnUnit(callback, accumulation)
    torch.manual_seed(0)
    units.fit(unit, data, data[:2], max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    module, truth = units.by_hand(data, epochs=2, accumulation=accumulation, clip_norm=0.3)
    units.assert_equal_weights(unit.network, module)
    values = callback.values()
    assert values[6 // accumulation - 1].pop("eval/accuracy") == values[-1].pop("eval/accuracy")
    assert [row.pop("half") * 2 for row in values] == pytest.approx([row["loss"] for row in truth])
    units.assert_equal_values(values, truth)


def test_a_unit_that_takes_its_batches_from_an_iterator(tmp_path: Path) -> None:
    data, callback = units.batches(3), units.Recording(tmp_path)
    torch.manual_seed(0)
    units.fit(units.IteratorUnit(), data, data, max_epochs=2, callbacks=[callback])
    torch.manual_seed(0)
    values = callback.values()
    assert [row.pop("eval/size", None) for row in values] == [None, None, 4, None, None, 4]
    units.assert_equal_values(values, units.by_hand(data, epochs=2)[1])
    assert units.record(tmp_path).status == "finished"
    with tmm.open_run(units.record(tmp_path).path) as run:
        assert not run.events  # no step that was opened for a batch that there was not


def test_one_of_two_networks(tmp_path: Path) -> None:
    both = [units.Recording(tmp_path, module="judge"), units.Recording(tmp_path, module="maker")]
    units.train(units.Adversarial(), units.batches(7), max_epochs=1, callbacks=both)
    assert [len(callback.values()) for callback in both] == [7, 2]
    rates = [set(callback.values()[0]) & {"learning_rate"} for callback in both]
    assert rates == [{"learning_rate"}] * 2
    assert [run.status for run in tmm.list_runs(tmp_path)] == ["finished"] * 2


def test_an_optimizer_that_the_unit_does_not_track(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path, module="maker")
    units.train(
        units.Adversarial(hidden=True), units.batches(7), max_epochs=1, callbacks=[callback]
    )
    values = callback.values()
    assert len(values) == 2
    assert "gradient/last.weight/norm" in values[0]


@pytest.mark.parametrize("order", [1, -1])
def test_two_modules_of_one_auto_unit(tmp_path: Path, order: int) -> None:
    unit = units.Joined(module=units.Net(), device=torch.device("cpu"), clip_grad_norm=0.1)
    unit.other = units.Net()
    parameters = [*unit.module.parameters(), *unit.other.parameters()]
    unit.optimizer = torch.optim.AdamW(parameters, lr=0.05)
    both = [units.Recording(tmp_path / name, module=name) for name in ("module", "other")]
    units.train(unit, units.batches(2), max_epochs=1, callbacks=both[::order])
    for callback in both:
        values = callback.values()
        assert len(values) == 2
        assert "step/gradient_norm_before_clip" in values[1]
    assert "_update_weights" not in vars(unit)


def test_two_networks_without_a_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The unit has judge, maker; .*module='name'"):
        units.train(
            units.Adversarial(),
            units.batches(1),
            max_epochs=1,
            callbacks=[units.Recording(tmp_path)],
        )
    with pytest.raises(ValueError, match="module='x' is none of the unit's: judge, maker"):
        callback = units.Recording(tmp_path, module="x")
        units.train(units.Adversarial(), units.batches(1), max_epochs=1, callbacks=[callback])
    assert not tmm.list_runs(tmp_path)


def test_several_scalers_need_a_choice(tmp_path: Path) -> None:
    unit = units.OwnUnit()
    unit.first, unit.second = units.new_scaler(), units.new_scaler()
    with pytest.raises(ValueError, match="unit has first, second; .*scaler='name'"):
        units.train(unit, units.batches(1), max_epochs=1, callbacks=[units.Recording(tmp_path)])
    with pytest.raises(ValueError, match="scaler='third' is no GradScaler"):
        units.train(
            unit,
            units.batches(1),
            max_epochs=1,
            callbacks=[units.Recording(tmp_path, scaler="third")],
        )
    units.train(
        unit, units.batches(1), max_epochs=1, callbacks=[units.Recording(tmp_path, scaler="first")]
    )


def test_parts_are_measured_where_the_call_of_the_whole_is_bypassed(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path)
    units.train(units.Bypassing(), units.batches(2), max_epochs=1, callbacks=[callback])
    assert any(key.startswith("activation/") for key in callback.values()[0])
    assert not any(key.startswith("activation/[root module]") for key in callback.values()[0])


def test_it_is_said_that_no_optimizer_has_stepped(tmp_path: Path) -> None:
    unit = units.OwnUnit(accumulation=100)
    with pytest.warns(tmm.MonitoringWarning, match="no optimizer .* has stepped"):
        units.train(unit, units.batches(2), max_epochs=1, callbacks=[units.Recording(tmp_path)])


def test_a_forward_pass_to_look_at_can_be_left_out(tmp_path: Path) -> None:
    data, callback = units.batches(4), units.Recording(tmp_path)

    class Looking(units.Unit):
        def on_train_step_end(self, *_: Any) -> None:
            with callback.paused(), torch.no_grad():
                self.module.eval()(torch.ones(2, 4))
                self.module.train()

    unit = Looking(module=units.Net(), device=torch.device("cpu"), gradient_accumulation_steps=2)
    unit.lr_scheduler = None
    torch.manual_seed(0)
    units.train(unit, data, max_epochs=1, callbacks=[callback])
    torch.manual_seed(0)
    units.assert_equal_values(callback.values(), units.by_hand(data, accumulation=2)[1])


# Checkpoints


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["distributed", "snapshot"])
def test_a_training_goes_on_with_its_run(
    tmp_path: Path, kind: str, accumulation: int, order: int
) -> None:
    data, settings = units.batches(5), {"accumulation": accumulation, "clip_norm": 0.3}
    options: dict[str, Any] = {"save_every_n_epochs": 1}
    saver_kind: Any = units.DistributedCheckpointSaver
    if kind == "snapshot":
        knobs = pytest.importorskip("torchsnapshot.knobs", reason="needs torchsnapshot-nightly")
        if not hasattr(knobs, "override_max_per_rank_io_concurrency"):
            pytest.skip("this torchsnapshot is too old for TorchTNT")
        from torchtnt.framework.callbacks import TorchSnapshotSaver

        # In the background it wants a host with IPv6, unless a process group is there.
        saver_kind, options["async_checkpoint"] = TorchSnapshotSaver, False

    def start(unit: Unit, further: list[Callback]) -> Recording:
        callback = units.Recording(tmp_path / "runs")
        callback.track(unit)
        saving = saver_kind(str(tmp_path / "checkpoints"), **options)
        saver_kind.restore_from_latest(saving.dirpath, unit)
        torch.manual_seed(unit.train_progress.num_epochs_completed)
        units.train(unit, data, max_epochs=2, callbacks=[*[callback, saving][::order], *further])
        return callback

    with pytest.raises(RuntimeError, match="out of memory"):
        start(units.auto_unit(settings), [units.Failing(at=8)])
    broken = units.record(tmp_path / "runs")
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: out of memory")
    resumed = units.auto_unit(settings)
    callback = start(resumed, [])
    assert units.record(tmp_path / "runs").status == "finished"
    assert callback.run is not None
    assert callback.run.id == broken.id

    class Seeding(units.Callback):
        def on_train_epoch_start(self, state: Any, unit: Any) -> None:
            torch.manual_seed(unit.train_progress.num_epochs_completed)

    whole, other = units.auto_unit(settings), units.Recording(tmp_path / "other")
    units.train(whole, data, max_epochs=2, callbacks=[other, Seeding()])
    units.assert_equal_weights(resumed.module, whole.module)
    units.assert_equal_values(callback.values(), other.values(), tolerance=0)
    assert len(callback.values()) == (10 if accumulation == 1 else 6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_checkpoint_within_an_epoch_knows_the_step(tmp_path: Path, order: int) -> None:
    saving, callback = (
        units.saver(tmp_path, save_every_n_train_steps=1),
        units.Recording(tmp_path / "runs"),
    )
    unit = units.auto_unit({"accumulation": 2})
    units.train(unit, units.batches(5), max_epochs=1, callbacks=[callback, saving][::order])
    steps = []
    for number in range(2, 6):  # optimizers that have not stepped cannot be restored
        fresh = units.auto_unit({"accumulation": 2})
        callback.track(fresh)
        (path,) = (tmp_path / "checkpoints").glob(f"epoch_0*step_{number}")
        units.DistributedCheckpointSaver.restore(str(path), fresh)
        state = fresh.tmm_run.state_dict()
        assert Path(state["path"]).name == units.record(tmp_path / "runs").id
        steps.append(state["step"])
    assert steps == [1, 1, 2, 3]


def test_checkpoints_load_without_tmm(tmp_path: Path) -> None:
    saving, unit = units.saver(tmp_path), units.auto_unit({}, "parameters")
    units.train(
        unit, units.batches(3), max_epochs=1, callbacks=[units.Recording(tmp_path / "runs"), saving]
    )
    keys = set(unit.app_state()) - {"tmm_run"}
    fresh = units.auto_unit({})
    assert set(fresh.app_state()) == keys
    assert units.DistributedCheckpointSaver.restore_from_latest(saving.dirpath, fresh)
    units.assert_equal_weights(fresh.module, unit.module)
    assert fresh.module.state_dict().keys() == units.Net().state_dict().keys()


def test_an_older_checkpoint_is_restored_before_the_unit_is_tracked(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.api import CheckpointException

    saving, data = units.saver(tmp_path, save_every_n_epochs=1), units.batches(5)
    units.train(units.auto_unit({"accumulation": 2}), data, max_epochs=2, callbacks=[saving])
    unit, callback = units.auto_unit({"accumulation": 2}), units.Recording(tmp_path / "runs")
    callback.track(unit)
    with pytest.raises(CheckpointException, match=r"Missing key .*app_state\.tmm_run"):
        units.DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit)
    in_part = units.auto_unit({"accumulation": 2})
    callback.track(in_part)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    units.DistributedCheckpointSaver.restore_from_latest(saving.dirpath, in_part, planner=planner)
    units.train(in_part, data, max_epochs=2, callbacks=[units.Recording(tmp_path / "in_part")])
    assert in_part.tmm_run.state_dict()["step"] == 6
    unit = units.auto_unit({"accumulation": 2})
    units.DistributedCheckpointSaver.restore_from_latest(saving.dirpath, unit)
    units.train(unit, data, max_epochs=3, callbacks=[callback, saving])
    with tmm.open_run(units.record(tmp_path / "runs").path) as run:
        assert run.steps.tolist() == [6, 7, 8]
    fresh = units.auto_unit({"accumulation": 2})
    callback.track(fresh)
    units.DistributedCheckpointSaver.restore_from_latest(saving.dirpath, fresh)
    assert fresh.tmm_run.state_dict()["step"] == 9


def test_a_training_that_starts_anew_from_a_checkpoint_has_a_run_of_its_own(tmp_path: Path) -> None:
    saving, callback = units.saver(tmp_path), units.Recording(tmp_path / "runs")
    units.train(units.auto_unit({}), units.batches(3), max_epochs=1, callbacks=[callback, saving])
    unit = units.auto_unit({})
    callback.track(unit)
    from torchtnt.framework.callbacks.checkpointer_types import RestoreOptions

    options = RestoreOptions(restore_train_progress=False)
    units.DistributedCheckpointSaver.restore_from_latest(
        saving.dirpath, unit, restore_options=options
    )
    units.train(unit, units.batches(2), max_epochs=1, callbacks=[callback])
    assert len(callback.values()) == 2
    assert sorted(run.steps for run in tmm.list_runs(tmp_path / "runs")) == [2, 3]


def test_a_checkpoint_may_be_restored_in_the_middle_of_a_training(tmp_path: Path) -> None:
    data = units.batches(6)
    saving, callback = (
        units.saver(tmp_path, save_every_n_train_steps=2),
        units.Recording(tmp_path / "runs"),
    )

    class GoingBack(units.Callback):
        is_done = False

        def on_train_step_end(self, state: Any, unit: Any) -> None:
            if unit.train_progress.num_steps_completed == 5 and not self.is_done:
                self.is_done = True
                (path,) = (tmp_path / "checkpoints").glob("*step_2")
                units.DistributedCheckpointSaver.restore(str(path), unit)

    unit = units.auto_unit({})
    units.train(unit, data, max_steps=6, callbacks=[GoingBack(), saving, callback])
    assert len(callback.values()) == 6
    assert unit.train_progress.num_steps_completed == 6
    assert units.record(tmp_path / "runs").status == "finished"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    unit = units.auto_unit({})
    unit.tmm_run = "mine"
    with pytest.raises(ValueError, match="has an attribute 'tmm_run' already"):
        units.Recording(tmp_path).track(unit)


# Several trainings


def test_one_callback_and_two_units(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path)
    for _ in range(2):
        units.train(units.auto_unit({}), units.batches(3), max_epochs=1, callbacks=[callback])
        assert len(callback.values()) == 3
    assert len(tmm.list_runs(tmp_path)) == 2


def test_two_callbacks_for_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two TMMCallbacks measure the same module"):
        both = [units.Recording(tmp_path), units.Recording(tmp_path)]
        units.train(units.auto_unit({}), units.batches(1), max_epochs=1, callbacks=both)
    assert units.record(tmp_path).status == "failed"


def test_a_unit_that_trains_on_goes_on_with_its_run(tmp_path: Path) -> None:
    unit, callback = units.auto_unit({"accumulation": 2}), units.Recording(tmp_path)
    units.train(unit, units.batches(3), max_epochs=1, callbacks=[callback])
    units.train(unit, units.batches(3), max_epochs=2, callbacks=[units.Recording(tmp_path)])
    assert len(callback.values()) == 4
    assert units.record(tmp_path).status == "finished"


def test_a_run_that_is_given(tmp_path: Path) -> None:
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        callback, unit = units.TMMCallback(units.SPEC, run=run), units.auto_unit({})
        units.train(unit, units.batches(3), max_epochs=1, callbacks=[callback])
        units.evaluate(unit, units.batches(2), callbacks=[callback])
        run.log({"after": 1.0})
        with pytest.raises(ValueError, match="at step 2 already; .* a run of its own"):
            units.train(units.auto_unit({}), units.batches(3), max_epochs=1, callbacks=[callback])
        assert not run.is_finished
    with tmm.open_run(run.path) as recorded:
        assert recorded.steps.tolist() == [0, 1, 2]
        assert {"after", "eval/loss", "activation/last/rms"} <= recorded.at(2).keys()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    from torch.optim import optimizer as hooks

    found = hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks
    before = [dict(each) for each in found]
    unit = units.auto_unit(SETTINGS["fp16_clip"])
    kind = type(unit.grad_scaler)
    for callbacks in ([], [units.Failing(at=1)]):
        train_or_fail(unit, [units.Recording(tmp_path), *callbacks])
        assert [dict(each) for each in found] == before
        assert "_update_weights" not in vars(unit)
        assert type(unit.grad_scaler) is kind
        assert unit.tmm_run.training is None
        with pytest.raises(ValueError, match="not instrumented"):
            tmm.monitor(unit.module)


def train_or_fail(unit: Unit, callbacks: list[Any]) -> None:
    unit.train_progress._num_steps_completed = unit.train_progress._num_epochs_completed = 0
    if len(callbacks) == 1:
        units.train(unit, units.batches(2), max_epochs=1, callbacks=callbacks)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            units.train(unit, units.batches(2), max_epochs=1, callbacks=callbacks)


def test_copies_of_a_unit_in_training_are_whole(tmp_path: Path) -> None:
    copies: list[Unit] = []

    class Copying(units.Callback):
        def on_train_step_end(self, state: Any, unit: Any) -> None:
            unit._prefetch_stream = None
            copies.append(copy.deepcopy(unit))
            copies.append(pickle.loads(pickle.dumps(unit)))

    unit = units.auto_unit({"clip_norm": 0.3})
    callback = units.Recording(tmp_path)
    units.train(unit, units.batches(1), max_epochs=1, callbacks=[callback, Copying()])
    weights = copy.deepcopy(unit.module.state_dict())
    truth = units.auto_unit({"clip_norm": 0.3})
    torch.manual_seed(5)
    units.train(truth, units.batches(1), max_epochs=1)
    torch.manual_seed(5)
    units.train(truth, units.batches(2), max_epochs=2)
    for each in copies:
        assert each.tmm_run.training is None
        torch.manual_seed(5)
        units.train(each, units.batches(2), max_epochs=2)
        assert not torch.equal(each.module.last.weight, weights["last.weight"])
    assert all(torch.equal(value, weights[key]) for key, value in unit.module.state_dict().items())
    assert len(callback.values()) == 1


# How a training ends


def test_a_failed_training(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        units.train(
            units.auto_unit({}),
            units.batches(4),
            max_epochs=1,
            callbacks=[callback, units.Failing(at=2)],
        )
    assert units.record(tmp_path).status == "failed"
    assert len(callback.values()) == 2


def test_an_alert_that_raises_ends_the_training(tmp_path: Path) -> None:
    spec = tmm.Spec(tmm.activation("nan_count"), alerts=True, on_alert="raise")
    data = [*units.batches(2), (torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(tmm.AlertError):
        units.train(
            units.auto_unit({}), data, max_epochs=1, callbacks=[units.Recording(tmp_path, spec)]
        )
    assert units.record(tmp_path).status == "failed"
    assert units.record(tmp_path).last_step == 2


def test_a_wrong_pattern_fails_at_the_start(tmp_path: Path) -> None:
    callback = units.Recording(tmp_path, tmm.Spec(tmm.activation("rms", modules="attention")))
    unit = units.auto_unit({})
    with pytest.raises(ValueError, match="attention"):
        units.train(unit, units.batches(1), max_epochs=1, callbacks=[callback])
    assert unit.train_progress.num_steps_completed == 0
    assert units.record(tmp_path).status == "failed"


def test_a_training_that_is_stopped_early(tmp_path: Path) -> None:
    unit, callback = units.auto_unit({}), units.Recording(tmp_path)
    unit.value = 1.0
    stopping = tnt_callbacks.EarlyStopping(
        "value", tnt_stopping.EarlyStopChecker("min", patience=2), interval="step"
    )
    units.train(unit, units.batches(9), max_epochs=1, callbacks=[stopping, callback])
    found = units.record(tmp_path)
    assert (found.status, found.last_step) == ("stopped", 2)
    assert "state.stop() was called" in found.reason


def test_after_a_keyboard_interrupt(tmp_path: Path) -> None:
    data, unit, callback = units.batches(4), units.auto_unit({}), units.Recording(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        units.train(unit, data, max_epochs=1, callbacks=[callback, units.Interrupting(at=2)])
    assert units.record(tmp_path).status == "running"
    units.train(
        unit, data, max_epochs=1, callbacks=[units.Recording(tmp_path)]
    )  # a new one, the same unit
    assert units.record(tmp_path).status == "finished"
    with pytest.raises(KeyboardInterrupt):
        units.train(
            units.auto_unit({}), data, max_epochs=1, callbacks=[callback, units.Interrupting(at=2)]
        )
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


def test_a_process_that_is_interrupted_ends_and_leaves_a_failed_run(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    result = interpreters.run(INTERRUPTED, tmp_path, folder=ROOT, warns=False)
    assert "KeyboardInterrupt" in result.stderr
    assert result.returncode
    found = units.record(tmp_path)
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
    board = tnt_loggers.TensorBoardLogger(str(root / "board"))
    unit.value = 1.0
    return [
        tnt_callbacks.LearningRateMonitor(loggers, logging_interval="step"),
        tnt_callbacks.TensorBoardParameterMonitor(board),
        tnt_callbacks.SystemResourcesMonitor([board], logging_interval="step"),
        tnt_callbacks.ThroughputLogger(board, {"Batches": 1}),
        tnt_callbacks.IterationTimeLogger(board),
        tnt_callbacks.EarlyStopping(
            "value", tnt_stopping.EarlyStopChecker("min", patience=2), interval="epoch"
        ),
        tnt_callbacks.PyTorchProfiler(profiler),
        tnt_callbacks.TorchCompile(step_shutdown_compile_workers=1),
        tnt_callbacks.TimeLimitInterrupter(duration="00:10:00"),
        units.saver(root, save_every_n_train_steps=7, save_every_n_epochs=2),
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
        callback = units.Recording(root / "runs")
        watched = train_beside_neighbours(root, callback, position)
        assert watched[:-1] == plain[:-1]
        assert all(torch.equal(value, watched[-1][key]) for key, value in plain[-1].items())
        assert (
            units.record(root / "runs").status == "stopped"
        )  # by EarlyStopping, after three epochs
        rows = callback.values()
        assert len(rows) == 9
        # What others log as a batch begins belongs to its step, whatever the order of callbacks.
        (rate,) = {key for row in rows for key in row if key.startswith("optimizers/")}
        assert [row[rate] for row in rows] == [row["learning_rate"] for row in rows]
        assert len({row[rate] for row in rows}) == 3


def train_beside_neighbours(root: Path, callback: Recording | None, position: int = 0) -> list[Any]:
    root.mkdir(exist_ok=True)
    data, memory = units.batches(1) * 5, tnt_loggers.InMemoryLogger()
    unit = units.auto_unit({"clip_norm": 0.3, "accumulation": 2}, "parameters")
    unit.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(unit.optimizer, 0.5)
    table, lines = (
        tnt_loggers.CSVLogger(str(root / "a.csv")),
        tnt_loggers.JSONLogger(str(root / "a.json")),
    )
    loggers = [memory, table, lines]
    callbacks = neighbours(root, unit, loggers)
    if callback is not None:
        loggers.append(callback.logger)
        callbacks.insert(position if position == 0 else len(callbacks), callback)
    torch.manual_seed(0)
    units.fit(unit, data, data[:2], max_epochs=9, callbacks=callbacks)
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


@pytest.mark.usefixtures("process_group")
def test_a_module_in_distributed_data_parallel(tmp_path: Path) -> None:
    data, callback = units.batches(5), units.Recording(tmp_path)
    unit = units.auto_unit({"accumulation": 2, "clip_norm": 0.3}, strategy="ddp")
    torch.manual_seed(0)
    units.train(unit, data, max_epochs=1, callbacks=[callback])
    torch.manual_seed(0)
    _, truth = units.by_hand(data, accumulation=2, clip_norm=0.3)
    units.assert_equal_values(callback.values(), truth)


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "torchtnt.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    names = {
        "Unit": units.Unit,
        "Net": units.Net,
        "loader": units.batches(4),
        "evaluation": units.batches(2, seed=3),
    }
    for _ in range(2):  # as a job that is started again
        exec(compile(example, "torchtnt.md", "exec"), names)
    found = units.record(tmp_path / "runs")
    assert found.status == "finished"
