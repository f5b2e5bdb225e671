"""Small trainings of Lightning, and the same by hand, which knows nothing of tmm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import tmm
from tmm.integrations.lightning import TMMCallback

RULES = (
    *(tmm.activation("rms"), tmm.activation_gradient("rms")),
    *(tmm.gradient("norm"), tmm.parameter("norm"), tmm.update("norm")),
)


SPEC = tmm.Spec(*RULES)


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


def new_callback(root: Path, spec: tmm.Spec = SPEC) -> TMMCallback:
    return TMMCallback(spec, root=root / "runs", system_seconds=None)


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
