"""``wandb.watch``: histograms of parameters and of their gradients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial

from torch import nn

from benchmarks.alternatives.interface import COMPILED, EAGER, Alternative, Attached, compile_alone


def attach(module: nn.Module, *, compiled: bool) -> Attached:
    """Watch the model in each step, without a network."""
    import wandb  # type: ignore[import-not-found,unused-ignore]

    os.environ.setdefault("WANDB_SILENT", "true")
    folder = tempfile.TemporaryDirectory()
    run = wandb.run or wandb.init(mode="offline", dir=folder.name)  # watch needs the global one
    model = compile_alone(module) if compiled else module
    run.watch(model, log="all", log_freq=1)

    def read() -> Mapping[str, float]:
        run.log({"step": 1})
        return {}

    def close() -> None:
        run.finish()
        folder.cleanup()

    return Attached(module, model, read, close=close)


ALTERNATIVES = tuple(
    Alternative(
        name,
        "histograms of parameters and gradients, none of activations; written offline",
        partial(attach, compiled=base == COMPILED),
        base,
        "wandb",
        same_work=False,
        works_aside=True,
    )
    for name, base in (("wandb.watch", EAGER), ("wandb.watch, compiled", COMPILED))
)
