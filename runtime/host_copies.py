"""Tensors on their way to the host: those of a step share pinned memory, and what tells the end."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from tmm.kernels.dense import PINNED

_BLOCK = 1 << 16  # bytes; a step of many models fits in
_ALIGNMENT = 16  # bytes


class Mark:
    """Tells whether a stream has come as far as it was told to when the mark was set."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream
        self._event: torch.Event | None = None
        self._lock = threading.Lock()

    @property
    def is_set(self) -> bool:
        """Whether work that is added to the stream from now on no longer counts."""
        return self._event is not None

    def set(self) -> torch.Event:
        """Let what the stream was told so far count, unless the mark is set; waits for nothing."""
        with self._lock:
            if self._event is None:
                event = _event(self._stream.device)
                event.record(self._stream)
                self._event = event
            return self._event

    def is_reached(self) -> bool:
        """Whether the stream has come so far; waits for nothing."""
        event = self.set()
        with _current(self._stream.device):
            return bool(event.query())

    def wait(self) -> None:
        """Wait until the stream has come so far, without a busy thread where that can be."""
        event = self.set()
        with _current(self._stream.device):
            event.synchronize()


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A tensor on its way to the host; reading it waits for that, making it does not."""

    tensor: torch.Tensor
    ready: Mark | None

    def read(self) -> torch.Tensor:
        """The tensor in host memory."""
        if self.ready is not None:
            self.ready.wait()
        return self.tensor

    def elements(self) -> list[HostCopy]:
        """Each element of a one-dimensional tensor, on the same way."""
        return [HostCopy(element, self.ready) for element in self.tensor.split(1)]


class HostCopies:
    """Copies to the host that are read together, such as those of a step.

    Each is made at once, in stream order: the graph of a replay may write its rows anew. Pinned
    memory is taken once for all, and a stream is asked once how far it has come.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[torch.device, int], Mark] = {}
        self._block: torch.Tensor | None = None
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> HostCopy:
        """Start to copy ``tensor``, without waiting; one on the host is not copied."""
        if tensor.device.type == "cpu":
            return HostCopy(tensor, None)
        host = self._memory(tensor)
        host.copy_(tensor, non_blocking=True)
        stream = torch.accelerator.current_stream(tensor.device)
        key = tensor.device, stream.stream_id
        mark = self._marks.get(key)
        if mark is None or mark.is_set:
            mark = self._marks[key] = Mark(stream)
        return HostCopy(host, mark)

    def end(self) -> None:
        """Nobody needs to wait for what streams are told from now on."""
        for mark in self._marks.values():
            mark.set()

    def _memory(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type not in PINNED:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        size = tensor.numel() * tensor.element_size()
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._block is None or start + size > len(self._block):
            start, length = 0, max(_BLOCK, size)
            with torch.inference_mode(False):  # else it could not be written to outside of that
                self._block = torch.empty(length, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._used = start + size
        return self._block[start : self._used].view(tensor.dtype).view(tensor.shape)


def are_ready(copies: Iterable[HostCopy]) -> bool:
    """Whether all can be read without waiting."""
    marks = {copy.ready for copy in copies if copy.ready is not None}
    return all(mark.is_reached() for mark in marks)


def _event(device: torch.device) -> torch.Event:
    if device.type == "cuda":  # a thread that waits for another event keeps a core busy
        return torch.cuda.Event(blocking=True)
    return torch.Event(device=device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one of this thread: another thread's is the first, which it may open."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
