"""Fair timing: variants take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one variant, and of the baseline in the same rounds."""

    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """Ratio to the baseline, round by round."""
        return [own / base for own, base in zip(self.seconds, self.baseline, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % confidence interval of the median ratio."""
        return median_interval(self.ratios)

    @property
    def added(self) -> list[float]:
        """Seconds more than the baseline, round by round."""
        return [own - base for own, base in zip(self.seconds, self.baseline, strict=True)]

    def against(self, other: Timing) -> Timing:
        """The same rounds with another variant as the baseline."""
        return Timing(self.seconds, other.seconds)

    def in_blocks(self, size: int) -> Timing:
        """Sums over ``size`` rounds that follow each other; an incomplete last block is dropped."""
        starts = range(0, len(self.seconds) - size + 1, size)
        return Timing(
            tuple(sum(self.seconds[start : start + size]) for start in starts),
            tuple(sum(self.baseline[start : start + size]) for start in starts),
        )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median, from order statistics."""
    ordered = sorted(values)
    reach = 0.98 * len(ordered) ** 0.5  # binomial quantile by the normal approximation
    low = max(0, int(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, int(len(ordered) / 2 + reach))
    return ordered[low], ordered[high]


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed; tells whether it does, as glibc can.

    Else it gives some of it back to the system and gets it again, a few thousand pages a step. How
    many depends on where things happen to lie, which makes steps of one program differ by percents.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as malloc.h numbers them
    settings = {trim_threshold: 2**31 - 1, top_pad: 2**28, mmap_threshold: 2**25}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())


def interleave(
    variants: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 3, *, settle: int = 0
) -> dict[str, Timing]:
    """Time each variant once per round, in random order; the first one is the baseline.

    In each round a variant first runs ``settle`` times more, untimed: in a training, too, a step
    follows one of the same program, whose code and data the caches have, and not another one's.
    """
    keep_freed_memory()
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(warm_up + rounds):
        for name in order.sample(names, len(names)):
            for _ in range(settle):
                variants[name]()
            if settle and torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    baseline = tuple(seconds[names[0]])
    return {name: Timing(tuple(seconds[name]), baseline) for name in names}


def environment() -> dict[str, str]:
    """What a report says about where and how it was made."""
    return {
        "torch": torch.__version__,
        "tmm": importlib.metadata.version("tmm-compile"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "processors": str(os.cpu_count()),
        "memory": "kept by the allocator" if keep_freed_memory() else "as the allocator likes",
        "compile": "torch.compile, backend inductor, default mode, options as torch sets them",
        "seeds": "0 of the model, 1 of the batch, 0 of the order of variants",
    }


def processor() -> str:
    """What the processor calls itself, where the system tells."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine_kind() -> str:
    """A short name of this kind of machine, for the names of files: ``cpu-avx2-2-threads``."""
    if torch.cuda.is_available():
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{capability}-{torch.get_num_threads()}-threads"
