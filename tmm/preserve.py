"""Keep what a forward pass changes besides its output: random states and buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of all random generators that a model may draw from."""

    cpu: torch.Tensor
    accelerators: tuple[torch.Tensor, ...]
    python: object
    numpy: dict[str, Any]

    @staticmethod
    def capture() -> RandomState:
        """The states now. Does not start an accelerator that is not in use."""
        started = torch.cuda.is_available() and torch.cuda.is_initialized()
        return RandomState(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if started else (),
            random.getstate(),
            np.random.get_state(legacy=False),
        )

    def restore(self) -> None:
        """Make them the states again."""
        torch.set_rng_state(self.cpu)
        if self.accelerators:
            torch.cuda.set_rng_state_all(list(self.accelerators))
        random.setstate(self.python)  # type: ignore[arg-type]
        np.random.set_state(self.numpy)


@dataclass(frozen=True, eq=False)
class BufferVersions:
    """How often each buffer of a module had been written to."""

    versions: tuple[tuple[torch.Tensor, int], ...]

    @staticmethod
    def capture(module: torch.nn.Module) -> BufferVersions:
        """The versions now."""
        return BufferVersions(tuple((b, b._version) for b in module.buffers()))

    def changed(self) -> bool:
        """Whether any buffer has been written to since."""
        return any(buffer._version != version for buffer, version in self.versions)


@contextmanager
def unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Give random states and the buffers of ``module`` back as they were, whatever happens."""
    random_state = RandomState.capture()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        random_state.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
