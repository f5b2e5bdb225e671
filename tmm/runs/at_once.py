"""Many small things with files: one by one, or at once where each waits for something far away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_TRIED = 32
_SLOW_SECONDS = 3e-4  # of waiting for each; a local disk takes a tenth of that
_THREADS = 32

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def do_all(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """What ``function`` gives for each item, in their order.

    Threads do it where the first items have waited rather than computed, as on a file system of
    another machine: there the waiting is what takes the time. Elsewhere threads would only be in
    each other's way.
    """
    results: list[_Result] = []
    waited = 0.0
    for number, item in enumerate(items):
        if number >= _TRIED and waited / number > _SLOW_SECONDS:
            break
        began = time.perf_counter() - time.thread_time()
        results.append(function(item))
        waited += time.perf_counter() - time.thread_time() - began
    if rest := items[len(results) :]:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tmm-files") as pool:
            results.extend(pool.map(function, rest))
    return results
