"""Trainings whose optimizer averages gradients over ranks in its own step; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.averaging_optimizers FOLDER TRAINING...

No wrapper of torch knows of it: each rank has the gradients of its own part of the batch until the
optimizer reduces and scatters them, and gathers the parameters that ranks have updated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tmm
from tests.rank_trainings import Metrics, batches, evenly, main

STEPS = 4
WIDTH = 8


def world() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class PartedAdam(torch.optim.Optimizer):
    """Each rank has the state of as many rows of a large parameter, and updates these."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rank, size = world()
        for group in self.param_groups:
            for p in group["params"]:
                is_parted = p.ndim == 2 and p.shape[0] % size == 0 and size > 1
                if is_parted:
                    rows = p.shape[0] // size
                    gradient = torch.empty_like(p.grad[:rows])
                    dist.reduce_scatter_tensor(gradient, p.grad)
                    own = p[rank * rows : (rank + 1) * rows]
                else:
                    gradient, own = p.grad.clone(), p
                    if size > 1:
                        dist.all_reduce(gradient)
                gradient /= size
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(own)
                    state["exp_avg_sq"] = torch.zeros_like(own)
                state["exp_avg"].lerp_(gradient, 0.1)
                state["exp_avg_sq"].lerp_(gradient.square(), 0.05)
                change = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-4)
                updated = own - group["lr"] * change
                if is_parted:
                    dist.all_gather_into_tensor(p, updated)
                else:
                    p.copy_(updated)


class PartedMuon(torch.optim.Optimizer):
    """Each rank orthogonalizes the momentum of some of several matrices of one shape."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        rank, size = world()
        for group in self.param_groups:
            some = group["params"]
            count = -(-len(some) // size)
            stacked = torch.zeros(count * size, *some[0].shape)
            stacked[: len(some)] = torch.stack([p.grad for p in some])
            own = stacked[:count].clone()
            if size > 1:
                dist.reduce_scatter_tensor(own, stacked)
                own /= size
            state = self.state[some[0]]
            if not state:
                state["exp_avg"] = torch.zeros_like(own)  # under the name that Adam has
            state["exp_avg"].lerp_(own, 0.5)
            # Newton-Schulz, as Muon; a decomposition makes noise of what has no full rank.
            near = state["exp_avg"] / (state["exp_avg"].norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(3):
                near = 1.5 * near - 0.5 * near @ near.mT @ near
            changed = torch.zeros_like(own)
            here = some[rank * count : (rank + 1) * count]
            for place, p in enumerate(here):
                changed[place] = p - group["lr"] * near[place]
            if size > 1:
                dist.all_gather_into_tensor(stacked, changed)
            else:
                stacked = changed
            torch._foreach_copy_(some, list(stacked[: len(some)].unbind()))


class Both(torch.optim.Optimizer):
    """One optimizer with groups of both kinds, as such programs have it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        held = list(parameters)
        matrices = [p for p in held if p.shape == (WIDTH, WIDTH)]
        others = [p for p in held if p.shape != (WIDTH, WIDTH)]
        self.inner = [PartedMuon(matrices), PartedAdam(others)]
        super().__init__(held, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for inner in self.inner:
            inner.step()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), *hidden, nn.Linear(WIDTH, 5))


def spec(**options: Any) -> tmm.Spec:
    return tmm.Spec(
        tmm.gradient("norm", "std", "absmax"),
        tmm.update("relative_norm", "norm", "alignment"),
        tmm.optimizer_state("exp_avg_norm"),
        tmm.parameter("rms"),
        **options,
    )


def train(
    measured: tmm.Spec | None,
    make: Callable[..., torch.optim.Optimizer],
    count: int | None = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Metrics of each step, and what else is known of the training."""
    model = net()
    optimizer = make(model.parameters())
    called: Any = model
    monitor = None
    if measured is not None:
        called = tmm.instrument(model, measured)
        monitor = tmm.monitor(called)
        monitor.watch(optimizer)
    metrics: Metrics = {}
    local: dict[str, float] = {}
    for step, batch in enumerate(batches()[:STEPS]):
        if monitor is not None:
            monitor.begin_step(step)
        shares = evenly(count, batch) if count else [evenly(world()[1], batch)[world()[0]]]
        torch.stack([called(share).square().mean() for share in shares]).mean().backward()
        if step == 0:
            local = {n: p.grad.norm().item() for n, p in model.named_parameters()}  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.end_step()
            metrics[step] = monitor.get_step_metrics()
    found: dict[str, Any] = {"local": local}
    found["final"] = [p.detach().clone() for p in model.parameters()]
    if measured is not None:
        explained = tmm.explain(called)
        found |= {"notes": explained.notes, "unmeasured": explained.unmeasured}
        tmm.remove(called)
    return metrics, found


def averaged(make: Callable[..., torch.optim.Optimizer]) -> Metrics:
    plain, here = train(spec(), make), train(spec(average_gradients=True), make)
    without = train(None, make)[1]
    return {0: {"plain": plain, "averaged": here, "without": without}}


def of_other_parameters() -> Metrics:
    """Rank 1 has no gradient of one parameter."""
    model = net()
    called = tmm.instrument(model, spec(average_gradients=True))
    monitor = tmm.monitor(called)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    text = ""
    try:
        with monitor.step(0):
            called(batches()[0]).square().mean().backward()
            if dist.get_rank() == 1:
                model[0].bias.grad = None
            optimizer.step()
    except RuntimeError as error:
        text = str(error)
    tmm.remove(called)
    return {0: {"error": text}}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "adam": lambda _: averaged(PartedAdam),
    "both": lambda _: averaged(Both),
    "of_other_parameters": lambda _: of_other_parameters(),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
