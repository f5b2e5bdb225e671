"""What Python reads of tensors past torch's dispatcher, which therefore tells nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tmm.core.replacement import Replacement
from tmm.core.torch_private import get_current_dispatch_mode_stack
from tmm.instrumentation.reference.follower import Follower

_METHODS = ("tolist", "numpy")


@contextmanager
def watched_reads() -> Iterator[None]:
    """In the block, a follower of this thread is told of ``tensor.tolist()`` and ``.numpy()``.

    The methods are replaced for all tensors, hence for all threads; elsewhere they do what they
    did. Within another such block, nothing is left to do.
    """
    with ExitStack() as replaced:
        for name in _METHODS:
            if name not in vars(torch.Tensor):
                replaced.enter_context(Replacement(torch.Tensor, name, _watched(name)))
        yield


def _watched(name: str) -> Any:
    original = getattr(torch.Tensor, name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for mode in get_current_dispatch_mode_stack():
            if isinstance(mode, Follower):
                mode.read(tensor)
        return original(tensor, *args, **kwargs)

    read.__name__ = name
    return read
