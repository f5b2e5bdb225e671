"""What is known of the memory that the tensors of a step lie in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a piece of memory.

    ``source`` says what wrote to it last, ``origins`` whose NaN and infinities it may hold, and
    ``is_new`` whether it was made by an operation of the step.
    """

    reference: StorageWeakRef  # as long as it is held, no other memory has the same address
    source: str
    origins: frozenset[int]
    is_new: bool


class Memory:
    """The memory of all tensors of a step, whether it is still in use or not."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def of(self, tensor: torch.Tensor) -> Known | None:
        """What is known of the memory of an ordinary tensor."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def remember(
        self, tensor: torch.Tensor, source: str, origins: frozenset[int], *, is_new: bool
    ) -> None:
        """Know this of the memory of a tensor from now on."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = Known(StorageWeakRef(storage), source, origins, is_new)

    def meet(self, tensor: torch.Tensor) -> Known:
        """What is known of the memory of a tensor that is used; if nothing, it is from outside."""
        known = self.of(tensor)
        if known is None:
            self.remember(tensor, "", frozenset(), is_new=False)
            known = self.of(tensor)
            assert known is not None
        return known
