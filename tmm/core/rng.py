"""Keep what a forward pass changes besides its output: random states and buffers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tmm.core.module_names import modules_of


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of all random generators that a model may draw from."""

    cpu: torch.Tensor
    accelerators: tuple[tuple[str, tuple[torch.Tensor, ...]], ...]
    python: object
    numpy: dict[str, Any] | None

    @staticmethod
    def capture(*, of_torch_only: bool = False) -> RandomState:
        """The states now. Does not start an accelerator that is not in use."""
        return RandomState(
            torch.get_rng_state(),
            tuple(_states_of_accelerators()),
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
        for kind, states in self.accelerators:
            if kind == "mps":
                torch.mps.set_rng_state(states[0])
            else:
                getattr(torch, kind).set_rng_state_all(list(states))
        if self.numpy is not None:
            random.setstate(self.python)  # type: ignore[arg-type]
            np.random.set_state(self.numpy)


def _states_of_accelerators() -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """The generators of each kind of accelerator that is in use, of all its devices."""
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_initialized():
            yield kind, tuple(module.get_rng_state_all())
    if torch.backends.mps.is_available():
        yield "mps", (torch.mps.get_rng_state(),)


@dataclass(frozen=True, eq=False)
class PassState:
    """What tells whether a pass of ``module`` that has failed can be run once more, and lets it.

    ``versions`` are how often tensors had been written to: buffers, and of a pass that trains
    parameters and gradients, too. ``without_gradient`` are the parameters that had none.
    """

    random: RandomState
    module: torch.nn.Module
    versions: tuple[tuple[torch.Tensor, int], ...]
    without_gradient: tuple[torch.Tensor, ...] = ()

    def is_written_to(self) -> bool:
        """Whether the pass may have begun to write, so that it cannot be run once more."""
        known = {id(tensor) for tensor, _ in self.versions}
        return (
            any(tensor._version != version for tensor, version in self.versions)
            or any(parameter.grad is not None for parameter in self.without_gradient)
            or any(id(buffer) not in known for buffer in _buffers_in(modules_of(self.module)))
        )


class PassStates:
    """Captures the state of a module before passes of it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._owners: tuple[torch.nn.Module, ...] | None = None

    def capture(
        self, *, trains: bool, of_torch_only: bool = False, looks: bool = True
    ) -> PassState:
        """The state now; ``of_torch_only`` leaves out the generators of Python and NumPy.

        Without ``looks`` buffers are those of the modules that had some when somebody last looked:
        a pass that fails is not run once more if there are others.
        """
        if looks or self._owners is None:
            self._owners = tuple(part for part in modules_of(self._module) if part._buffers)
        buffers = _buffers_in(self._owners)
        parameters = tuple(self._module.parameters()) if trains else ()
        gradients = [p.grad for p in parameters if p.grad is not None]
        return PassState(
            RandomState.capture(of_torch_only=of_torch_only),
            self._module,
            tuple([(t, t._version) for t in (*buffers, *parameters, *gradients)]),
            tuple([parameter for parameter in parameters if parameter.grad is None]),
        )


def _buffers_in(modules: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        for buffer in module._buffers.values():
            if buffer is not None:
                yield buffer


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
