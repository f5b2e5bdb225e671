"""What a TorchTNT unit consists of, and how far it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler


def name_of_module(unit: Any, name: str | None) -> str:
    """The attribute of ``unit`` that is measured; raises ``ValueError``."""
    modules: dict[str, torch.nn.Module] = unit.tracked_modules()
    if name is not None:
        if name not in modules:
            raise ValueError(f"module={name!r} is none of the unit's: {', '.join(modules)}")
        return name
    optimizers = unit.tracked_optimizers().values()
    trained = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    names = list(modules)
    if len(names) > 1:
        names = [n for n in names if any(p in trained for p in modules[n].parameters())]
        inner = {part for n in names for part in list(modules[n].modules())[1:]}
        names = [n for n in names if modules[n] not in inner]
    if len(names) != 1:
        raise ValueError(
            f"which module to measure? The unit has {', '.join(modules) or 'none'}; say it by"
            " TMMCallback(module='name'), with one callback and run for each"
        )
    return names[0]


def scaler_of(unit: Any, name: str | None) -> GradScaler | None:
    """The scaler of ``unit``, if it has one; raises ``ValueError``."""
    found = {
        key: value
        for key, value in unit.tracked_misc_statefuls().items()
        if isinstance(value, GradScaler)
    }
    if name is not None and name not in found:
        raise ValueError(f"scaler={name!r} is no GradScaler of the unit; it has {list(found)}")
    if name is None and len(found) > 1:
        raise ValueError(
            f"which scaler goes with the module? The unit has {', '.join(found)}; say it by"
            " TMMCallback(scaler='name')"
        )
    return found[name] if name is not None else next(iter(found.values()), None)


def steps_done(progress: Any, every: int) -> int:
    """How many optimizer steps the progress of a unit is, if all epochs were equally long.

    There is one after ``every`` batches, and at the end of an epoch.
    """
    epochs, in_epoch = progress.num_epochs_completed, progress.num_steps_completed_in_epoch
    before = progress.num_steps_completed - in_epoch
    per_epoch = -(-before // (max(epochs, 1) * every))
    return int(epochs * per_epoch + in_epoch // every)
