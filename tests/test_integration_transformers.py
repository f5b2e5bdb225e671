"""Trainings of ``transformers.Trainer``: as without tmm, and measured as a loop by hand would."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tmm

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from tmm.integrations.transformers import TMMCallback  # noqa: E402

SPEC = tmm.Spec(
    tmm.activation("rms", "zero_fraction"),
    tmm.activation_gradient("rms"),
    tmm.gradient("norm"),
    tmm.parameter("rms"),
    tmm.update("norm"),
)
SAMPLES, BATCH, ACCUMULATED = 10, 2, 2
KEEP_COLUMNS = {"remove_unused_columns": False}  # the trainer cannot tell those of a wrapper
LIMIT = 1.0  # of the norm of the gradients
STEPS = 3  # per epoch: two of two batches, and one of one


class Net(nn.Module):
    accepts_loss_kwargs = False

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.second(self.dropout(self.first(x).relu()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class CompileAtBegin(TrainerCallback):
    def on_train_begin(self, *arguments: Any, model: nn.Module, **event: Any) -> None:
        model.compile(backend="aot_eager")


def samples(count: int = SAMPLES) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": 3 * torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(count)]


OTHERS = [{"x": 5 * sample["x"], "labels": sample["labels"]} for sample in samples(3)]


def trainer_of(
    model: nn.Module | None,
    folder: Path,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    given = {
        name: settings.pop(name)
        for name in ("model_init", "train_dataset", "eval_dataset", "optimizers")
        if name in settings
    }
    if model is not None and "optimizers" not in given:
        given["optimizers"] = (torch.optim.AdamW(model.parameters(), 0.05), None)
    arguments = TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "log_level": "error",
            "save_strategy": "no",
            "logging_steps": 1,
            "num_train_epochs": 2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATED,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": LIMIT,
            **settings,
        },
    )
    return kind(
        model, arguments, callbacks=list(callbacks), **{"train_dataset": samples(), **given}
    )


def callback(root: Path, spec: tmm.Spec = SPEC) -> TMMCallback:
    return TMMCallback(spec, root=root, system_seconds=None)


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
    "not compiled": lambda: (Net(0.2), [], {}),
    "by the trainer": lambda: (Net(0.2), [], AOT),
    "in place, at the begin": lambda: (Net(0.2), [CompileAtBegin()], {}),
    "before": lambda: (torch.compile(Net(0.2), backend="aot_eager"), [], KEEP_COLUMNS),
    "bfloat16": lambda: (Net(0.2), [], {"bf16": True}),
    "bfloat16, by the trainer": lambda: (Net(0.2), [], {"bf16": True, **AOT}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_training_is_as_without_tmm(way: str, tmp_path: Path) -> None:
    results = []
    for own in ([], [callback(tmp_path / "runs")]):
        torch._dynamo.reset()
        counters.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        model, others, settings = WAYS[way]()
        trainer = trainer_of(model, tmp_path, *own, *others, **settings)
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
    assert list(found["activation/first/rms"]) == list(range(2 * STEPS))
    assert found["step/gradient_norm_before_clip"] == pytest.approx(found["grad_norm"], rel=1e-5)


def train_by_hand(root: Path, *, compiled: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    program = torch.compile(model, backend="aot_eager") if compiled else model
    with tmm.start_run(root=root, system_seconds=None) as run:
        monitor = tmm.monitor(tmm.instrument(program, SPEC, run=run))
        monitor.watch(optimizer)
        batches = torch.utils.data.DataLoader(samples(), BATCH)
        for step in range(2 * STEPS):
            of_step = list(batches)[step % STEPS * ACCUMULATED :][:ACCUMULATED]
            with monitor.step(step):
                for batch in of_step:
                    (program(**batch)["loss"] / len(of_step)).backward()
                    monitor.after_micro_batch()
                monitor.monitor_gradients(before_clip=True)
                nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
def test_values_are_those_of_a_loop_by_hand(compiled: bool, tmp_path: Path) -> None:
    settings = AOT if compiled else {}
    trainer = trainer_of(Net(), tmp_path, callback(tmp_path / "runs"), **settings)
    trainer.train()
    train_by_hand(tmp_path / "hand", compiled=compiled)
    found, expected = (values(the_run(tmp_path / root).path) for root in ("runs", "hand"))
    assert {key: found[key] for key in expected} == expected
    logged = {"loss", "grad_norm", "learning_rate", "epoch", "train_loss", "total_flos"}
    assert found.keys() - expected.keys() == logged
    assert found["loss"] == {
        i: logs["loss"] for i, logs in enumerate(trainer.state.log_history[:-1])
    }
    before, after = found["step/gradient_norm_before_clip"], found["step/gradient_norm"]
    assert after == pytest.approx(
        {step: min(norm, LIMIT) for step, norm in before.items()}, rel=1e-5
    )
    assert min(before.values()) < LIMIT < max(before.values())  # some are clipped, and some are not


def test_without_a_limit_nothing_is_measured_twice(tmp_path: Path) -> None:
    trainer_of(Net(), tmp_path, callback(tmp_path / "runs"), max_grad_norm=0).train()
    found = values(the_run(tmp_path / "runs").path)
    assert found["step/gradient_norm"] == pytest.approx(found["grad_norm"], rel=1e-5)
    assert not [key for key in found if "before_clip" in key]


class HalfPrecisionTrainer(Trainer):
    """With the scaler that accelerate has on accelerators only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.scales: list[float] = []
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.scales.append(self.accelerator.scaler.get_scale())
        return super().training_step(*args, **kwargs)


@pytest.fixture
def half_precision() -> Iterator[type[Trainer]]:
    yield HalfPrecisionTrainer
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("limit", [LIMIT, 0.0])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_skipped_steps_told(
    half_precision: type[Trainer], fused: bool, limit: float, tmp_path: Path
) -> None:
    trainers = []
    for own in ([], [callback(tmp_path / "runs")]):
        model = Net(0.2)
        trainer = trainer_of(
            model,
            tmp_path,
            *own,
            kind=half_precision,
            max_grad_norm=limit,
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
    norms = found["step/gradient_norm_before_clip" if limit else "step/gradient_norm"]
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
    trainer_of(Net(), tmp_path, callback(tmp_path / "plain"), **settings).train()
    trainer = trainer_of(
        Net(),
        tmp_path,
        callback(tmp_path / "evaluated"),
        eval_dataset=OTHERS,
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


class RunsTheModel(TrainerCallback):
    trainer: Trainer

    def on_step_end(self, *arguments: Any, model: nn.Module, **event: Any) -> None:
        self.on_substep_end()
        model(x=torch.full((2, 4), 9.0), labels=torch.zeros(2, dtype=torch.int64))

    def on_substep_end(self, *arguments: Any, **event: Any) -> None:
        self.trainer.evaluate(OTHERS)
        self.trainer.predict(OTHERS)


def test_a_callback_before_may_run_the_model(tmp_path: Path) -> None:
    trainer_of(Net(), tmp_path, callback(tmp_path / "plain")).train()
    other = RunsTheModel()
    other.trainer = trainer_of(Net(), tmp_path, other, callback(tmp_path / "other"))
    other.trainer.train()
    expected, found = (values(the_run(tmp_path / name).path) for name in ("plain", "other"))
    assert_measured_alike(found, expected)
    assert list(found["eval_loss"]) == list(range(2 * STEPS))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, *arguments: Any, **event: Any) -> None:
        if arguments[1].global_step == self.step:
            raise KeyboardInterrupt


SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_training_goes_on_with_its_run(restored: bool, tmp_path: Path) -> None:
    trainer_of(Net(0.2), tmp_path / "whole", callback(tmp_path / "whole" / "runs"), **SAVE).train()
    runs, settings = (
        tmp_path / "runs",
        {"restore_callback_states_from_checkpoint": restored, **SAVE},
    )
    first = trainer_of(Net(0.2), tmp_path, callback(runs), StopAt(5), **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert the_run(runs).status == "failed"
    own = callback(runs)
    second = trainer_of(Net(0.9), tmp_path, own, **settings)  # the dropout is the program's
    second.model.dropout.p = 0.2
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 * STEPS
    assert own in second.callback_handler.callbacks
    assert the_run(runs).status == "finished"
    whole, found = (values(the_run(root).path) for root in (tmp_path / "whole" / "runs", runs))
    once = {"train_loss", "total_flos"}  # of what the second part has done
    assert found.keys() == whole.keys()
    assert {key: found[key] for key in whole.keys() - once} == {
        key: whole[key] for key in whole.keys() - once
    }
    with tmm.open_run(the_run(runs).path) as run:
        assert run.steps.tolist() == list(range(2 * STEPS))


def test_an_earlier_checkpoint_replaces_what_came_after(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    own = callback(runs)
    trainer = trainer_of(Net(), tmp_path, own, **SAVE)
    trainer.train()
    before = values(the_run(runs).path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert the_run(runs).status == "finished"
    assert_measured_alike(values(the_run(runs).path), before)


def test_checkpoints_know_nothing_of_tmm_but_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer_of(Net(), tmp_path / "with", callback(tmp_path / "runs"), **SAVE).train()
    trainer_of(Net(), tmp_path / "without", **SAVE).train()
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
        trainer = trainer_of(
            Net(), tmp_path / "with", restore_callback_states_from_checkpoint=restored
        )
        trainer.train(resume_from_checkpoint=str(folders[0]))
        assert trainer.state.global_step == 2 * STEPS


@pytest.mark.parametrize("restored", [False, True])
def test_a_checkpoint_of_a_training_without_tmm(restored: bool, tmp_path: Path) -> None:
    settings = {"restore_callback_states_from_checkpoint": restored, **SAVE}
    trainer_of(Net(), tmp_path, **settings).train()
    trainer = trainer_of(Net(), tmp_path, callback(tmp_path / "runs"), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    path = the_run(tmp_path / "runs").path
    with tmm.open_run(path) as run:
        assert run.steps.tolist() == [2, 3, 4, 5]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert str(path) in str(saved["stateful_callbacks"])


def test_a_callback_that_is_added_later(tmp_path: Path) -> None:
    for resumed in (False, True):
        trainer = trainer_of(Net(), tmp_path, **SAVE)
        trainer.add_callback(callback(tmp_path / "runs"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
    with tmm.open_run(the_run(tmp_path / "runs").path) as run:
        assert run.steps.tolist() == list(range(2 * STEPS))


def fails(batch: Any) -> Any:
    raise OSError("the disk is gone")


def test_a_training_that_fails(tmp_path: Path) -> None:
    own = callback(tmp_path / "runs")
    trainer = trainer_of(Net(), tmp_path, own)
    collate, trainer.data_collator = trainer.data_collator, fails
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    record = the_run(tmp_path / "runs")
    assert (record.status, record.reason) == ("failed", "OSError: the disk is gone")
    trainer.data_collator = collate
    trainer.train()
    statuses = sorted(record.status for record in tmm.list_runs(tmp_path / "runs"))
    assert statuses == ["failed", "finished"]


class Refuses(TrainerCallback):
    def on_train_begin(self, *arguments: Any, **event: Any) -> None:
        raise ValueError("not today")


def test_a_training_that_fails_before_its_first_epoch(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, callback(tmp_path / "runs"), Refuses())
    with pytest.raises(ValueError, match="not today"):
        trainer.train()
    trainer.remove_callback(Refuses)
    trainer.train()
    statuses = sorted(record.status for record in tmm.list_runs(tmp_path / "runs"))
    assert statuses == ["failed", "finished"]


def test_early_stopping_is_told(tmp_path: Path) -> None:
    stopping = transformers.EarlyStoppingCallback(2, early_stopping_threshold=100.0)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_of(
        Net(),
        tmp_path,
        callback(tmp_path / "runs"),
        stopping,
        **SAVE | {"save_steps": 1},
        **settings,
        eval_dataset=OTHERS,
    )
    trainer.train()
    record = the_run(tmp_path / "runs")
    assert record.status == "stopped"
    assert record.reason == "eval_loss did not get better in 2 evaluations"
    assert record.last_step == trainer.state.global_step - 1 < 2 * STEPS - 1


def test_each_training_is_a_run_and_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    own = callback(tmp_path / "runs")
    trainer = trainer_of(None, tmp_path, own, model_init=lambda: Net(), run_name="named", **AOT)
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
        trainer = trainer_of(Net(), tmp_path, TMMCallback(SPEC, run=run), **SAVE)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        with pytest.raises(ValueError, match="run= has a training already"):
            trainer.train()
        assert not run.is_finished
    with tmm.open_run(the_run(tmp_path / "runs").path) as recorded:
        assert recorded.steps.tolist() == list(range(2 * STEPS))


def test_only_trainings_are_runs(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, callback(tmp_path / "runs"))
    trainer.evaluate(OTHERS)
    trainer.predict(OTHERS)
    assert not (tmp_path / "runs").exists()


def test_a_trainer_takes_one_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put all rules into one tmm.Spec"):
        trainer_of(Net(), tmp_path, callback(tmp_path), callback(tmp_path))


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="spec='rms' is not a tmm.Spec"):
        TMMCallback("rms")  # type: ignore[arg-type]


def test_autocast_around_a_compiled_model_is_refused(tmp_path: Path) -> None:
    model = torch.compile(Net(), backend="aot_eager")
    own = callback(tmp_path / "runs")
    try:
        trainer = trainer_of(model, tmp_path, own, bf16=True, **KEEP_COLUMNS)
        with pytest.raises(ValueError, match="hand the model itself to the Trainer"):
            trainer.train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert the_run(tmp_path / "runs").status == "failed"


class CallsAnotherModel(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        return self.model(**inputs)["loss"]


def test_of_a_model_that_is_not_called_the_parts_are_measured(tmp_path: Path) -> None:
    own = callback(tmp_path / "runs")
    trainer = trainer_of(Net(), tmp_path, own, kind=CallsAnotherModel, max_steps=1, **AOT)
    trainer.train()
    with tmm.open_run(the_run(tmp_path / "runs").path) as run:
        found = run.at(0).keys()
    assert {"activation/first/rms", "activation/second/rms"} <= found


def test_an_optimizer_of_something_else_is_warned_of(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    trainer = trainer_of(
        Net(), tmp_path, callback(tmp_path / "runs"), max_steps=1, optimizers=(optimizer, None)
    )
    with pytest.warns(tmm.MonitoringWarning, match="SGD holds no parameter of the model"):
        trainer.train()


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


def test_an_accumulation_over_the_end_of_an_epoch_is_one_step(tmp_path: Path) -> None:
    trainer = trainer_of(
        Net(),
        tmp_path,
        callback(tmp_path / "runs"),
        train_dataset=Endless(),  # five batches, of which the trainer does not know
        max_steps=4,
        eval_dataset=OTHERS,
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
from tests.test_integration_transformers import Net, Refuses, callback, fails, trainer_of
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
from tests.test_integration_transformers import Net, callback, samples, trainer_of
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
    trainer_of(
        Net(),
        tmp_path,
        callback(tmp_path / "runs"),
        train_dataset=samples(8),
        gradient_accumulation_steps=1,
        per_device_train_batch_size=2 * BATCH,
    ).train()
    found, expected = (values(the_run(tmp_path / name).path) for name in ("ranks", "runs"))
    # Each rank has a loss of its own, of half of the samples.
    keys = [key for key in expected if "/" in key and "[loss]" not in key]
    assert keys
    for key in keys:
        series = expected[key]
        assert found[key] == pytest.approx(series, rel=1e-4, abs=1e-6), key


class ClipsEachBatch(Trainer):
    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients:
            gradients = [p.grad for p in self.model.parameters()]
            self.complete.append(nn.utils.get_total_norm(gradients).item())
        self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm=0.01)
        return loss


def test_the_first_clip_of_complete_gradients_counts(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, callback(tmp_path / "runs"), kind=ClipsEachBatch)
    trainer.complete = []
    trainer.train()
    found = values(the_run(tmp_path / "runs").path)
    before, after = found["step/gradient_norm_before_clip"], found["step/gradient_norm"]
    assert list(before.values()) == pytest.approx(trainer.complete, rel=1e-5)
    assert max(after.values()) < 0.011 < min(before.values())
