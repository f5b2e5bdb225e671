"""A block whose products of float32 are not rounded to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 on a GPU as such, whatever the user's programs do; theirs is put back.

    A graph that is traced inside of the block multiplies as the user has it.
    """
    settings = torch.backends.cuda.matmul
    if device.type != "cuda" or settings.fp32_precision not in ("tf32", "none"):
        yield
        return
    before = settings.fp32_precision
    legacy = _legacy_precision()
    # Torch has two ways to say it, and refuses to multiply where they contradict each other.
    if legacy == "highest":
        settings.fp32_precision = "ieee"
    else:
        settings.allow_tf32 = False
    try:
        yield
    finally:
        if legacy == "highest":
            settings.fp32_precision = before
        elif legacy == "high":
            settings.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision(legacy)


def _legacy_precision() -> str:
    """What the older way of saying it says; "highest" where only the newer one is used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
