"""What an alternative is: one way to see inside of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tmm.instrumentation.compile_settings import HAS_ISOLATION

COMPILED, AOT_EAGER, EAGER = "plain compiled", "plain aot_eager", "plain uncompiled"


def nothing() -> None:
    """Do nothing."""


def no_values() -> Mapping[str, float]:
    """What a program without a monitor gives."""
    return {}


@dataclass(frozen=True)
class Attached:
    """An alternative at work on one model.

    ``module`` holds the parameters that are trained, ``forward`` runs it. ``begin`` is called
    before each step, ``read`` after it: the values of the step as numbers, by the name of a module
    and of a statistic. ``close`` ends what outlives a step.
    """

    module: nn.Module
    forward: Callable[..., Any]
    read: Callable[[], Mapping[str, float]] = no_values
    begin: Callable[[], None] = nothing
    close: Callable[[], None] = nothing


@dataclass(frozen=True)
class Alternative:
    """A way to get the five statistics of every module's output, or the nearest that it can.

    ``does`` says what it does, and how that differs; ``base`` names the program to which it adds
    its time. ``package`` must be installed for it; ``same_work`` tells whether its numbers are the
    five statistics of every module; ``works_aside`` that it keeps another process busy, so that it
    does not take turns with the others; ``leaves_model`` that nothing is put on the model, so that
    it and its base can train one and the same: where weights lie makes a difference of percents.
    """

    name: str
    does: str
    attach: Callable[[nn.Module], Attached]
    base: str = COMPILED
    package: str | None = None
    same_work: bool = True
    works_aside: bool = False
    leaves_model: bool = False


def compile_alone(module: nn.Module, backend: str = "inductor") -> nn.Module:
    """The compiled module, kept apart from programs of other models of its class.

    Dynamo looks for a program among all those of one class: the first one compiled would be found
    last, after the guards of all others have failed.
    """
    options = {"isolate_recompiles": True} if HAS_ISOLATION else {}
    compiled: nn.Module = torch.compile(module, backend=backend, **options)  # type: ignore[call-overload]
    return compiled
