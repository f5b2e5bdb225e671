"""Numbers that a model keeps from one forward pass to the next, and that it read from tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tmm.core.module_names import ParameterNames

_NUMBERS = (bool, int, float, complex)
_OF_TORCH = frozenset(torch.nn.Module().__dict__)


class KeptNumbers:
    """Finds attributes of modules that change in a forward pass that reads values of tensors.

    They may be such values, which are others in the reference: those of the model are of no use
    to it from then on. What else is kept counts as the program, which both share.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._names = ParameterNames(module)
        self._before: dict[str, object] = {}
        self._read: dict[str, None] = {}

    def begin(self) -> str:
        """To be called before a forward pass; why it cannot be compared, if it cannot."""
        self._before = dict(self._now())
        if not self._read:
            return ""
        return f"{', '.join(self._read)} may hold a number that was read from tensors"

    def end(self, *, has_read: bool) -> None:
        """A forward pass is over, which has read values of tensors or has not."""
        if not has_read:
            return
        for name, value in self._now():
            before = self._before.get(name)
            if type(before) is not type(value) or not (value == before or value != value):
                self._read[name] = None

    def _now(self) -> Iterator[tuple[str, object]]:
        for owner, prefix in self._names.owners():
            for name, value in owner.__dict__.items():
                if isinstance(value, _NUMBERS) and name not in _OF_TORCH:
                    yield prefix + name, value
