"""The collectives of torch.distributed, on a group of our own."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256

import numpy as np
import torch
import torch.distributed as dist

from tmm.core.metrics import FloatArray
from tmm.core.torch_private import default_patience, set_patience

_LENGTH = 8  # bytes of the number of bytes
_DIGEST = 32 + _LENGTH
_DISTINCT = 64  # values that are sent one after the other; of more, all at once


def _digest(value: bytes) -> bytes:
    """Tells values apart, and how long they are; ``_DIGEST`` bytes."""
    return sha256(value).digest() + len(value).to_bytes(_LENGTH)


def _bytes(value: bytes) -> torch.Tensor:
    if not value:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


class ProcessGroup:
    """Collectives between all processes of the training, over gloo.

    The rows lie in host memory when they are joined, and a group of its own can be used by a thread
    of its own while the training uses another one. To be made by all ranks together. ``patience``
    is how many seconds the training's own collectives wait for a rank.

    Raises:
        RuntimeError: if not all ranks make theirs within ``start_seconds``.
    """

    def __init__(self, *, start_seconds: float = 120.0, seconds: float = 1800.0) -> None:
        self.rank = dist.get_rank()
        self.patience = default_patience()
        self._size = dist.get_world_size()
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=start_seconds))
            dist.barrier(group)
        except Exception as error:
            raise RuntimeError(
                f"not all {self._size} ranks called tmm.instrument within {start_seconds:.0f} s;"
                " call it on every rank, or give distributed=False to measure each rank by itself."
                " If all did, they do not reach one another over gloo, as where the name of a host"
                " resolves to 127.0.0.1: set GLOO_SOCKET_IFNAME to the network interface"
            ) from error
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        set_patience(group, seconds)

    def maximum(self, values: FloatArray) -> FloatArray:
        """The largest of each element over all ranks."""
        return self._reduced(values, torch.maximum)

    def total(self, values: FloatArray) -> FloatArray:
        """The sum of each element over all ranks."""
        return self._reduced(values, torch.add)

    def everything(self, value: object) -> list[object]:
        """The values of all ranks, in order; one and the same object where they are equal.

        Most ranks say what others say, too: it is sent once, by the first of them.
        """
        own = pickle.dumps(value)
        told = [torch.empty(_DIGEST, dtype=torch.uint8, device="cpu") for _ in range(self._size)]
        dist.all_gather(told, _bytes(_digest(own)), group=self._group)
        digests = [part.numpy().tobytes() for part in told]
        first = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
        if len(first) > _DISTINCT:
            values: list[object] = [None] * self._size
            dist.all_gather_object(values, value, group=self._group)
            return values
        known: dict[bytes, object] = {}
        for digest, rank in sorted(first.items(), key=lambda item: item[1]):
            if rank == self.rank:
                sent = _bytes(own)
            else:
                length = int.from_bytes(digest[-_LENGTH:])
                sent = torch.empty(length, dtype=torch.uint8, device="cpu")
            dist.broadcast(sent, rank, group=self._group)
            known[digest] = pickle.loads(sent.numpy().tobytes())
        return [known[digest] for digest in digests]

    def payloads(self, value: bytes, size: int) -> list[bytes]:
        """On rank 0 the bytes of all ranks, in order, each padded to ``size``; else nothing."""
        own = torch.zeros(size, dtype=torch.uint8, device="cpu")
        own[: len(value)] = _bytes(value)
        if self.rank != 0:
            dist.gather(own, group=self._group, dst=0)
            return []
        gathered = [torch.empty_like(own) for _ in range(self._size)]
        dist.gather(own, gathered, group=self._group, dst=0)
        return [part.numpy().tobytes() for part in gathered]

    def close(self) -> None:
        """Give up the group, if the training has not given up all of them."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _reduced(self, values: FloatArray, combine: Callable[..., torch.Tensor]) -> FloatArray:
        """By recursive doubling; all ranks get the same bits.

        That is log2 of the ranks messages one after the other, where gloo's own all-reduce, a ring,
        takes twice as many as there are ranks.
        """
        own = torch.from_numpy(np.array(values, dtype=np.float64))
        theirs = torch.empty_like(own)
        doubled = 1 << self._size.bit_length() - 1  # ranks that take part, a power of two
        spare = self._size - doubled  # the others, who hand theirs over and get the result
        if self.rank >= doubled:
            dist.send(own, self.rank - doubled, group=self._group)
            dist.recv(own, self.rank - doubled, group=self._group)
            return own.numpy()
        if self.rank < spare:
            dist.recv(theirs, self.rank + doubled, group=self._group)
            combine(own, theirs, out=own)
        distance = 1
        while distance < doubled:
            sent = dist.isend(own, self.rank ^ distance, group=self._group)
            assert sent is not None
            dist.recv(theirs, self.rank ^ distance, group=self._group)
            sent.wait()
            combine(own, theirs, out=own)
            distance *= 2
        if self.rank < spare:
            dist.send(own, self.rank + doubled, group=self._group)
        return own.numpy()
