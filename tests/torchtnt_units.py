"""A small unit of TorchTNT, and its training written by hand, which knows nothing of tmm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.auto_unit import SWAParams as SWAParams
from torchtnt.framework.callback import Callback
from torchtnt.framework.callbacks import DistributedCheckpointSaver
from torchtnt.framework.evaluate import evaluate as evaluate
from torchtnt.framework.fit import fit as fit
from torchtnt.framework.predict import predict as predict
from torchtnt.framework.train import train as train
from torchtnt.framework.unit import EvalUnit, TrainUnit
from torchtnt.utils.prepare_module import ActivationCheckpointParams as ActivationCheckpointParams
from torchtnt.utils.prepare_module import CheckpointImpl as CheckpointImpl
from torchtnt.utils.prepare_module import TorchCompileParams

import tmm
from tmm.integrations.torchtnt import TMMCallback

Batch = tuple[torch.Tensor, torch.Tensor]
Values = list[dict[str, float]]

SPEC = tmm.Spec(
    tmm.activation("rms"), tmm.gradient("norm"), tmm.parameter("rms"), tmm.update("norm")
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first = nn.Linear(4, 8)
            self.drop = nn.Dropout(0.2)
            self.last = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.first(inputs).relu()))


def batches(number: int, seed: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(3 + i % 3, 4, generator=generator),
            torch.randint(3, (3 + i % 3,), generator=generator),
        )
        for i in range(number)
    ]


class Unit(AutoUnit[Batch]):
    def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def compute_loss(self, state: Any, data: Batch) -> Any:
        outputs = self.module(data[0])
        return cross_entropy(outputs, data[1]), outputs

    def predict_step(self, state: Any, data: Batch) -> Any:
        return self.module(data[0])


class Recording(TMMCallback):
    """Its runs lie below one folder, without system metrics."""

    def __init__(self, root: Path, spec: tmm.Spec = SPEC, **options: Any) -> None:
        super().__init__(spec, project="p", root=root, system_seconds=None, **options)

    def values(self) -> Values:
        assert self.run is not None
        with tmm.open_run(self.run.path) as run:
            assert run.steps.tolist() == list(range(len(run.steps)))
            rows = [run.at(step) for step in range(len(run.steps))]
        return [{k: v for k, v in row.items() if not k.startswith("system/")} for row in rows]


def record(root: Path) -> Any:
    (found,) = tmm.list_runs(root)
    return found


def by_hand(
    data: list[Batch],
    *,
    epochs: int = 1,
    accumulation: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[nn.Module, Values]:
    """What AutoUnit does, and what the rules of SPEC mean, in plain torch and float64."""
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    outputs: dict[str, list[torch.Tensor]] = {}
    names = {part: name or "[root module]" for name, part in module.named_modules()}
    handles = [
        part.register_forward_hook(
            lambda part, _, output: outputs.setdefault(names[part], []).append(output.detach())
        )
        for part in names
    ]
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    values: Values = []
    for _ in range(epochs):
        loss_of_step = 0.0
        for index, (inputs, targets) in enumerate(data):
            with torch.autocast("cpu", precision, enabled=precision is not None):
                loss = cross_entropy(module(inputs), targets)
            loss = loss / accumulation
            scaler.scale(loss).backward()
            loss_of_step += loss.item()
            if (index + 1) % accumulation and index + 1 < len(data):
                continue
            now = {"loss": loss_of_step, "learning_rate": optimizer.param_groups[0]["lr"]}
            loss_of_step = 0.0
            for name, parts in outputs.items():
                joined = torch.cat([part.double().flatten() for part in parts])
                now[f"activation/{name}/rms"] = joined.square().mean().sqrt().item()
            outputs.clear()
            if clip_norm or clip_value:
                scaler.unscale_(optimizer)
                now |= norms(module, "gradient_before_clip")
            if clip_norm:
                total = nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
                before_clip = now["step/gradient_norm_before_clip"]
                assert total.item() == pytest.approx(before_clip, 1e-5, nan_ok=True)
            if clip_value:
                nn.utils.clip_grad_value_(module.parameters(), clip_value)
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            scale = scaler.get_scale()
            factor = scale if scaler.is_enabled() and not (clip_norm or clip_value) else 1.0
            gradients = norms(module, "gradient", factor)
            scaler.step(optimizer)
            scaler.update()
            if scaler.is_enabled():
                now["step/grad_scale"] = scale
                now["step/skipped"] = float(scaler.get_scale() < scale)
            if not now.get("step/skipped"):
                now |= gradients
                for name, parameter in module.named_parameters():
                    difference = parameter.detach().double() - before[name].double()
                    now[f"update/{name}/norm"] = difference.norm().item()
            for name, parameter in module.named_parameters():
                now[f"parameter/{name}/rms"] = parameter.double().square().mean().sqrt().item()
            optimizer.zero_grad()
            values.append(now)
    for handle in handles:
        handle.remove()
    return module, values


def norms(module: nn.Module, family: str, factor: float = 1.0) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        norm = (parameter.grad.double() / factor).norm().item()
        found[f"{family}/{name}/norm"] = norm
        block = name.split(".")[0]
        total = f"step/{family.replace('gradient', 'gradient_norm')}"
        for key in (total, f"{total}/{block}"):
            found[key] = (found.get(key, 0.0) ** 2 + norm**2) ** 0.5
    return found


def assert_equal_values(ours: Values, truth: Values, tolerance: float = 1e-5) -> None:
    assert len(ours) == len(truth)
    for step, (own, expected) in enumerate(zip(ours, truth, strict=True)):
        assert own.keys() == expected.keys(), step
        for key, value in expected.items():
            close = pytest.approx(value, rel=tolerance, abs=0.01 * tolerance, nan_ok=True)
            assert own[key] == close, key


def assert_equal_weights(left: nn.Module, right: nn.Module) -> None:
    others = right.state_dict()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, others[name.replace("_orig_mod.", "")]), name


def auto_unit(settings: dict[str, Any], compiled: str = "uncompiled", **further: Any) -> Unit:
    module: Any = Net()
    if compiled == "parameters":
        further["torch_compile_params"] = TorchCompileParams(backend="aot_eager")
    elif compiled == "in_place":
        module.compile(backend="aot_eager")
    elif compiled == "handed_in":
        module = torch.compile(module, backend="aot_eager")
    unit = Unit(
        module=module,
        device=torch.device("cpu"),
        precision=settings.get("precision"),
        gradient_accumulation_steps=settings.get("accumulation", 1),
        clip_grad_norm=settings.get("clip_norm"),
        clip_grad_value=settings.get("clip_value"),
        **further,
    )
    unit.lr_scheduler = None
    if settings.get("precision") is torch.float16:
        unit.grad_scaler = new_scaler()  # the one of TorchTNT does nothing without CUDA
    return unit


def new_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)


class Failing(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_step_start(self, state: Any, unit: Any) -> None:
        if unit.train_progress.num_steps_completed == self.at:
            raise RuntimeError("out of memory")


class Interrupting(Failing):
    """As somebody does by hand."""

    def on_train_step_start(self, state: Any, unit: Any) -> None:
        if unit.train_progress.num_steps_completed == self.at:
            raise KeyboardInterrupt


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


class Joined(Unit):
    def compute_loss(self, state: Any, data: Batch) -> Any:
        return cross_entropy(self.module(data[0]) + self.other(data[0]), data[1]), None


class Bypassing(OwnUnit):
    def train_step(self, state: Any, data: Batch) -> torch.Tensor:
        loss = cross_entropy(self.network.forward(data[0]), data[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def saver(root: Path, **options: Any) -> DistributedCheckpointSaver:
    return DistributedCheckpointSaver(str(root / "checkpoints"), **options)
