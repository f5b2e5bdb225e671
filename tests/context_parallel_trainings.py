"""A sequence in parts on several processes, and as a whole on one; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.context_parallel_trainings FOLDER TRAINING...

The ring attention of torch has no kernel for a CPU: keys and values are gathered here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn.parallel import DistributedDataParallel

import tmm
from tests import rank_trainings

Metrics = dict[int, dict[str, Any]]
STEPS, BATCH, LENGTH, WIDTH = 3, 3, 8, 16


# The older name warns, which Dynamo cannot trace.
gather = getattr(collectives, "all_gather_single_autograd", collectives.all_gather_tensor_autograd)


class Attention(nn.Module):
    """Causal, of two heads; queries of this rank and keys of all."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.ranks, self.rank = ranks, rank
        self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        if self.ranks > 1:
            key, value = self.of_all_ranks(key), self.of_all_ranks(value)
        length = query.shape[2]
        places = torch.arange(length) + self.rank * length
        mask = places[:, None] >= torch.arange(length * self.ranks)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

    def of_all_ranks(self, part: Tensor) -> Tensor:
        """The parts of the sequence that ranks have, one after the other."""
        gathered: Tensor = gather(part.contiguous(), 0, dist.group.WORLD)
        return gathered.unflatten(0, (self.ranks, -1)).movedim(0, 2).flatten(2, 3)


def model(ranks: int = 1, rank: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, WIDTH), Attention(ranks, rank), nn.GELU(), Attention(ranks, rank)
    )


def spec() -> tmm.Spec:
    return tmm.Spec(
        tmm.activation("mean", "std", "rms", "norm", "kurtosis", "absmax", "histogram"),
        tmm.activation_gradient("rms", "absmax", "norm"),
        tmm.attention("entropy", "max_logit", "sink_mass"),
        tmm.gradient("norm", "std"),
        tmm.update("norm"),
    )


def train(net: nn.Module, called: nn.Module, share: Callable[[Tensor], Tensor]) -> Metrics:
    called = tmm.instrument(called, spec())
    monitor = tmm.monitor(called)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor.watch(optimizer)
    generator = torch.Generator().manual_seed(1)
    metrics: Metrics = {}
    for step in range(STEPS):
        batch = torch.randn(BATCH, LENGTH, 4, generator=generator)
        with monitor.step(step):
            called(share(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics[step] = monitor.get_step_metrics()
    metrics[-1] = dict(tmm.explain(called).unmeasured)
    tmm.remove(called)
    return metrics


def alone() -> Metrics:
    net = model()
    return train(net, net, lambda batch: batch)


def in_parts(compile_it: Callable[[nn.Module], nn.Module]) -> Metrics:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    net = model(ranks, rank)
    wrapped = DistributedDataParallel(compile_it(net))
    return train(net, wrapped, lambda batch: batch.chunk(ranks, dim=1)[rank])


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "in_parts": lambda _: in_parts(lambda net: net),
    "in_parts_compiled": lambda _: in_parts(
        lambda net: torch.compile(net, backend="eager")  # type: ignore[arg-type, return-value]
    ),
}

if __name__ == "__main__":
    rank_trainings.main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
