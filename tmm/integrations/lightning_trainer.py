"""What a trainer and a module of Lightning tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import lightning.pytorch as pl

_SETTINGS = (
    *("max_epochs", "max_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "precision"),
)
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def parts(module: torch.nn.Module, *, with_root: bool) -> list[torch.nn.Module]:
    """The modules that a training step calls: its own, and the children that have parameters."""
    found = [module] if with_root else []
    inside = list(module.children())
    while inside:
        child = inside.pop(0)
        if isinstance(child, _CONTAINERS):
            inside.extend(child.children())
        elif next(child.parameters(), None) is not None and child not in found:
            found.append(child)
    return found


def begins_window(trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int) -> bool:
    """Whether gradients are zeroed in this batch."""
    return module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0


def clips(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether gradients are clipped between ``on_before_optimizer_step`` and the optimizer."""
    is_own = not is_of_lightning(module, "configure_gradient_clipping")
    return module.automatic_optimization and bool(trainer.gradient_clip_val or is_own)


def is_of_lightning(module: pl.LightningModule, method: str) -> bool:
    """Whether the class of the module leaves the method as Lightning has it."""
    package = str(getattr(type(module), method).__module__).partition(".")[0]
    return package in ("lightning", "pytorch_lightning")


def learning_rates(trainer: pl.Trainer) -> dict[str, object]:
    """The learning rate of each group of each optimizer, by the names of LearningRateMonitor."""
    rates: dict[str, object] = {}
    kinds: dict[str, int] = {}
    for optimizer in trainer.optimizers:
        kind = type(optimizer).__name__
        count = kinds[kind] = kinds.get(kind, 0) + 1
        name = f"lr-{kind}" if count == 1 else f"lr-{kind}-{count - 1}"
        groups = optimizer.param_groups
        for position, group in enumerate(groups, start=1):
            rates[name if len(groups) == 1 else f"{name}/pg{position}"] = group.get("lr")
    return rates


def configuration(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, object]:
    """The hyperparameters, as Lightning gives them to its loggers, and those of the trainer."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    of_data = {} if datamodule is None else dict(datamodule.hparams_initial)
    settings = {name: getattr(trainer, name) for name in _SETTINGS}
    return {**of_data, **module.hparams_initial, "trainer": settings}


def has_reached_its_end(trainer: pl.Trainer) -> bool:
    """Whether all epochs or steps that were asked for are done."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    has_all_epochs = epochs not in (None, -1) and trainer.current_epoch >= (epochs or 0)
    return has_all_epochs or (steps != -1 and trainer.global_step >= steps)


def why_stopped(trainer: pl.Trainer) -> str:
    """The reason that a callback gives for an early end, such as ``EarlyStopping``."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if reason := getattr(callback, "stopping_reason_message", None):
            return str(reason)
    return f"trainer.should_stop was set in epoch {trainer.current_epoch}"
