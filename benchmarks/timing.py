"""Fair timing: variants take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
        """A 95 % confidence interval of the median ratio, from order statistics."""
        ordered = sorted(self.ratios)
        reach = 0.98 * len(ordered) ** 0.5  # binomial quantile by the normal approximation
        low = max(0, int(len(ordered) / 2 - reach))
        high = min(len(ordered) - 1, int(len(ordered) / 2 + reach))
        return ordered[low], ordered[high]


def interleave(
    variants: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 3
) -> dict[str, Timing]:
    """Time each variant once per round, in random order; the first one is the baseline."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(warm_up + rounds):
        for name in order.sample(names, len(names)):
            started = time.perf_counter()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    baseline = tuple(seconds[names[0]])
    return {name: Timing(tuple(seconds[name]), baseline) for name in names}


def environment() -> dict[str, str]:
    """What a report says about where it was made."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
