"""Trainings of sharded models that are compared with a reference; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.sharded_reference_trainings FOLDER TRAINING...

Each writes what rank 0 has measured to ``FOLDER/TRAINING.pt``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tmm
from tests.rank_trainings import BACKEND, Metrics, batches, evenly, main
from tmm.core.torch_private import TorchDispatchMode

WIDTH = 10  # which four ranks cannot share evenly
STEPS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return result


class Net(nn.Module):
    """The root has parameters of its own before and after the blocks, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.again(torch.tanh(self.last(x)))
        return result


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def other_state() -> dict[str, Tensor]:
    """The state of another model of the same kind."""
    torch.manual_seed(7)
    return Net().state_dict()


def rules() -> tuple[tmm.Rule, ...]:
    return (
        tmm.activation("rms"),
        tmm.activation_difference("relative_norm", "cosine", "rms", "absmax"),
        tmm.parameter_difference("relative_norm", "norm", "absmax"),
        tmm.rcc(modules=r"blocks\.\d+(\.up|\.norm|\.down)?$|first|last"),
    )


def spec(reference: Any = "init", *chosen: tmm.Rule, every: int = 1, **options: Any) -> tmm.Spec:
    return tmm.Spec(*(chosen or rules()), reference=reference, every=every, **options)


def train(
    model: nn.Module,
    measured: tmm.Spec | None,
    share: Callable[[Tensor], list[Tensor]],
    trained: nn.Module | None = None,
    **options: Any,
) -> tuple[Metrics, dict[str, Tensor], nn.Module]:
    """The metrics of each step, the parameters in the end, and the model, still monitored."""
    called: Any = model
    monitor = None
    optimizer = torch.optim.AdamW((trained or model).parameters(), lr=1e-2)
    if measured is not None:
        called = tmm.instrument(model, measured, **options)
        monitor = tmm.monitor(called)
        monitor.watch(optimizer)
    metrics: Metrics = {}
    for step, batch in enumerate(batches()[:STEPS]):
        if monitor is not None:
            monitor.begin_step(step)
        parts = share(batch)
        outputs = called(torch.cat(parts)).split([len(part) for part in parts])
        torch.stack([output.square().mean() for output in outputs]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.end_step()
            metrics[step] = monitor.get_step_metrics() if step % measured.every == 0 else {}  # type: ignore[union-attr]
    final = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in (trained or model).named_parameters()
    }
    return metrics, final, called


def alone(count: int, reference: Any = "init", **options: Any) -> Metrics:
    """On one process, which has all shares."""
    model = net()
    compiled = torch.compile(model, backend=BACKEND)
    found, _, called = train(
        compiled, spec(reference, **options), lambda batch: evenly(count, batch), model
    )
    tmm.remove(called)
    return found


def own(batch: Tensor, count: int | None = None, rank: int | None = None) -> list[Tensor]:
    count = dist.get_world_size() if count is None else count
    return [evenly(count, batch)[dist.get_rank() if rank is None else rank]]


def sharded(
    mesh_shape: tuple[int, ...] = (), *, compiles: bool = True, **options: Any
) -> nn.Module:
    """Blocks sharded one by one, and the rest with the root."""
    model = net()
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in model.blocks:
        if compiles:
            block.compile(backend=BACKEND)
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@contextmanager
def wholes() -> Iterator[Counter[str]]:
    """Counts the counterparts that are gathered, and the most that are held at once."""
    from tmm.spec.gathering import Gathering

    counts: Counter[str] = Counter()
    original = Gathering.whole

    def counting(self: Gathering, kept: DTensor, tensor: Tensor) -> Tensor:
        before = len(self._here)
        whole = original(self, kept, tensor)
        counts["gathered"] += len(self._here) != before
        counts["most"] = max(counts["most"], len(self._here))
        return whole

    Gathering.whole = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Gathering.whole = original  # type: ignore[method-assign]


def compared(model: nn.Module, reference: Any = "init", **options: Any) -> Metrics:
    with wholes() as counts:
        metrics, _, called = train(model, spec(reference, **options), own)
    text = str(tmm.explain(called))
    tmm.remove(called)
    return {**metrics, -1: {"text": text, "counts": dict(counts)}}


def saved(folder: Path) -> Metrics:
    """References that lie in files: whole, and in parts of this many ranks or of one."""
    state = other_state()
    found: Metrics = {}
    if dist.get_rank() == 0:
        torch.save({"model": state}, folder / "whole.pt")
    dist.barrier()
    other = sharded(compiles=False)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            chunks = state[name].chunk(dist.get_world_size())
            if dist.get_rank() < len(chunks):
                parameter.to_local().copy_(chunks[dist.get_rank()])  # type: ignore[attr-defined]
    place = folder / f"parts-{dist.get_world_size()}"
    optimizer = {f"state.{name}.exp_avg": tensor for name, tensor in state.items()}
    checkpoint.save(
        {"app": {"model": other.state_dict(), "step": 3}, "optim": optimizer}, checkpoint_id=place
    )
    references = {
        "state dict": state,
        "state dict of parts": other.state_dict(),
        "module": other,
        "file": folder / "whole.pt",
        "checkpoint": place,
    }
    for name, reference in references.items():
        torch._dynamo.reset()
        model = sharded(compiles=name != "file")
        metrics, _, called = train(model, spec(reference), own)
        tmm.remove(called)
        found[name] = metrics  # type: ignore[index]
    return found


def undisturbed() -> Metrics:
    """Parameters in the end, with and without tmm."""
    found: dict[str, Any] = {}
    for name, measured in (("plain", None), ("each step", spec()), ("some", spec(every=2))):
        torch._dynamo.reset()
        _, final, called = train(sharded(), measured, own)
        if measured is not None:
            tmm.remove(called)
        found[name] = final
    return {0: found}


class Collectives(TorchDispatchMode):
    """Counts collectives of the training thread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func)
        return func(*args, **(kwargs or {}))


def counted() -> Metrics:
    """Collectives of steps that are monitored and of those that are not."""
    counts: dict[str, list[int]] = {}
    for name, measured in (("plain", None), ("measured", spec(every=2))):
        torch._dynamo.reset()
        model: Any = sharded(compiles=False)
        optimizer = torch.optim.AdamW(model.parameters())
        if measured is not None:
            model = tmm.instrument(model, measured)
            tmm.monitor(model).watch(optimizer)
        counts[name] = []
        for step, batch in enumerate(batches()[:STEPS]):
            with Collectives() as mode:
                if measured is not None:
                    tmm.monitor(model).begin_step(step)
                model(own(batch)[0]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if measured is not None:
                    tmm.monitor(model).end_step()
            counts[name].append(mode.count)
        if measured is not None:
            tmm.remove(model)
    return {0: counts}


def mixed_precision() -> Metrics:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    chosen = (tmm.activation_difference("relative_norm"), tmm.rcc(modules=r"blocks\.\d+(\.up)?$"))
    metrics, _, called = train(sharded(mp_policy=policy), spec("init", *chosen), own)
    text = str(tmm.explain(called))
    tmm.remove(called)
    return {**metrics, -1: {"text": text}}


def tensor_parallel() -> Metrics:
    """Differences of parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for source, given in (("init", "init"), ("other", other_state())):
        model = net()
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh, plan)
        chosen = tmm.parameter_difference("relative_norm", "norm", "absmax")
        metrics, _, called = train(model, spec(given, chosen), lambda batch: [batch])
        tmm.remove(called)
        if source == "init":
            first = metrics
    return {0: {"init": first, "other": metrics}}


def ddp() -> Metrics:
    model = net()
    wrapped = DistributedDataParallel(torch.compile(model, backend=BACKEND))
    metrics, _, called = train(wrapped, spec(), own, model)
    tmm.remove(called)
    return metrics


def set_later() -> Metrics:
    """The reference is replaced while the model is still gathered."""
    model = sharded(reshard_after_forward=False)
    called = tmm.instrument(model, spec())
    monitor = tmm.monitor(called)
    found: Metrics = {}
    for step, batch in enumerate(batches()[:2]):
        with torch.no_grad():
            called(own(batch)[0])  # leaves the blocks gathered
        monitor.set_reference("init" if step == 0 else other_state())
        with monitor.step(step):
            called(own(batch)[0]).square().mean().backward()
            monitor.monitor_parameters()
        found[step] = monitor.get_step_metrics()
    tmm.remove(called)
    return found


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "ddp": lambda _: ddp(),
    "compiled": lambda _: compared(sharded()),
    "uncompiled": lambda _: compared(sharded(compiles=False)),
    "stays_gathered": lambda _: compared(sharded(reshard_after_forward=False)),
    "hybrid": lambda _: compared(sharded((2, dist.get_world_size() // 2))),
    "saved": saved,
    "undisturbed": lambda _: undisturbed(),
    "counted": lambda _: counted(),
    "mixed_precision": lambda _: mixed_precision(),
    "tensor_parallel": lambda _: tensor_parallel(),
    "set_later": lambda _: set_later(),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
