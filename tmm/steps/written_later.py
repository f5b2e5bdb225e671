"""Parameters that somebody writes to after the step of their optimizer."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch

from tmm.runtime.host_copies import HostCopies, HostCopy, are_ready
from tmm.spec.ranks import is_distributed

_TENSORS = 4
_ELEMENTS = 256


@dataclass(frozen=True, eq=False)
class _Sample:
    """The first elements of parameters on one device, as they were: bytes, some of each."""

    parameters: Mapping[str, torch.Tensor]
    known: tuple[torch.Tensor, ...]

    @staticmethod
    def of(parameters: Mapping[str, torch.Tensor]) -> _Sample:
        """As they are now; at least one."""
        now = [_beginning(parameter) for parameter in parameters.values()]
        return _Sample(parameters, torch.cat(now).split([len(piece) for piece in now]))

    def without(self, names: Container[str]) -> _Sample | None:
        """The sample of the others; None if there are none."""
        known = dict(zip(self.parameters, self.known, strict=True))
        kept = {name: p for name, p in self.parameters.items() if name not in names}
        return _Sample(kept, tuple(known[name] for name in kept)) if kept else None

    def differences(self) -> torch.Tensor:
        """For each byte whether it is another one now."""
        now = [_beginning(parameter) for parameter in self.parameters.values()]
        if [len(piece) for piece in now] != [len(piece) for piece in self.known]:
            return torch.ones_like(torch.cat(self.known), dtype=torch.bool)
        return torch.cat(now) != torch.cat(self.known)

    def first(self, differences: torch.Tensor) -> str | None:
        """The name of the first parameter that has any; on the host."""
        if not differences.any():
            return None
        pieces = differences.split([len(piece) for piece in self.known])
        named = zip(self.parameters, pieces, strict=True)
        return next(name for name, piece in named if piece.any())


class WrittenLater:
    """Notices what is written to between the step of an optimizer and the end of a step.

    A write is seen by the version of a parameter. Those through ``parameter.data`` leave that as it
    is: the first elements of a few parameters are compared as well.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[torch.Tensor, int]] = {}
        self._samples: list[_Sample] = []
        self._pending: list[tuple[_Sample, HostCopy]] = []

    def note(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """These are as an optimizer has left them."""
        plain = {
            name: parameter
            for name, parameter in parameters.items()
            if not (is_distributed(parameter) or parameter.is_inference())
        }
        self._versions.update({name: (tensor, tensor._version) for name, tensor in plain.items()})
        if self._samples:  # of an optimizer that stepped before
            kept = [sample.without(plain) for sample in self._samples]
            self._samples = [sample for sample in kept if sample is not None]
        dense = [name for name, tensor in plain.items() if tensor.is_contiguous()]
        chosen: dict[torch.device, dict[str, torch.Tensor]] = {}
        for name in dense[:: max(1, len(dense) // _TENSORS)][:_TENSORS]:
            chosen.setdefault(plain[name].device, {})[name] = plain[name]
        self._samples += map(_Sample.of, chosen.values())

    def found(self) -> str | None:
        """The name of one that was written to; None if nobody knows of any. Begins anew.

        On an accelerator a write that versions do not tell is known some calls later: nobody waits.
        """
        found: list[str | None] = [
            name for name, (tensor, known) in self._versions.items() if tensor._version != known
        ]
        copies = HostCopies()
        self._pending += [(some, copies.copy(some.differences())) for some in self._samples]
        copies.end()
        while self._pending and are_ready([self._pending[0][1]]):
            sample, copy = self._pending.pop(0)
            found.append(sample.first(copy.read()))
        self.forget()
        return next((name for name in found if name is not None), None)

    def forget(self) -> None:
        """The step is over."""
        self._versions, self._samples = {}, []


def _beginning(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements, as the bytes that they are: NaN equals itself, then."""
    return tensor.detach().reshape(-1)[:_ELEMENTS].view(torch.uint8)
