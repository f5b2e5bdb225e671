"""What torch compiled in a block of code: graphs, breaks, kernels and the bytes they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass

import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics


@dataclass
class Compiled:
    """Numbers of graphs, of breaks between them, of Inductor's kernels, and bytes.

    ``kernels`` are those that Inductor generated, also if they come from its cache; calls of
    libraries and of operators that it does not look into are not among them. ``bytes_moved`` is
    what Inductor says that all of them read and write; it only says so while
    ``torch._logging.set_logs(inductor_metrics=True)``.
    """

    graphs: int = 0
    breaks: int = 0
    kernels: int = 0
    bytes_moved: int = 0

    def numbers(self) -> dict[str, int]:
        """What was counted."""
        return {
            name: number for name, number in asdict(self).items() if name != "bytes_moved" or number
        }


@contextmanager
def count_compiled() -> Iterator[Compiled]:
    """Count what is compiled in the block; the numbers are there when it ends."""
    found = Compiled()
    before = astuple(compiled_so_far())
    yield found
    found.graphs, found.breaks, found.kernels, found.bytes_moved = (
        after - earlier for after, earlier in zip(astuple(compiled_so_far()), before, strict=True)
    )


def compiled_so_far() -> Compiled:
    """What this process has compiled since its start."""
    return Compiled(
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        metrics.generated_kernel_count,
        metrics.num_bytes_accessed,
    )


def kernel_launches(step: Callable[[], object]) -> int:
    """Kernels that one step launches on a GPU; 0 on a CPU, where nothing is launched."""
    if not torch.cuda.is_available():
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total)
