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
    numpy: dict[str, Any] | None

    @staticmethod
    def capture(*, of_torch_only: bool = False) -> RandomState:
        """The states now. Does not start an accelerator that is not in use."""
        started = torch.cuda.is_initialized()
        return RandomState(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if started else (),
            None if of_torch_only else random.getstate(),
            None if of_torch_only else np.random.get_state(legacy=False),
        )

    def has_drawn_elsewhere(self) -> bool:
        """Whether random numbers other than torch's were drawn since; it holds their states."""
        assert self.numpy is not None
        now = np.random.get_state(legacy=False)
        own, others = (dict(state, state=None) for state in (self.numpy, now))
        key, pos = self.numpy["state"]["key"], self.numpy["state"]["pos"]
        return (
            random.getstate() != self.python
            or own != others
            or pos != now["state"]["pos"]
            or not np.array_equal(key, now["state"]["key"])
        )

    def restore(self) -> None:
        """Make them the states again."""
        torch.set_rng_state(self.cpu)
        if self.accelerators:
            torch.cuda.set_rng_state_all(list(self.accelerators))
        if self.numpy is not None:
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
