"""Small trainings on several processes, and the same ones on one; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.rank_trainings FOLDER TRAINING...

Each training writes what rank 0 has measured to ``FOLDER/TRAINING.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import tmm
from tmm.runtime.ranks.gloo import ProcessGroup

Metrics = dict[int, dict[str, Any]]
Training = Callable[[], Metrics]
STEPS, BATCH, EVERY = 5, 12, 2
BACKEND = "aot_eager"


class Model(nn.Module):
    """Wide enough for several buckets of ``DistributedDataParallel``."""

    def __init__(self, width: int = 520) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.other = nn.Linear(width, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.first(x))
        tmm.record("hidden", hidden, aggregate="mean")
        result: Tensor = self.last(torch.tanh(self.other(hidden)))
        return result


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 8, generator=generator) for _ in range(STEPS)]


def spec(*further: tmm.Rule) -> tmm.Spec:
    return tmm.Spec(
        *(
            tmm.activation("mean", "std", "rms", "norm", "kurtosis", "absmax", "min", "histogram"),
            tmm.activation(largest=lambda x: x.abs().amax(-1), aggregate="max"),
            tmm.activation_gradient("rms", "absmax"),
            tmm.gradient("norm", "std", "absmax"),
            tmm.parameter("rms", "norm", "max"),
            tmm.update("relative_norm", "alignment"),
            tmm.optimizer_state("exp_avg_norm"),
        ),
        *further,
        every=EVERY,
    )


def quantiles() -> tmm.Rule:
    return tmm.activation(
        median=lambda x: x.abs().mean(-1), aggregate=torch.median, modules="block$|last"
    )


def train(
    called: nn.Module,
    trained: nn.Module,
    share: Callable[[Tensor], list[Tensor]],
    measured: tmm.Spec | None = None,
    before_removal: Callable[[nn.Module], None] = lambda called: None,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> Metrics:
    """The metrics of each monitored step; the loss is the mean of those of the shares."""
    called = tmm.instrument(called, measured or spec(quantiles()), **options)
    monitor = tmm.monitor(called)
    optimizer = make_optimizer(trained.parameters(), lr=1e-3)
    monitor.watch(optimizer)
    metrics: Metrics = {}
    for step, batch in enumerate(batches()):
        with monitor.step(step):
            parts = share(batch)
            outputs = called(torch.cat(parts)).split([len(part) for part in parts])
            losses = [output.square().mean() for output in outputs]
            monitor.log_scalar("loss", torch.stack(losses).mean())
            monitor.log_tensor(
                "losses", torch.stack([o.square().mean(1).max() for o in outputs]), "max"
            )
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            metrics[step] = monitor.get_step_metrics()
    before_removal(called)
    tmm.remove(called)
    return metrics


def evenly(count: int, batch: Tensor) -> list[Tensor]:
    return list(batch.chunk(count))


def unevenly(count: int, batch: Tensor) -> list[Tensor]:
    """Shares of 1, 2, ... items, and the rest."""
    sizes = [*range(1, count), BATCH - sum(range(1, count))]
    return list(batch.split(sizes))


def own(shares: Callable[[int, Tensor], list[Tensor]], batch: Tensor) -> list[Tensor]:
    """That of this rank."""
    return [shares(dist.get_world_size(), batch)[dist.get_rank()]]


# The trainings


def alone(shares: Callable[[int, Tensor], list[Tensor]], count: int, **options: Any) -> Metrics:
    """On one process, which has all shares."""
    net = model()
    compiled = torch.compile(net, backend=BACKEND)
    return train(compiled, net, partial(shares, count), **options)


def ddp_inside(shares: Any = evenly) -> Metrics:
    net = model()
    wrapped = DistributedDataParallel(torch.compile(net, backend=BACKEND))
    return train(wrapped, net, partial(own, shares))


def ddp_outside(shares: Any = evenly) -> Metrics:
    net = model()
    wrapped = DistributedDataParallel(net, bucket_cap_mb=1)
    return train(torch.compile(wrapped, backend=BACKEND), net, partial(own, shares))


def ddp_uncompiled(shares: Any = evenly) -> Metrics:
    net = model()
    return train(DistributedDataParallel(net), net, partial(own, shares))


def fsdp(mesh_shape: tuple[int, ...] | None = None, shares: Any = evenly) -> Metrics:
    """Blocks compiled and sharded one by one; with a mesh of two dimensions, replicated as well."""
    net = model()
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for part in (net.first, net.block, net.other, net.last):
        part.compile(backend=BACKEND)
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return train(net, net, partial(own, shares), spec())


def hybrid() -> Metrics:
    return fsdp((2, dist.get_world_size() // 2))


def distributed_states() -> Metrics:
    """Each rank has the optimizer's state of some parameters, and steps these."""
    net = model()
    wrapped = DistributedDataParallel(torch.compile(net, backend="eager"))
    make = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    return train(wrapped, net, partial(own, evenly), make_optimizer=make)


def averaged_inside() -> Metrics:
    """An optimizer averages gradients over ranks, and has them applied by one inside of it."""

    class Averaging(torch.optim.Optimizer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.inner = torch.optim.AdamW(*arguments, **options)
            super().__init__(self.inner.param_groups, {})

        def step(self, closure: Any = None) -> None:
            average(self)
            self.inner.step()

    net = model()
    return train(net, net, partial(own, evenly), make_optimizer=Averaging)


def average(optimizer: torch.optim.Optimizer) -> None:
    """Average the gradients over ranks, by hand."""
    for parameter in optimizer.param_groups[0]["params"]:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


class AveragingSGD(torch.optim.Optimizer):
    """Averages gradients over ranks in its own step, where nobody sees them before."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        average(self)
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.1)


def averaged_in_the_step(folder: Path) -> Metrics:
    """What is measured and noted, and what gradients are on this rank and on all."""
    found: Metrics = {}
    for step, way in enumerate(("inside the step", "before the step", "nowhere")):
        net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 1))
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.1)
        measured = tmm.Spec(
            tmm.gradient("norm"), tmm.activation_gradient("norm"), tmm.update("norm")
        )
        path = folder / f"averaged {step}"
        called = tmm.instrument(net, measured, run=path)
        monitor = tmm.monitor(called)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if way == "inside the step":
            optimizer = AveragingSGD(net.parameters())  # type: ignore[assignment]
        monitor.watch(optimizer)
        # Those that nobody averages differ in nothing but their signs.
        x = torch.ones(4, 8) * (1.0, -1.0 if way == "nowhere" else 3.0)[dist.get_rank()]
        with monitor.step(0):
            output = called(x)
            output.mean().backward()
            local = net[0].weight.grad.norm().item()
            if way == "before the step":
                average(optimizer)
            optimizer.step()
        mean = net[0].weight.grad.norm().item()
        values = monitor.get_step_metrics()
        explanation = tmm.explain(called)
        tmm.remove(called)
        if dist.get_rank() == 0:
            with tmm.open_run(path) as run:
                keys = run.keys()
                notes = {key: run.key_info(key).notes for key in keys}
                text = (path / "explain.txt").read_text()
            found[step] = {"values": values, "notes": notes, "explained": explanation.notes}
            found[step] |= {"local": local, "mean": mean, "text": text}
    return found


def explained(wrap: Callable[[nn.Module], nn.Module]) -> Metrics:
    """What `tmm.explain` says of a model that ``wrap`` compiles and distributes."""
    called = tmm.instrument(wrap(model()), spec())
    with tmm.monitor(called).step(0):
        called(batches()[0]).sum().backward()
    text = str(tmm.explain(called))
    tmm.remove(called)
    return {0: {"text": text}}


def skipping() -> Metrics:
    """Rank 1 has no forward pass in step 2, and ends after step 3."""
    net = model()
    called = tmm.instrument(torch.compile(net, backend="eager"), tmm.Spec(tmm.activation("rms")))
    monitor = tmm.monitor(called)
    late = dist.get_rank() == 1
    metrics: Metrics = {}
    for step, batch in enumerate(batches()[: 4 if late else 5]):
        with monitor.step(step):
            if not (late and step == 2):
                called(own(evenly, batch)[0])
            else:
                with monitor.no_monitor():
                    pass  # which says that none is expected
    tmm.remove(called)
    for step in range(4 if late else 5):
        metrics[step] = monitor.get_all_metrics()[step]
    return metrics


def counted() -> Metrics:
    """How many collectives tmm makes in each step, and of which calls of torch."""
    calls: Counter[tuple[int, str]] = Counter()
    of_torch = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "gather", "barrier")
    of_torch += ("isend", "send")
    named = [(dist, name) for name in of_torch]
    for place, name in [*named, (ProcessGroup, "maximum"), (ProcessGroup, "total")]:
        original = getattr(place, name)

        def counting(
            *args: Any, _name: str = name, _original: Any = original, **keywords: Any
        ) -> Any:
            calls[current, _name] += 1
            return _original(*args, **keywords)

        setattr(place, name, counting)
    net = model()
    current = -1
    called = tmm.instrument(torch.compile(net, backend="eager"), spec(quantiles()))
    monitor = tmm.monitor(called)
    optimizer = torch.optim.AdamW(net.parameters())
    monitor.watch(optimizer)
    found: Metrics = {}
    for step, batch in enumerate(batches()):
        current = step
        with monitor.step(step):
            called(own(evenly, batch)[0]).sum().backward()
            optimizer.step()
        monitor.get_step_metrics()  # waits for it
        found[step] = {name: count for (of, name), count in calls.items() if of == step}
    tmm.remove(called)
    return found


def disagreeing() -> Metrics:
    """Rank 1 measures something else."""
    metric = "rms" if dist.get_rank() == 0 else "mean"
    called = tmm.instrument(model(), tmm.Spec(tmm.activation(metric, modules="last")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tmm.monitor(called).step(0):
            called(batches()[0])
        measured = tmm.monitor(called).get_step_metrics()
        tmm.remove(called)
    texts = [str(item.message) for item in caught]
    return {0: {"measured": measured, "warnings": texts}}


def absent(folder: Path) -> Metrics:
    """Rank 1 opens no step, and rank 0 more than may wait."""
    done = folder / "absent-done"
    net = model()
    run = tmm.start_run("absent", root=folder, system_seconds=None)
    run.watch(net, tmm.Spec(tmm.activation("rms")))
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(70 if dist.get_rank() == 0 else 0):
            with tmm.monitor(net).step(step):
                net(batches()[0])
    seconds = time.monotonic() - begun
    if dist.get_rank() == 0:
        done.touch()
    while not done.exists():
        time.sleep(0.02)
    run.finish()
    return {0: {"seconds": seconds, "warnings": [str(item.message) for item in caught]}}


def frozen(folder: Path) -> Metrics:
    """Rank 1 is stopped after a step; the training's own collectives wait for it 3 seconds."""
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    whole = dist.distributed_c10d._get_default_group()
    before = whole._get_backend(torch.device("cpu")).options._timeout
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), whole)
    called = tmm.instrument(model(), tmm.Spec(tmm.activation("rms")), run=folder / "frozen")
    dist.distributed_c10d._set_pg_timeout(before, whole)
    monitor = tmm.monitor(called)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with monitor.step(0):
            called(own(evenly, batches()[0])[0])
        monitor.get_step_metrics()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        with monitor.step(1):
            called(own(evenly, batches()[0])[0])
        begun = time.monotonic()
        tmm.remove(called)
        seconds = time.monotonic() - begun
        if dist.get_rank() == 0:
            os.kill(numbers[1], signal.SIGCONT)
    return {0: {"seconds": seconds}}


def killed(folder: Path) -> Metrics:
    """Rank 1 dies in step 3."""
    run = tmm.start_run("ranks", root=folder, system_seconds=None)
    net = model()
    called = run.watch(DistributedDataParallel(net), spec())
    for step, batch in enumerate(batches()):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        called(own(evenly, batch)[0]).sum().backward()
        run.log({"loss": float(step)})
        run.step()
    return {}


def recorded(folder: Path) -> Metrics:
    """Every rank starts a run; that of rank 0 records."""
    run = tmm.start_run("ranks", root=folder, system_seconds=None)
    with run:
        net = model()
        called = run.watch(DistributedDataParallel(torch.compile(net, backend="eager")), spec())
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for batch in batches():
            loss = called(own(evenly, batch)[0]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log({"loss": loss, "rank": dist.get_rank()})
            run.log_samples(run.current_step, {"text": "of rank 0"})
            run.step()
    return {}


def each_by_itself(folder: Path) -> Metrics:
    """With ``per_rank`` every rank records its own rows."""
    net = model()
    called = tmm.instrument(
        DistributedDataParallel(net), spec(), run=folder / "each", per_rank=True
    )
    monitor = tmm.monitor(called)
    for step, batch in enumerate(batches()):
        with monitor.step(step):
            called(own(evenly, batch)[0]).sum().backward()
    tmm.remove(called)
    return {}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "ddp_inside": lambda _: ddp_inside(),
    "ddp_outside": lambda _: ddp_outside(),
    "ddp_uncompiled": lambda _: ddp_uncompiled(),
    "ddp_uneven": lambda _: ddp_inside(unevenly),
    "fsdp": lambda _: fsdp(),
    "fsdp_uneven": lambda _: fsdp(shares=unevenly),
    "hybrid": lambda _: hybrid(),
    "distributed_states": lambda _: distributed_states(),
    "averaged_inside": lambda _: averaged_inside(),
    "averaged_in_the_step": averaged_in_the_step,
    "explained": lambda _: explained(
        lambda net: DistributedDataParallel(torch.compile(net, backend=BACKEND))
    ),
    "skipping": lambda _: skipping(),
    "counted": lambda _: counted(),
    "disagreeing": lambda _: disagreeing(),
    "absent": absent,
    "frozen": frozen,
    "killed": killed,
    "recorded": recorded,
    "each_by_itself": each_by_itself,
}


def main(
    folder: Path, names: list[str], trainings: Mapping[str, Callable[[Path], Metrics]] = TRAININGS
) -> None:
    dist.init_process_group("gloo")
    for name in names:
        torch._dynamo.reset()
        result = trainings[name](folder)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
