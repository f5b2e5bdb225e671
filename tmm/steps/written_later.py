"""Parameters that somebody writes to after the step of their optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tmm.runtime.host_copies import HostCopies, HostCopy, are_ready
from tmm.spec.ranks import is_distributed

_TENSORS = 4
_ELEMENTS = 256


class WrittenLater:
    """Notices what is written to between the step of an optimizer and the end of a step.

    A write is seen by the version of a parameter. Those through ``parameter.data`` leave that as it
    is: the first elements of a few parameters are compared as well.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[torch.Tensor, int]] = {}
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pending: list[tuple[str, HostCopy]] = []

    def note(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """These are as an optimizer has left them."""
        plain = {
            name: parameter
            for name, parameter in parameters.items()
            if not is_distributed(parameter) and not parameter.is_inference()
        }
        self._versions |= {name: (tensor, tensor._version) for name, tensor in plain.items()}
        dense = [name for name, tensor in plain.items() if tensor.is_contiguous()]
        for name in dense[:: max(1, len(dense) // _TENSORS)][:_TENSORS]:
            self._samples[name] = plain[name], _beginning(plain[name]).clone()

    def found(self) -> str | None:
        """The name of one that was written to; None if nobody knows of any. Begins anew.

        On an accelerator a write that versions do not tell is known some calls later: nobody waits.
        """
        found = [
            name for name, (tensor, known) in self._versions.items() if tensor._version != known
        ]
        while self._pending and are_ready([self._pending[0][1]]):
            name, copy = self._pending.pop(0)
            if copy.read().item():
                found.append(name)
        copies = HostCopies()
        for name, (tensor, known) in self._samples.items():
            differs = (_beginning(tensor) != known).any()
            if tensor.device.type != "cpu":
                self._pending.append((name, copies.copy(differs)))
            elif differs.item():
                found.append(name)
        copies.end()
        self.forget()
        return found[0] if found else None

    def forget(self) -> None:
        """The step is over."""
        self._versions, self._samples = {}, {}


def _beginning(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements, as the bytes that they are: NaN equals itself, then."""
    return tensor.detach().reshape(-1)[:_ELEMENTS].view(torch.uint8)
