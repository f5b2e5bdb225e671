"""The callback for Lightning, in trainings of its ``Trainer``."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import tmm

pytest.importorskip("lightning.pytorch", exc_type=ImportError)

import lightning.pytorch as pl
import torchmetrics
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from tmm.integrations.lightning import TMMCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{category}:{package}")
    for category in ("UserWarning", "FutureWarning", "DeprecationWarning")
    for package in ("lightning", "lightning_fabric", "pytorch_lightning", "torch")
]

RULES = (
    *(tmm.activation("rms"), tmm.activation_gradient("rms")),
    *(tmm.gradient("norm"), tmm.parameter("norm"), tmm.update("norm")),
)
SPEC = tmm.Spec(*RULES)
WAYS = ("uncompiled", "children called", "compiled in place", "compiled")

Values = dict[str, float]
Batch = list[torch.Tensor]


class Model(pl.LightningModule):
    """Draws random numbers of torch, and of numpy in its training step."""

    def __init__(self, rate: float = 0.02, calls_children: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate, self.calls_children = rate, calls_children
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Batch) -> torch.Tensor:
        x, y = batch
        output = self.net(x) if self.calls_children else self(x)
        loss = mse_loss(output, y + self.noise())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def noise(self) -> float:
        return 0.0 if self._compiler_ctx else float(np.random.rand())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Silent(Model):
    """Steps that Lightning's way compiles cannot log, in this version of torch."""

    def log(self, *arguments: Any, **options: Any) -> None:
        pass


class Certain(Model):
    """Draws no random numbers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net[2].p = 0.0

    def noise(self) -> float:
        return 0.0


class Validated(Certain):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", mse_loss(self(100 * x), y))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self(batch[0])


def batches(number: int = 7) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 * number, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def new_trainer(*callbacks: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False}
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    defaults |= dict.fromkeys(quiet, False)
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def new_model(way: str = "uncompiled", kind: type[Model] = Model) -> tuple[Model, Any]:
    torch.manual_seed(0)
    np.random.seed(0)
    model = kind(calls_children=way == "children called")
    if way == "compiled in place":
        model.compile(backend="aot_eager")
    return model, torch.compile(model, backend="aot_eager") if way == "compiled" else model


@pytest.fixture
def callback(tmp_path: Path) -> TMMCallback:
    return new_callback(tmp_path)


def new_callback(root: Path, spec: tmm.Spec = SPEC) -> TMMCallback:
    return TMMCallback(spec, root=root / "runs", system_seconds=None)


@pytest.fixture(autouse=True)
def fresh_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # where Lightning keeps checkpoints and logs
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def only_run(root: Path) -> Any:
    (record,) = tmm.list_runs(root / "runs")
    return record


def recorded(root: Path) -> list[Values]:
    with tmm.open_run(only_run(root).path) as run:
        assert run.steps.tolist() == list(range(len(run.steps)))
        steps = [run.at(int(step)) for step in run.steps]
    return [{k: v for k, v in values.items() if k != "system/step_seconds"} for values in steps]


def random_states() -> tuple[Any, ...]:
    name, numbers, *position = np.random.get_state()
    return name, numbers.tobytes(), position, torch.get_rng_state().numpy().tobytes()


def assert_equal_weights(left: nn.Module, right: nn.Module) -> None:
    others = right.state_dict()
    assert left.state_dict().keys() == others.keys()
    for name, value in left.state_dict().items():
        assert torch.equal(value, others[name]), name


def assert_values(ours: Values, truth: Values, tolerance: float = 1e-5) -> None:
    assert {key: ours.get(key) for key in truth} == pytest.approx(truth, rel=tolerance, abs=1e-9)


# What a loop by hand, and hooks, give


def by_hand(
    model: Model, loader: Any, window: int = 1, clip: float | None = None, epochs: int = 1
) -> list[Values]:
    (optimizer,), (schedule,) = model.configure_optimizers()
    steps: list[Values] = []
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():

        def keep(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            outputs.setdefault(name or "[root module]", []).append(output)
            if output.requires_grad:
                output.retain_grad()

        module.register_forward_hook(keep)
    model.train()
    for epoch in range(epochs):
        data = list(loader)
        for start in range(0, len(data), window):
            losses = []
            for x, y in data[start : start + window]:
                output = model.net(x) if model.calls_children else model(x)
                losses.append(mse_loss(output, y + model.noise()))
                (losses[-1] / window).backward()
            values = {"loss": torch.stack(losses).mean().item(), "epoch": float(epoch)}
            values["train_loss_step"] = losses[-1].item()
            values["lr-Adam"] = optimizer.param_groups[0]["lr"]
            for name, tensors in outputs.items():
                joined = torch.cat(tensors)
                values[f"activation/{name}/rms"] = rms(joined)
                gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
                values[f"activation_gradient/{name}/rms"] = rms(torch.cat(gradients))
            outputs.clear()
            if clip is not None:
                values |= norms(model, "gradient_before_clip", lambda p: p.grad)
                total = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                values["step/gradient_norm_before_clip"] = float(total)
                values["step/gradient_norm"] = min(float(total), clip)
            values |= norms(model, "gradient", lambda p: p.grad)
            before = {p: p.detach().clone() for p in model.parameters()}
            optimizer.step()
            schedule["scheduler"].step()
            optimizer.zero_grad()
            values |= norms(model, "parameter", lambda p: p)
            values |= norms(model, "update", lambda p: p - before[p])  # noqa: B023
            steps.append(values)
    return steps


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().pow(2).mean().sqrt())


def norms(model: nn.Module, family: str, of: Callable[[Any], Any]) -> Values:
    return {f"{family}/{n}/norm": float(of(p).detach().norm()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_training_are_those_of_a_loop_by_hand(
    way: str, tmp_path: Path, callback: TMMCallback
) -> None:
    model, fitted = new_model(way)
    trainer = new_trainer(callback, max_epochs=2, accumulate_grad_batches=3, gradient_clip_val=0.3)
    trainer.fit(fitted, batches())
    states = random_states()
    by_ours = recorded(tmp_path)
    other, _ = new_model("children called" if way == "children called" else "uncompiled")
    other._compiler_ctx = model._compiler_ctx
    truth = by_hand(other, batches(), window=3, clip=0.3, epochs=2)
    assert len(by_ours) == len(truth) == 6  # the third and sixth have one batch only
    for ours, true in zip(by_ours, truth, strict=True):
        assert_values(ours, true)
    assert_equal_weights(model, other)
    assert random_states() == states
    has_graphs = "pack_rows" in (only_run(tmp_path).path / "explain.txt").read_text()
    assert has_graphs is way.startswith("compiled")


@pytest.mark.parametrize("way", [way for way in WAYS if way != "children called"])
def test_training_is_bitwise_that_without_tmm(way: str, tmp_path: Path) -> None:
    weights, states, programs = [], [], []
    for callbacks in ([], [new_callback(tmp_path, tmm.Spec(*RULES, every=3))]):
        torch._dynamo.reset()
        counters.clear()
        model, fitted = new_model(way, Silent)
        new_trainer(*callbacks, max_epochs=2).fit(fitted, batches())
        weights.append(model)
        states.append(random_states())
        programs.append((counters["stats"]["unique_graphs"], len(counters["graph_break"])))
    assert_equal_weights(*weights)
    assert states[0] == states[1]
    (graphs, breaks), (graphs_with, breaks_with) = programs
    assert graphs_with == graphs + way.startswith("compiled")  # of monitored steps
    assert breaks_with == breaks == 0
    assert vars(weights[0]).keys() == vars(weights[1]).keys()


# What it measures, and what not


def test_validation_is_recorded_and_not_measured(tmp_path: Path) -> None:
    steps = []
    for kind, validated in ((Certain, []), (Validated, [batches(2)])):
        root = tmp_path / kind.__name__
        model, _ = new_model(kind=kind)
        trainer = new_trainer(
            *(new_callback(root), LearningRateMonitor()),
            max_epochs=2,
            accumulate_grad_batches=2,
            val_check_interval=3,  # in the middle of a window
            log_every_n_steps=1,
            logger=CSVLogger(root),
        )
        trainer.fit(model, batches(), *validated)
        steps.append(recorded(root))
        log = (root / "lightning_logs/version_0/metrics.csv").read_text()
    plain, validated = steps
    results = [values.pop("val_loss", None) for values in validated]
    assert [step for step, value in enumerate(results) if value is not None] == [1, 2, 5, 6]
    assert plain == validated
    header, *rows = [line.split(",") for line in log.splitlines()]
    column = header.index("val_loss")
    logged = [float(row[column]) for row in rows if row[column]]
    assert [value for value in results if value is not None] == pytest.approx(logged)
    assert "lr-Adam" in header
    assert set(header) - {"step"} <= validated[3].keys() | {"val_loss"} | validated[-1].keys()


def test_means_of_an_epoch_belong_to_its_last_step(tmp_path: Path, callback: TMMCallback) -> None:
    new_trainer(callback, max_epochs=2).fit(Model(), batches(3))
    with tmm.open_run(only_run(tmp_path).path) as run:
        steps, means = run.series("train_loss_epoch")
        losses = run.series("train_loss_step")[1]
    assert steps.tolist() == [2, 5]
    assert means == pytest.approx([losses[:3].mean(), losses[3:].mean()])


def test_what_others_do_with_the_module_is_not_measured(tmp_path: Path) -> None:
    class Other(Callback):
        def use(self, trainer: Any, module: Model, *further: Any) -> None:
            with torch.no_grad():
                module(torch.full((2, 4), 1e4))

        on_train_batch_start = on_train_batch_end = on_train_epoch_end = use

    class Using(Certain):
        def on_train_batch_start(self, *arguments: Any) -> None:
            Other().use(None, self)

        on_train_batch_end = on_train_batch_start

    steps = []
    for kind, place in ((Certain, None), (Using, 0), (Using, 1)):
        root = tmp_path / f"{kind.__name__}-{place}"
        model, _ = new_model(kind=kind)
        callbacks: list[Any] = [new_callback(root)]
        if place is not None:
            callbacks.insert(place, Other())
        new_trainer(*callbacks, accumulate_grad_batches=2).fit(model, batches())
        steps.append(recorded(root))
    assert steps[0] == steps[1] == steps[2]


def test_a_window_that_was_given_up_is_begun_anew(tmp_path: Path, callback: TMMCallback) -> None:
    class Leaving(Model):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 4 else None

    model, _ = new_model(kind=Leaving)
    new_trainer(callback, accumulate_grad_batches=3, max_epochs=2).fit(model, batches())
    steps = recorded(tmp_path)
    assert [values["epoch"] for values in steps] == [0, 1, 1, 1]
    assert tmm.open_run(only_run(tmp_path).path).events == []


def test_without_clipping_nothing_is_measured_before_it(
    tmp_path: Path, callback: TMMCallback
) -> None:
    new_trainer(callback).fit(Model(), batches(2))
    assert not any("before_clip" in key for values in recorded(tmp_path) for key in values)


def test_own_clipping_is_known(tmp_path: Path, callback: TMMCallback) -> None:
    class Clipping(Model):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **options: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.01)

    new_trainer(callback).fit(Clipping(), batches(2))
    for values in recorded(tmp_path):
        assert values["step/gradient_norm_before_clip"] > values["step/gradient_norm"]
        assert values["step/gradient_norm"] == pytest.approx(0.01, rel=1e-4)


def test_a_closure_that_is_called_repeatedly(tmp_path: Path, callback: TMMCallback) -> None:
    class Second(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

        def on_after_backward(self) -> None:
            self.last = [p.grad.clone() for p in self.parameters()]

    model, _ = new_model(kind=Second)
    new_trainer(callback, limit_train_batches=2).fit(model, batches())
    values = recorded(tmp_path)[1]
    total = torch.stack([gradient.norm() for gradient in model.last]).norm()
    assert values["step/gradient_norm"] == pytest.approx(total.item())
    other, _ = new_model(kind=Second)
    new_trainer(limit_train_batches=2).fit(other, batches())
    assert_equal_weights(model, other)


# Precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    weights, scales = [], []
    for monitored in (False, True):
        model, _ = new_model()
        scaler = None
        options: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3)
            options = {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
        callbacks = [new_callback(tmp_path)] if monitored else []
        new_trainer(*callbacks, gradient_clip_val=0.5, **options).fit(model, batches(12))
        weights.append(model)
        if scaler is not None:
            scales.append(scaler.state_dict())
            assert type(scaler) is torch.amp.GradScaler
    assert_equal_weights(*weights)
    steps = recorded(tmp_path)
    if precision == "bf16-mixed":
        assert all("step/skipped" not in values for values in steps)
    else:
        assert scales[0] == scales[1]
        skipped = [values["step/skipped"] for values in steps]
        assert 0 < sum(skipped) < 12
        for values in steps:
            assert ("gradient/net.0.weight/norm" in values) == (values["step/skipped"] == 0)
        steps = [values for values in steps if not values["step/skipped"]]
    for values in steps:
        before, after = (f"step/gradient_norm{s}" for s in ("_before_clip", ""))
        assert 0 < values[before] < 100  # not the scaled one
        assert values[after] == pytest.approx(min(values[before], 0.5), rel=1e-3)


# Checkpoints


@pytest.mark.parametrize("at", [4, 6])  # the end of an epoch, the middle of one
def test_a_training_goes_on_with_its_run(at: int, tmp_path: Path) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=at, save_top_k=-1)

    class Killed(Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 8:
                raise KeyboardInterrupt

    spec = tmm.Spec(*RULES, tmm.activation_difference("norm"), reference=new_model(kind=Certain)[0])
    first = new_callback(tmp_path, spec)
    with pytest.raises(SystemExit):
        new_trainer(first, saved, Killed(), **options).fit(new_model(kind=Certain)[0], batches())
    assert only_run(tmp_path).status == "failed"
    (path,) = tmp_path.glob(f"*step={at}.ckpt")
    second, models = new_callback(tmp_path, spec), []
    for callbacks in ([], [second]):
        models.append(new_model(kind=Certain)[0])
        trainer = new_trainer(*callbacks, **options)
        trainer.fit(models[-1], batches(), ckpt_path=path, weights_only=False)
    assert_equal_weights(*models)
    assert only_run(tmp_path).status == "finished"
    assert first.run is not None
    assert second.run is not None
    assert second.run.id == first.run.id
    steps = recorded(tmp_path)
    if at == 4:  # else Lightning begins the data of the epoch anew
        whole = new_callback(tmp_path / "whole", spec)
        new_trainer(whole, **options).fit(new_model(kind=Certain)[0], batches())
        for ours, true in zip(steps, recorded(tmp_path / "whole"), strict=True):
            assert_values(ours, true)
    assert all("activation_difference/net/norm" in values for values in steps)


def test_checkpoints_are_those_without_tmm(tmp_path: Path, callback: TMMCallback) -> None:
    found = []
    for callbacks in ([], [callback]):
        model, _ = new_model()
        trainer = new_trainer(*callbacks)
        trainer.fit(model, batches(2))
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        found.append(torch.load(tmp_path / "saved.ckpt", weights_only=False))
    without, ours = found
    (key,) = ours["callbacks"].keys() - without["callbacks"].keys()
    assert key == callback.state_key
    assert ours["callbacks"][key] == {"run": str(only_run(tmp_path).path)}
    assert ours["state_dict"].keys() == without["state_dict"].keys()
    assert ours.keys() == without.keys()
    Model.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=False)


def test_a_checkpoint_without_tmm_begins_a_run(tmp_path: Path, callback: TMMCallback) -> None:
    model, _ = new_model()
    trainer = new_trainer()
    trainer.fit(model, batches(3))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    trainer = new_trainer(callback, max_epochs=2)
    trainer.fit(Model(), batches(3), ckpt_path=tmp_path / "old.ckpt", weights_only=False)
    with tmm.open_run(only_run(tmp_path).path) as run:
        assert run.steps.tolist() == [3, 4, 5]


def test_the_same_trainer_goes_on(tmp_path: Path, callback: TMMCallback) -> None:
    model = Model()
    trainer = new_trainer(callback)
    trainer.fit(model, batches(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(2))
    assert len(recorded(tmp_path)) == 4


def test_two_trainings_are_two_runs(tmp_path: Path, callback: TMMCallback) -> None:
    for _ in range(2):
        new_trainer(callback).fit(Model(), batches(2))
    assert [record.steps for record in tmm.list_runs(tmp_path / "runs")] == [2, 2]


def test_other_stages_alone_record_nothing(tmp_path: Path, callback: TMMCallback) -> None:
    model, trainer = Validated(), new_trainer(callback)
    trainer.validate(model, batches(2), verbose=False)
    trainer.test(model, batches(2), verbose=False)
    trainer.predict(model, batches(2))
    assert not (tmp_path / "runs").exists()
    assert callback.run is None
    assert callback.state_dict() == {}


def test_a_given_run_is_left_to_its_owner(tmp_path: Path) -> None:
    with tmm.start_run("p", root=tmp_path / "runs", system_seconds=None) as run:
        new_trainer(TMMCallback(SPEC, run=run)).fit(Model(), batches(2))
        run.log({"afterwards": 1.0})
        assert not run.is_finished
    assert recorded(tmp_path)[1]["afterwards"] == 1.0


# How trainings end


@pytest.mark.parametrize(
    ("error", "way"),
    [
        *((RuntimeError("no"), "uncompiled"), (RuntimeError("no"), "compiled")),
        *((KeyboardInterrupt(), "uncompiled"), (SystemExit(3), "compiled in place")),
    ],
)
def test_a_training_that_fails(
    error: BaseException, way: str, tmp_path: Path, callback: TMMCallback
) -> None:
    class Breaking(Callback):
        def on_before_backward(self, trainer: Any, module: Model, loss: torch.Tensor) -> None:
            if trainer.global_step == 3:
                raise error

    model, fitted = new_model(way)
    before = set(vars(model))
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(expected):
        new_trainer(callback, Breaking()).fit(fitted, batches())
    record = only_run(tmp_path)
    assert (record.status, record.reason.split(":")[0]) == ("failed", type(error).__name__)
    assert "activation/net/rms" in recorded(tmp_path)[2]
    steps = {f"{stage}_step" for stage in ("training", "validation", "test", "predict")}
    assert set(vars(model)) - before == (steps | {"forward"} if way == "compiled" else set())
    with pytest.raises(ValueError, match="not instrumented"):
        tmm.monitor(model)


def test_early_stopping_tells_why(tmp_path: Path, callback: TMMCallback) -> None:
    stopping = EarlyStopping("train_loss", patience=1, mode="max", check_on_train_epoch_end=True)
    new_trainer(callback, stopping, max_epochs=50).fit(Model(0.05), batches())
    record = only_run(tmp_path)
    assert record.status == "stopped"
    assert "train_loss" in record.reason


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}])
def test_a_wish_to_stop_at_the_end_is_none(
    limit: dict[str, int], tmp_path: Path, callback: TMMCallback
) -> None:
    class Stopping(Model):
        def on_train_batch_end(self, *arguments: Any) -> None:
            self.trainer.should_stop = self.global_step >= (3 if "max_steps" in limit else 4)

    new_trainer(callback, **limit).fit(Stopping(), batches(2))
    assert only_run(tmp_path).status == "finished"


def test_an_alert_ends_the_training_after_its_step(tmp_path: Path) -> None:
    class Breaking(Model):
        def noise(self) -> float:
            return float("nan") if self.global_step == 2 else 0.0

    spec = tmm.Spec(*RULES, alerts=True, on_alert="raise")
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(tmm.AlertError):
        trainer = new_trainer(new_callback(tmp_path, spec), saved, enable_checkpointing=True)
        trainer.fit(Breaking(), batches())
    assert only_run(tmp_path).last_step == 2
    assert torch.load(saved.ckpt_path, weights_only=False)["global_step"] == 3


def test_a_wrong_spec_ends_the_training(tmp_path: Path) -> None:
    spec = tmm.Spec(tmm.activation("rms", modules="encoder"))
    with pytest.raises(ValueError, match="encoder"):
        new_trainer(new_callback(tmp_path, spec)).fit(Model(), batches())
    assert only_run(tmp_path).status == "failed"


# Manual optimization


class Examining(Certain):
    """Evaluates itself in its training step, before and after what it trains on."""

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.examine()
        loss = super().training_step(batch)
        self.examine()
        return loss

    def examine(self) -> None:
        self.eval()
        with torch.no_grad():
            self.net(torch.full((2, 4), 1e4))
            self(torch.full((2, 4), 1e4))
        self.train()


@pytest.mark.parametrize("way", ["uncompiled", "children called", "compiled in place"])
def test_an_evaluation_in_a_training_step_is_kept_apart(way: str, tmp_path: Path) -> None:
    steps = []
    for kind in (Certain, Examining):
        root = tmp_path / kind.__name__
        model, _ = new_model(way, kind)
        new_trainer(new_callback(root), accumulate_grad_batches=2).fit(model, batches(3))
        steps.append(recorded(root))
    assert steps[0] == steps[1]


class Adversaries(pl.LightningModule):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.critic = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
        if way == "part compiled":
            self.generator = torch.compile(self.generator, backend="aot_eager")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, z = batch
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        loss = self.critic(self.generator(z).detach()).mean() - self.critic(x).mean()
        self.take(for_critic, loss)
        self.untoggle_optimizer(for_critic)
        self.take(for_generator, -self.critic(self.generator(z)).mean())
        self.log("critic_loss", loss)

    def take(self, optimizer: Any, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.generator, self.critic)]


@pytest.mark.parametrize("way", ["uncompiled", "part compiled"])
def test_manual_optimization_with_two_optimizers(
    way: str, tmp_path: Path, callback: TMMCallback
) -> None:
    generator = torch.Generator().manual_seed(4)
    data = [torch.randn(12, size, generator=generator) for size in (2, 3)]
    models = []
    outputs: list[torch.Tensor] = []
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        model = Adversaries(way)
        if not callbacks:
            model.critic.register_forward_hook(lambda m, inputs, output: outputs.append(output))
        new_trainer(*callbacks).fit(model, DataLoader(TensorDataset(*data), 4))
        models.append(model)
    assert_equal_weights(*models)
    with tmm.open_run(only_run(tmp_path).path) as run:
        assert run.steps.tolist() == [0, 2, 4]  # two optimizer steps each
        values = run.at(4)
        lasts = run.series("activation/critic/rms")[1]
    assert lasts == pytest.approx([rms(torch.cat(outputs[3 * i : 3 * i + 3])) for i in range(3)])
    for name, parameter in models[0].named_parameters():
        key = name.replace("_orig_mod.", "")
        if not name.startswith("critic"):  # whose gradients the generator's backward added to
            expected = parameter.grad.norm().item()  # type: ignore[union-attr]
            assert values[f"gradient/{key}/norm"] == pytest.approx(expected)
        assert f"update/{key}/norm" in values
    assert {"critic_loss", "lr-Adam", "lr-Adam-1"} <= values.keys()


def test_manual_accumulation_is_one_step(tmp_path: Path, callback: TMMCallback) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(mse_loss(self.net(batch[0]), batch[1]) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    new_trainer(callback).fit(Manual(), batches(6))
    assert len(recorded(tmp_path)) == 3


def test_steps_that_lightning_does_not_count_are_warned_of(callback: TMMCallback) -> None:
    class Raw(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(mse_loss(self(batch[0]), batch[1]))
            self.optimizers(use_pl_optimizer=False).step()

    with pytest.warns(tmm.MonitoringWarning, match="use_pl_optimizer=False"):
        new_trainer(callback).fit(Raw(), batches(2))


# The module


def test_copies_during_a_training_are_clean(tmp_path: Path, callback: TMMCallback) -> None:
    class Copying(Callback):
        def on_train_batch_end(self, trainer: Any, module: Model, *arguments: Any) -> None:
            for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert vars(copied).keys() == names
                copied.net[0].weight.data.fill_(7.0)
                assert not torch.equal(copied(torch.ones(1, 4)), module(torch.ones(1, 4)))

    model = Model()
    names = vars(model).keys() | {"_fabric", "prepare_data_per_node"}
    new_trainer(Copying(), callback, accumulate_grad_batches=2).fit(model, batches(3))


def test_metrics_and_scripted_parts(tmp_path: Path, callback: TMMCallback) -> None:
    class Metered(Certain):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.error = torchmetrics.MeanSquaredError()  # its hash changes with each update
            self.scale = torch.jit.script(nn.Linear(1, 1))

        def training_step(self, batch: Batch) -> torch.Tensor:
            x, y = batch
            output = self.scale(self(x))
            self.error(output, y)
            self.log("error", self.error, on_step=True, on_epoch=True)
            return mse_loss(output, y)

    weights = []
    for callbacks in ([], [callback]):
        model, _ = new_model(kind=Metered)
        new_trainer(*callbacks, max_epochs=2).fit(model, batches(3))
        weights.append(model)
    assert_equal_weights(*weights)
    for values in recorded(tmp_path):
        assert values["error_step"] == values["loss"]
        assert {"activation/net/rms", "gradient/scale.weight/norm"} <= values.keys()


def test_frozen_and_checkpointed_parts(tmp_path: Path, callback: TMMCallback) -> None:
    class Partly(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.net[:2], x, use_reentrant=False)
            return self.net[2:](hidden)

    weights = []
    for callbacks in ([], [callback]):
        model, _ = new_model(kind=Partly)
        model.net[3].bias.requires_grad_(False)
        new_trainer(*callbacks).fit(model, batches(3))
        weights.append(model)
    assert_equal_weights(*weights)
    for values in recorded(tmp_path):
        assert "activation/net.1/rms" in values
        assert "gradient/net.0.weight/norm" in values
        assert "gradient/net.3.bias/norm" not in values


def test_the_configuration_is_kept(tmp_path: Path, callback: TMMCallback) -> None:
    new_trainer(callback, gradient_clip_val=0.5).fit(Model(rate=0.5), batches(1))
    config = only_run(tmp_path).config
    assert config["rate"] == 0.5
    assert config["trainer"]["gradient_clip_val"] == 0.5


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="is not a tmm.Spec"):
        TMMCallback("rms")  # type: ignore[arg-type]


@pytest.fixture
def process_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("way", ["uncompiled", "compiled", "compiled in place"])
def test_strategies_that_wrap_the_module(way: str, tmp_path: Path, callback: TMMCallback) -> None:
    _, fitted = new_model(way, Silent)
    trainer = new_trainer(callback, strategy="ddp", devices=1, accumulate_grad_batches=2)
    if way == "compiled in place":
        with pytest.raises(ValueError, match=r"pass torch.compile\(module\) to fit instead"):
            trainer.fit(fitted, batches(4))
        return
    trainer.fit(fitted, batches(4))
    steps = recorded(tmp_path)
    assert len(steps) == 2
    for values in steps:  # the loss, which DDP has as the output of the module, is not in it
        assert values["activation/[root module]/rms"] == values["activation/net/rms"]


def test_the_other_package_of_lightning(tmp_path: Path, callback: TMMCallback) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = other.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **options)
    trainer.fit(Other(), batches(2))
    first, _ = recorded(tmp_path)
    assert {"activation/net/rms", "gradient/net.weight/norm", "loss"} <= first.keys()
    assert not any("before_clip" in key for key in first)


@pytest.mark.parametrize("missing", [["lightning"], ["lightning", "pytorch_lightning"]])
def test_missing_packages(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tmm.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    for package in missing:
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    if len(missing) == 1:
        other = pytest.importorskip("pytorch_lightning")
        assert issubclass(importlib.import_module(name).TMMCallback, other.Callback)
    else:
        with pytest.raises(ImportError, match=re.escape("pip install 'tmm-compile[lightning]'")):
            importlib.import_module(name)
