"""W&B reads its environment once a process: here a test has one of its own, whoever was first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def private_wandb(folder: Path) -> Iterator[None]:
    """W&B offline, with its files in ``folder``; what comes before and after is not touched."""
    _forget()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            patch.setenv("WANDB_SILENT", "true")
            patch.setenv("WANDB_DIR", str(folder))
            yield
    finally:
        _forget()


def _forget() -> None:
    """The next run reads the environment anew; it is not imported for that."""
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()
