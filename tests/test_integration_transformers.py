"""Trainings of ``transformers.Trainer``: as without tmm, and measured as a loop by hand would."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import tmm
from tests.lazily import Lazily

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("accelerate") is None,
    reason="needs transformers and accelerate",
)
trainings = Lazily("tests.transformers_trainings")
transformers, accelerate = Lazily("transformers"), Lazily("accelerate.state")


KEEP_COLUMNS = {"remove_unused_columns": False}  # the trainer cannot tell those of a wrapper


def history(trainer: Trainer) -> list[dict[str, str]]:
    """What the trainer has logged, but for times; as text, in which NaNs are equal."""
    return [
        {key: repr(value) for key, value in logs.items() if not is_time(key)}
        for logs in trainer.state.log_history
    ]


def is_time(key: str) -> bool:
    return "second" in key or "runtime" in key or "preparation_time" in key


def the_run(root: Path) -> Any:
    (record,) = tmm.list_runs(root)
    return record


def values(path: Path) -> dict[str, dict[int, float]]:
    """Each series of a run, but for times."""
    with tmm.open_run(path) as run:
        series = {key: run.series(key) for key in run.keys()}  # noqa: SIM118
    return {
        key: dict(zip(steps.tolist(), numbers.tolist(), strict=True))
        for key, (steps, numbers) in series.items()
        if not is_time(key)
    }


AOT = {"torch_compile": True, "torch_compile_backend": "aot_eager"}

WAYS: dict[str, Callable[[], tuple[nn.Module, list[TrainerCallback], dict[str, Any]]]] = {
    "not compiled": lambda: (trainings.Net(0.2), [], {}),
    "by the trainer": lambda: (trainings.Net(0.2), [], AOT),
    "in place, at the begin": lambda: (trainings.Net(0.2), [trainings.CompileAtBegin()], {}),
    "before": lambda: (torch.compile(trainings.Net(0.2), backend="aot_eager"), [], KEEP_COLUMNS),
    "bfloat16": lambda: (trainings.Net(0.2), [], {"bf16": True}),
    "bfloat16, by the trainer": lambda: (trainings.Net(0.2), [], {"bf16": True, **AOT}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_training_is_as_without_tmm(way: str, tmp_path: Path) -> None:
    results = []
    for own in ([], [trainings.callback(tmp_path / "runs")]):
        torch._dynamo.reset()
        counters.clear()
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        model, others, settings = WAYS[way]()
        trainer = trainings.trainer_of(model, tmp_path, *own, *others, **settings)
        trainer.train()
        graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        results.append((trainer, graphs, torch.get_rng_state()))
    (plain, plain_graphs, plain_random), (watched, graphs, random) = results
    parameters, watched_parameters = plain.model.state_dict(), watched.model.state_dict()
    assert list(parameters) == list(watched_parameters)
    assert all(torch.equal(parameters[name], watched_parameters[name]) for name in parameters)
    assert history(watched) == history(plain)
    assert torch.equal(random, plain_random)
    if plain_graphs[0]:
        assert graphs == plain_graphs
    found = values(the_run(tmp_path / "runs").path)
    assert list(found["activation/first/rms"]) == list(range(2 * trainings.STEPS))
    assert found["step/gradient_norm_before_clip"] == pytest.approx(found["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_values_are_those_of_a_loop_by_hand(compiled: bool, tmp_path: Path) -> None:
    settings = AOT if compiled else {}
    trainer = trainings.trainer_of(
        trainings.Net(), tmp_path, trainings.callback(tmp_path / "runs"), **settings
    )
    trainer.train()
    trainings.train_by_hand(tmp_path / "hand", compiled=compiled)
    found, expected = (values(the_run(tmp_path / root).path) for root in ("runs", "hand"))
    assert {key: found[key] for key in expected} == expected
    logged = {"loss", "grad_norm", "learning_rate", "epoch", "train_loss", "total_flos"}
    assert found.keys() - expected.keys() == logged
    assert found["loss"] == {
        i: logs["loss"] for i, logs in enumerate(trainer.state.log_history[:-1])
    }
    before, after = found["step/gradient_norm_before_clip"], found["step/gradient_norm"]
    assert after == pytest.approx(
        {step: min(norm, trainings.LIMIT) for step, norm in before.items()}, rel=1e-5
    )
    assert (
        min(before.values()) < trainings.LIMIT < max(before.values())
    )  # some are clipped, and some are not


def test_without_a_limit_nothing_is_measured_twice(tmp_path: Path) -> None:
    trainings.trainer_of(
        trainings.Net(), tmp_path, trainings.callback(tmp_path / "runs"), max_grad_norm=0
    ).train()
    found = values(the_run(tmp_path / "runs").path)
    assert found["step/gradient_norm"] == pytest.approx(found["grad_norm"], rel=1e-5)
    assert not [key for key in found if "before_clip" in key]


@pytest.fixture
def half_precision() -> Iterator[type[Trainer]]:
    yield trainings.HalfPrecisionTrainer
    accelerate.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_skipped_steps_told(
    half_precision: type[Trainer], fused: bool, clips: bool, tmp_path: Path
) -> None:
    trainers = []
    for own in ([], [trainings.callback(tmp_path / "runs")]):
        model = trainings.Net(0.2)
        trainer = trainings.trainer_of(
            model,
            tmp_path,
            *own,
            kind=half_precision,
            max_grad_norm=trainings.LIMIT if clips else 0.0,
            gradient_accumulation_steps=1,
            optimizers=(torch.optim.AdamW(model.parameters(), 0.05, fused=fused), None),
        )
        trainer.train()
        trainers.append(trainer)
    plain, watched = trainers
    assert watched.scales == plain.scales
    assert history(watched) == history(plain)
    found = values(the_run(tmp_path / "runs").path)
    assert list(found["step/grad_scale"].values()) == watched.scales
    skipped = found["step/skipped"]
    taken = [step for step, was_skipped in skipped.items() if not was_skipped]
    assert 0 < len(taken) < len(skipped)
    norms = found["step/gradient_norm_before_clip" if clips else "step/gradient_norm"]
    for step in taken:
        assert norms[step] == pytest.approx(found["grad_norm"][step], rel=1e-4)
    assert list(found["gradient/first.weight/norm"]) == taken
    assert list(found["activation_gradient/first/rms"]) == taken


def assert_measured_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    measured = {key: series for key, series in expected.items() if "/" in key}
    assert measured
    assert {key: found[key] for key in measured} == measured


@pytest.mark.parametrize("settings", [{}, AOT], ids=["not compiled", "compiled"])
def test_evaluations_are_apart(settings: dict[str, Any], tmp_path: Path) -> None:
    trainings.trainer_of(
        trainings.Net(), tmp_path, trainings.callback(tmp_path / "plain"), **settings
    ).train()
    trainer = trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "evaluated"),
        eval_dataset=trainings.OTHERS,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        **settings,
    )
    trainer.train()
    expected, found = (values(the_run(tmp_path / name).path) for name in ("plain", "evaluated"))
    assert_measured_alike(found, expected)
    losses = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert [logs["step"] for logs in losses] == [0, 2, 4, 6]
    # The first evaluation has no step before it to belong to.
    assert list(found["eval_loss"]) == [0, 1, 3, 5]
    assert list(found["eval_loss"].values()) == [logs["eval_loss"] for logs in losses]


def test_a_callback_before_may_run_the_model(tmp_path: Path) -> None:
    trainings.trainer_of(trainings.Net(), tmp_path, trainings.callback(tmp_path / "plain")).train()
    other = trainings.RunsTheModel()
    other.trainer = trainings.trainer_of(
        trainings.Net(), tmp_path, other, trainings.callback(tmp_path / "other")
    )
    other.trainer.train()
    expected, found = (values(the_run(tmp_path / name).path) for name in ("plain", "other"))
    assert_measured_alike(found, expected)
    assert list(found["eval_loss"]) == list(range(2 * trainings.STEPS))


SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_training_goes_on_with_its_run(restored: bool, tmp_path: Path) -> None:
    trainings.trainer_of(
        trainings.Net(0.2),
        tmp_path / "whole",
        trainings.callback(tmp_path / "whole" / "runs"),
        **SAVE,
    ).train()
    runs, settings = (
        tmp_path / "runs",
        {"restore_callback_states_from_checkpoint": restored, **SAVE},
    )
    first = trainings.trainer_of(
        trainings.Net(0.2), tmp_path, trainings.callback(runs), trainings.StopAt(5), **settings
    )
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert the_run(runs).status == "failed"
    own = trainings.callback(runs)
    second = trainings.trainer_of(
        trainings.Net(0.9), tmp_path, own, **settings
    )  # the dropout is the program's
    second.model.dropout.p = 0.2
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 * trainings.STEPS
    assert own in second.callback_handler.callbacks
    assert the_run(runs).status == "finished"
    whole, found = (values(the_run(root).path) for root in (tmp_path / "whole" / "runs", runs))
    once = {"train_loss", "total_flos"}  # of what the second part has done
    assert found.keys() == whole.keys()
    assert {key: found[key] for key in whole.keys() - once} == {
        key: whole[key] for key in whole.keys() - once
    }
    with tmm.open_run(the_run(runs).path) as run:
        assert run.steps.tolist() == list(range(2 * trainings.STEPS))


def test_an_earlier_checkpoint_replaces_what_came_after(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    own = trainings.callback(runs)
    trainer = trainings.trainer_of(trainings.Net(), tmp_path, own, **SAVE)
    trainer.train()
    before = values(the_run(runs).path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert the_run(runs).status == "finished"
    assert_measured_alike(values(the_run(runs).path), before)


def test_checkpoints_know_nothing_of_tmm_but_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainings.trainer_of(
        trainings.Net(), tmp_path / "with", trainings.callback(tmp_path / "runs"), **SAVE
    ).train()
    trainings.trainer_of(trainings.Net(), tmp_path / "without", **SAVE).train()
    folders = [tmp_path / name / "checkpoint-4" for name in ("with", "without")]
    watched, plain = (load_file(folder / "model.safetensors") for folder in folders)
    assert list(watched) == list(plain)
    watched_optimizer, plain_optimizer = (torch.load(folder / "optimizer.pt") for folder in folders)
    assert str(watched_optimizer) == str(plain_optimizer)
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    (added,) = states[0]["stateful_callbacks"].keys() - states[1]["stateful_callbacks"].keys()
    assert states[0]["stateful_callbacks"][added]["args"] == {
        "path": str(the_run(tmp_path / "runs").path)
    }
    for restored in (False, True):
        trainer = trainings.trainer_of(
            trainings.Net(), tmp_path / "with", restore_callback_states_from_checkpoint=restored
        )
        trainer.train(resume_from_checkpoint=str(folders[0]))
        assert trainer.state.global_step == 2 * trainings.STEPS


@pytest.mark.parametrize("restored", [False, True])
def test_a_checkpoint_of_a_training_without_tmm(restored: bool, tmp_path: Path) -> None:
    settings = {"restore_callback_states_from_checkpoint": restored, **SAVE}
    trainings.trainer_of(trainings.Net(), tmp_path, **settings).train()
    trainer = trainings.trainer_of(
        trainings.Net(), tmp_path, trainings.callback(tmp_path / "runs"), **settings
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    path = the_run(tmp_path / "runs").path
    with tmm.open_run(path) as run:
        assert run.steps.tolist() == [2, 3, 4, 5]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert str(path) in str(saved["stateful_callbacks"])


def test_a_callback_that_is_added_later(tmp_path: Path) -> None:
    for resumed in (False, True):
        trainer = trainings.trainer_of(trainings.Net(), tmp_path, **SAVE)
        trainer.add_callback(trainings.callback(tmp_path / "runs"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
    with tmm.open_run(the_run(tmp_path / "runs").path) as run:
        assert run.steps.tolist() == list(range(2 * trainings.STEPS))


def test_a_training_that_fails(tmp_path: Path) -> None:
    own = trainings.callback(tmp_path / "runs")
    trainer = trainings.trainer_of(trainings.Net(), tmp_path, own)
    collate, trainer.data_collator = trainer.data_collator, trainings.fails
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    record = the_run(tmp_path / "runs")
    assert (record.status, record.reason) == ("failed", "OSError: the disk is gone")
    trainer.data_collator = collate
    trainer.train()
    statuses = sorted(record.status for record in tmm.list_runs(tmp_path / "runs"))
    assert statuses == ["failed", "finished"]


def test_a_training_that_fails_before_its_first_epoch(tmp_path: Path) -> None:
    trainer = trainings.trainer_of(
        trainings.Net(), tmp_path, trainings.callback(tmp_path / "runs"), trainings.Refuses()
    )
    with pytest.raises(ValueError, match="not today"):
        trainer.train()
    trainer.remove_callback(trainings.Refuses)
    trainer.train()
    statuses = sorted(record.status for record in tmm.list_runs(tmp_path / "runs"))
    assert statuses == ["failed", "finished"]


def test_early_stopping_is_told(tmp_path: Path) -> None:
    stopping = transformers.EarlyStoppingCallback(2, early_stopping_threshold=100.0)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "runs"),
        stopping,
        **SAVE | {"save_steps": 1},
        **settings,
        eval_dataset=trainings.OTHERS,
    )
    trainer.train()
    record = the_run(tmp_path / "runs")
    assert record.status == "stopped"
    assert record.reason == "eval_loss did not get better in 2 evaluations"
    assert record.last_step == trainer.state.global_step - 1 < 2 * trainings.STEPS - 1


def test_each_training_is_a_run_and_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    own = trainings.callback(tmp_path / "runs")
    trainer = trainings.trainer_of(
        None, tmp_path, own, model_init=lambda: trainings.Net(), run_name="named", **AOT
    )
    assert own.run is None
    accelerator, paths = trainer.accelerator, []
    for _ in range(2):
        trainer.train()
        replaced = {"_run_epoch", "evaluation_loop", "clip_grad_norm_"}
        assert not replaced & (vars(trainer).keys() | vars(accelerator).keys())
        with pytest.raises(ValueError, match="not instrumented"):
            tmm.monitor(trainer.model_wrapped)
        assert own.run is not None
        paths.append(own.run.path)
    assert_measured_alike(values(paths[0]), values(paths[1]))
    records = tmm.list_runs(tmp_path / "runs")
    assert [(record.name, record.status) for record in records] == [("named", "finished")] * 2
    assert records[0].config["learning_rate"] == 5e-5


def test_a_run_that_is_given_is_its_owners(tmp_path: Path) -> None:
    with tmm.start_run(root=tmp_path / "runs", system_seconds=None) as run:
        trainer = trainings.trainer_of(
            trainings.Net(), tmp_path, trainings.TMMCallback(trainings.SPEC, run=run), **SAVE
        )
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        with pytest.raises(ValueError, match="run= has a training already"):
            trainer.train()
        assert not run.is_finished
    with tmm.open_run(the_run(tmp_path / "runs").path) as recorded:
        assert recorded.steps.tolist() == list(range(2 * trainings.STEPS))


def test_only_trainings_are_runs(tmp_path: Path) -> None:
    trainer = trainings.trainer_of(trainings.Net(), tmp_path, trainings.callback(tmp_path / "runs"))
    trainer.evaluate(trainings.OTHERS)
    trainer.predict(trainings.OTHERS)
    assert not (tmp_path / "runs").exists()


def test_a_trainer_takes_one_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put all rules into one tmm.Spec"):
        trainings.trainer_of(
            trainings.Net(), tmp_path, trainings.callback(tmp_path), trainings.callback(tmp_path)
        )


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="spec='rms' is not a tmm.Spec"):
        trainings.TMMCallback("rms")  # type: ignore[arg-type]


def test_autocast_around_a_compiled_model_is_refused(tmp_path: Path) -> None:
    model = torch.compile(trainings.Net(), backend="aot_eager")
    own = trainings.callback(tmp_path / "runs")
    try:
        trainer = trainings.trainer_of(model, tmp_path, own, bf16=True, **KEEP_COLUMNS)
        with pytest.raises(ValueError, match="hand the model itself to the Trainer"):
            trainer.train()
    finally:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    assert the_run(tmp_path / "runs").status == "failed"


def test_of_a_model_that_is_not_called_the_parts_are_measured(tmp_path: Path) -> None:
    own = trainings.callback(tmp_path / "runs")
    trainer = trainings.trainer_of(
        trainings.Net(), tmp_path, own, kind=trainings.CallsAnotherModel, max_steps=1, **AOT
    )
    trainer.train()
    with tmm.open_run(the_run(tmp_path / "runs").path) as run:
        found = run.at(0).keys()
    assert {"activation/first/rms", "activation/second/rms"} <= found


def test_an_optimizer_of_something_else_is_warned_of(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    trainer = trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "runs"),
        max_steps=1,
        optimizers=(optimizer, None),
    )
    with pytest.warns(tmm.MonitoringWarning, match="SGD holds no parameter of the model"):
        trainer.train()


def test_an_accumulation_over_the_end_of_an_epoch_is_one_step(tmp_path: Path) -> None:
    trainer = trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "runs"),
        train_dataset=trainings.Endless(),  # five batches, of which the trainer does not know
        max_steps=4,
        eval_dataset=trainings.OTHERS,
        eval_strategy="epoch",
    )
    trainer.train()
    found = values(the_run(tmp_path / "runs").path)
    assert list(found["activation/first/rms"]) == [0, 1, 2, 3]
    assert found["step/gradient_norm_before_clip"] == pytest.approx(found["grad_norm"], rel=1e-5)
    assert the_run(tmp_path / "runs").status == "finished"


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tmm.integrations.transformers")
    monkeypatch.setitem(sys.modules, "accelerate.optimizer", None)
    with pytest.raises(ImportError, match=r"pip install 'tmm-compile\[transformers\]'"):
        importlib.import_module("tmm.integrations.transformers")


UNCAUGHT = """
from pathlib import Path
from tests.transformers_trainings import Net, Refuses, callback, fails, trainer_of
folder = Path({folder!r})
trainer = trainer_of(Net(), folder, callback(folder / "runs"), *[Refuses()][:{refused}])
trainer.data_collator = fails
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("refused", [0, 1])
def test_a_process_that_ends_with_an_exception(refused: int, tmp_path: Path) -> None:
    program = UNCAUGHT.format(folder=str(tmp_path), refused=refused)
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert ended.returncode == 1
    record = the_run(tmp_path / "runs")
    reason = "ValueError: not today" if refused else "OSError: the disk is gone"
    assert (record.status, record.reason) == ("failed", reason)


TWO_RANKS = """
from pathlib import Path
from tests.transformers_trainings import Net, callback, samples, trainer_of
folder = Path({folder!r})
trainer = trainer_of(
    Net(),
    folder,
    callback(folder / "ranks"),
    train_dataset=samples(8),
    gradient_accumulation_steps=1,
    ddp_backend="gloo",
    **{settings!r},
)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, AOT], ids=["not compiled", "compiled"])
def test_two_ranks_are_one_training(settings: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(TWO_RANKS.format(folder=str(tmp_path), settings=settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, *launcher, program], env=environment, timeout=240, check=True)
    trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "runs"),
        train_dataset=trainings.samples(8),
        gradient_accumulation_steps=1,
        per_device_train_batch_size=2 * trainings.BATCH,
    ).train()
    found, expected = (values(the_run(tmp_path / name).path) for name in ("ranks", "runs"))
    # Each rank has a loss of its own, of half of the samples.
    keys = [key for key in expected if "/" in key and "[loss]" not in key]
    assert keys
    for key in keys:
        series = expected[key]
        assert found[key] == pytest.approx(series, rel=1e-4, abs=1e-6), key


def test_the_first_clip_of_complete_gradients_counts(tmp_path: Path) -> None:
    trainer = trainings.trainer_of(
        trainings.Net(),
        tmp_path,
        trainings.callback(tmp_path / "runs"),
        kind=trainings.ClipsEachBatch,
    )
    trainer.complete = []
    trainer.train()
    found = values(the_run(tmp_path / "runs").path)
    before, after = found["step/gradient_norm_before_clip"], found["step/gradient_norm"]
    assert list(before.values()) == pytest.approx(trainer.complete, rel=1e-5)
    assert max(after.values()) < 0.011 < min(before.values())
