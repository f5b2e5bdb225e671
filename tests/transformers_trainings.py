"""Small trainings of ``transformers.Trainer``, and the same by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tmm
from tmm.integrations.transformers import TMMCallback

SPEC = tmm.Spec(
    tmm.activation("rms", "zero_fraction"),
    tmm.activation_gradient("rms"),
    tmm.gradient("norm"),
    tmm.parameter("rms"),
    tmm.update("norm"),
)


SAMPLES, BATCH, ACCUMULATED = 10, 2, 2


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


class RunsTheModel(TrainerCallback):
    trainer: Trainer

    def on_step_end(self, *arguments: Any, model: nn.Module, **event: Any) -> None:
        self.on_substep_end()
        model(x=torch.full((2, 4), 9.0), labels=torch.zeros(2, dtype=torch.int64))

    def on_substep_end(self, *arguments: Any, **event: Any) -> None:
        self.trainer.evaluate(OTHERS)
        self.trainer.predict(OTHERS)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, *arguments: Any, **event: Any) -> None:
        if arguments[1].global_step == self.step:
            raise KeyboardInterrupt


def fails(batch: Any) -> Any:
    raise OSError("the disk is gone")


class Refuses(TrainerCallback):
    def on_train_begin(self, *arguments: Any, **event: Any) -> None:
        raise ValueError("not today")


class CallsAnotherModel(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        return self.model(**inputs)["loss"]


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


class ClipsEachBatch(Trainer):
    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients:
            gradients = [p.grad for p in self.model.parameters()]
            self.complete.append(nn.utils.get_total_norm(gradients).item())
        self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm=0.01)
        return loss
