"""What takes the rows that a program measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import torch

from tmm.runtime.key_binding import Binding, KeyRegistry

GradientSink: TypeAlias = Callable[[Binding, Sequence[torch.Tensor]], None]


class Recorder(Protocol):
    """Takes what a twin measures."""

    registry: KeyRegistry

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients carry a scaler's factor."""

    def is_monitoring(self) -> bool:
        """Whether a forward pass would be measured now."""

    def is_elsewhere(self) -> bool:
        """Whether another thread has the open step."""

    def outside_pass(self, module: torch.nn.Module, output: object) -> AbstractContextManager[None]:
        """Rows in the block are of a module that was called past the model's own forward."""

    def add(self, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        """Take the extra outputs of one call of a graph."""

    def begin_pass(self, module: torch.nn.Module | None, inputs: object) -> None:
        """A step function calls a module."""

    def end_pass(self, output: object) -> None:
        """The module that a step function called has given ``output``."""

    def follow(self, outputs: Sequence[object]) -> None:
        """A graph of a step function has given ``outputs``."""

    def note_failure(self, error: Exception) -> None:
        """The step is lost, as something of it could not be measured; raises in the first one."""

    def gradient_sink(self) -> GradientSink | None:
        """What takes the rows of gradients of the step that is open; None if none is wanted."""

    def gradient_factor(self, device: torch.device) -> torch.Tensor | None:
        """What gradients of this forward pass are to be multiplied with, if anything."""

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost the open step its rows, but not end it."""

    def bear(self, error: Exception) -> None:
        """Do not record the open step, for which ``error`` is the reason."""
