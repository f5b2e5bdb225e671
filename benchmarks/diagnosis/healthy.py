"""Thirty trainings with which nothing is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.diagnosis.models import Task, cnn, gpt, mlp, vit
from benchmarks.diagnosis.training import Optimize, Training

_SGD: Optimize = lambda p, lr: torch.optim.SGD(p, lr=0.05)  # noqa: E731
_MOMENTUM: Optimize = lambda p, lr: torch.optim.SGD(p, lr=0.02, momentum=0.9)  # noqa: E731
_RMSPROP: Optimize = lambda p, lr: torch.optim.RMSprop(p, lr=lr / 3)  # noqa: E731
_ADAGRAD: Optimize = lambda p, lr: torch.optim.Adagrad(p, lr=2 * lr)  # noqa: E731
_ADAM: Optimize = lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.95))  # noqa: E731


def _warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 20)


def _cosine(step: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(step, 100) / 100)


def healthy(seed: int = 0) -> Iterator[tuple[str, Training]]:
    """The trainings by name; seeds from 100 on differ from those of the faults."""
    tasks: dict[str, Callable[..., Task]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "vit": vit}
    ways: dict[str, Callable[[Training], None]] = {
        "AdamW": lambda t: None,
        "SGD": lambda t: setattr(t, "optimize", _SGD),
        "warm-up and cosine": lambda t: setattr(
            t, "schedule", lambda step: _warm_up(step) * _cosine(step)
        ),
        "momentum": lambda t: setattr(t, "optimize", _MOMENTUM),
        "small data": lambda t: vars(t).update(data=4, steps=120),
    }
    place = 100 + 1000 * seed
    for name, make in tasks.items():
        for way, change in ways.items():
            torch.manual_seed(place)
            training = Training(make(place), place, steps=100)
            change(training)
            yield f"{name}, {way}", training
            place += 1
    more: dict[str, Callable[[], Training]] = {
        "gpt, dropout": lambda: Training(gpt(place, dropout=0.2), place, steps=100),
        "mlp, dropout": lambda: Training(mlp(place, dropout=0.5), place, steps=100),
        "vit, attention measured": lambda: Training(vit(place), place, steps=80, attention=True),
        "gpt, attention measured": lambda: Training(gpt(place), place, steps=80, attention=True),
        "mlp, RMSprop": lambda: Training(mlp(place), place, steps=100, optimize=_RMSPROP),
        "cnn, Adagrad": lambda: Training(cnn(place), place, steps=100, optimize=_ADAGRAD),
        "gpt, clipped at 1": lambda: _clipped(Training(gpt(place), place, steps=100)),
        "mlp, resumed": lambda: Training(mlp(place), place, steps=100, resumes_at=50),
        "mlp, tanh, wide": lambda: Training(
            mlp(place, width=128, act=nn.Tanh), place, steps=100, optimize=_ADAM
        ),
        "cnn, scaler": lambda: Training(
            cnn(place), place, steps=100, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40)
        ),
    }
    for name, made in more.items():
        torch.manual_seed(place)
        yield name, made()
        place += 1


def _clipped(training: Training) -> Training:
    parameters = list(training.task.model.parameters())

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    training.gradients.append(clip)
    return training
