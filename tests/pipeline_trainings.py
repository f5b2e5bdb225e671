"""Small pipelines on several processes, and the same models on one; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.pipeline_trainings FOLDER TRAINING...

Each training writes what rank 0 has measured to ``FOLDER/TRAINING.pt``.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import tmm
from tests import rank_trainings
from tmm.runtime.ranks.gloo import ProcessGroup

Metrics = dict[int, dict[str, Any]]
STEPS, BATCH, LENGTH, WIDTH, WORDS, LAYERS, EVERY = 4, 8, 6, 16, 11, 4, 2
MICRO_BATCHES = 4


class Block(nn.Module):
    """Attention of two heads, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # Biases of keys have gradients of nothing but rounding, which Adam makes large.
        self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.feed(x)
        return result


class Model(nn.Module):
    """As models of torchtitan are written: what a stage does not have is None, or not there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(WORDS, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))
        self.layers = nn.ModuleDict({str(index): Block() for index in range(LAYERS)})
        self.norm: nn.Module | None = nn.LayerNorm(WIDTH)
        self.head: nn.Module | None = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x) * self.scale
        for layer in self.layers.values():
            x = layer(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def part_of(whole: Model, index: int, count: int) -> Model:
    """A stage, as torchtitan makes it: a copy without what other stages have."""
    part = copy.deepcopy(whole)
    own = range(index * LAYERS // count, (index + 1) * LAYERS // count)
    for name in list(part.layers):
        if int(name) not in own:
            del part.layers[name]
    if index > 0:
        part.embedding = None
        del part.scale
    if index < count - 1:
        part.norm = part.head = None
    return part


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = BATCH, LENGTH + 1
    words = (torch.randint(WORDS, shape, generator=generator) for _ in range(STEPS))
    return [(some[:, :-1], some[:, 1:]) for some in words]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def summed_loss(output: Tensor, target: Tensor) -> Tensor:
    """Whose sum over micro-batches is the loss of the batch."""
    return loss_of(output, target) / MICRO_BATCHES


def median_of(x: Tensor) -> Tensor:
    return x.abs().mean(-1)


def spec(*further: tmm.Rule, **options: Any) -> tmm.Spec:
    return tmm.Spec(
        *(
            tmm.activation("mean", "std", "rms", "norm", "kurtosis", "absmax", "min", "histogram"),
            tmm.activation(largest=lambda x: x.abs().amax(-1), aggregate="max"),
            tmm.activation(median=median_of, aggregate=torch.median, modules=r"layers\.3|head"),
            tmm.activation_gradient("rms", "absmax", "norm"),
            tmm.gradient("norm", "std", "absmax"),
            tmm.parameter("rms", "norm", "max"),
            tmm.update("relative_norm", "norm"),
            tmm.optimizer_state("exp_avg_norm"),
        ),
        *further,
        **{"every": EVERY, **options},
    )


def entropy() -> tmm.Rule:
    return tmm.attention("entropy", "max_logit")


Compile = Callable[[nn.Module], nn.Module]


def as_it_is(part: nn.Module) -> nn.Module:
    return part


def whole_compiled(part: nn.Module) -> nn.Module:
    return torch.compile(part, backend="aot_eager")  # type: ignore[return-value]


def traced(part: nn.Module) -> nn.Module:
    return torch.compile(part, backend="eager")  # type: ignore[return-value]


def blocks_compiled(part: nn.Module) -> nn.Module:
    for layer in part.layers.values():  # type: ignore[union-attr, operator]
        layer.compile(backend="aot_eager")
    return part


def optimizer_of(parts: Sequence[nn.Module]) -> torch.optim.Optimizer:
    parameters = (parameter for part in parts for parameter in part.parameters())
    return torch.optim.AdamW(parameters, lr=1e-3)


def alone(measured: tmm.Spec | None = None, compile_it: Compile = as_it_is) -> Metrics:
    """On one process, the whole batch at once."""
    net = model()
    called = tmm.instrument(compile_it(net), measured or spec())
    monitor = tmm.monitor(called)
    optimizer = optimizer_of([net])
    monitor.watch(optimizer)
    metrics: Metrics = {}
    for step, (inputs, targets) in enumerate(batches()):
        with monitor.step(step):
            loss = loss_of(called(inputs), targets)
            monitor.log_scalar("loss", loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            metrics[step] = monitor.get_step_metrics()
    tmm.remove(called)
    return metrics


@dataclass
class Pipeline:
    """Stages of this rank, and the schedule that runs them."""

    make: Callable[..., Any] = ScheduleGPipe
    stages_per_rank: int = 1
    compile_it: Compile = as_it_is
    loss: Callable[[Tensor, Tensor], Tensor] = loss_of
    options: dict[str, Any] = field(default_factory=dict)
    split: Callable[[Model, int, int], nn.Module] = part_of
    group: dist.ProcessGroup | None = None
    wrap: Callable[[nn.Module], nn.Module] = as_it_is

    def __post_init__(self) -> None:
        self.whole = model()
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        count = ranks * self.stages_per_rank
        own = range(rank, count, ranks)
        self.plain = [self.split(self.whole, index, count) for index in own]
        self.called = [self.compile_it(self.wrap(part)) for part in self.plain]
        self.stages = [
            PipelineStage(part, index, count, torch.device("cpu"), group=self.group)
            for index, part in zip(own, self.called, strict=True)
        ]
        runs = self.stages if self.make in SEVERAL else self.stages[0]
        self.schedule = self.make(
            runs, n_microbatches=MICRO_BATCHES, loss_fn=self.loss, **self.options
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Run a batch; gives its loss on the rank that has it."""
        losses: list[Tensor] = []
        arguments = (inputs,) if self.stages[0].is_first else ()
        is_last = self.stages[-1].is_last
        if is_last:
            self.schedule.step(*arguments, target=targets, losses=losses)
            found = torch.stack(losses)
            return found.mean() if self.loss is loss_of else found.sum()
        self.schedule.step(*arguments)
        return None


SEVERAL = (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)


def train(
    piped: Pipeline,
    measured: tmm.Spec | None = None,
    share: Callable[[Tensor], Tensor] = lambda batch: batch,
    **options: Any,
) -> Metrics:
    """The metrics of each monitored step."""
    schedule = tmm.instrument(piped.schedule, measured or spec(), **options)
    assert schedule is piped.schedule
    monitor = tmm.monitor(schedule)
    optimizer = optimizer_of(piped.plain)
    monitor.watch(optimizer)
    metrics: Metrics = {}
    for step, (inputs, targets) in enumerate(batches()):
        with monitor.step(step):
            loss = piped.step(share(inputs), share(targets))
            if loss is not None:
                monitor.log_scalar("loss", loss)
            optimizer.step()
            optimizer.zero_grad()
        if step % EVERY == 0:
            metrics[step] = monitor.get_step_metrics()
    explained = str(tmm.explain(schedule))
    tmm.remove(schedule)
    metrics[-1] = {"explained": explained}
    return metrics


def trajectory(piped: Pipeline, measured: tmm.Spec | None) -> list[Tensor]:
    """All that this rank's training computes: losses, and parameters after each step."""
    if measured is not None:
        tmm.monitor(tmm.instrument(piped.schedule, measured))
    monitor = None if measured is None else tmm.monitor(piped.schedule)
    optimizer = optimizer_of(piped.plain)
    if monitor is not None:
        monitor.watch(optimizer)
    found: list[Tensor] = []
    for step, (inputs, targets) in enumerate(batches()):
        if monitor is not None:
            monitor.begin_step(step)
        loss = piped.step(inputs, targets)
        found += [] if loss is None else [loss.detach().clone()]
        found += [p.grad.clone() for part in piped.plain for p in part.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.end_step()
        found += [p.detach().clone() for part in piped.plain for p in part.parameters()]
    found.append(torch.rand(3))
    if measured is not None:
        tmm.remove(piped.schedule)
    return found


def undisturbed(make: Callable[[], Pipeline]) -> Metrics:
    """Whether the training is the same with tmm, bit for bit, on every rank."""
    equal = []
    torch.manual_seed(3)
    plain = trajectory(make(), None)
    for every in (1, 2):
        torch.manual_seed(3)
        watched = trajectory(make(), spec(entropy(), every=every))
        same = len(plain) == len(watched) and all(map(torch.equal, plain, watched))
        equal.append((same, len(plain)))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, equal)
    return {0: {"equal": everywhere}}


# Models whose stages are made by hand


def handmade(whole: Model, index: int, count: int) -> nn.Module:
    """A stage that is made of modules of the whole model, which is not copied."""
    own = [whole.layers[str(i)] for i in range(LAYERS)]
    own = own[index * LAYERS // count : (index + 1) * LAYERS // count]
    first = [_Embedding(whole)] if index == 0 else []
    last = [whole.norm, whole.head] if index == count - 1 else []
    return nn.Sequential(*first, *own, *last)  # type: ignore[arg-type]


class _Embedding(nn.Module):
    """What the whole model does in its own forward."""

    def __init__(self, whole: Model) -> None:
        super().__init__()
        self.embedding, self.scale = whole.embedding, whole.scale

    def forward(self, x: Tensor) -> Tensor:
        assert self.embedding is not None
        result: Tensor = self.embedding(x) * self.scale
        return result


def of_whole(make: Callable[..., Any] = Schedule1F1B) -> Metrics:
    """Stages that are made of the modules of a model have the names of that model."""
    piped = Pipeline(make, split=handmade)
    return train(piped, module=piped.whole)


def without_whole() -> Metrics:
    """Stages whose names do not tell which layers of the model they are."""
    measured = tmm.Spec(tmm.activation("rms"), tmm.gradient("norm"), every=EVERY)
    return train(Pipeline(Schedule1F1B, split=handmade), measured)


def exported() -> Metrics:
    """Stages that torch.export cuts."""
    whole = model()
    example = batches()[0][0][: BATCH // MICRO_BATCHES]
    cut = pipeline(whole, mb_args=(example,), split_spec={"layers.2": SplitPoint.BEGINNING})
    stage = cut.build_stage(dist.get_rank(), torch.device("cpu"))
    piped = Pipeline()
    piped.plain, piped.stages = [stage.submod], [stage]
    piped.schedule = Schedule1F1B(stage, n_microbatches=MICRO_BATCHES, loss_fn=loss_of)
    return train(piped)


# Further dimensions


def with_copies(wrap: Callable[[Any, nn.Module], nn.Module], make: Any = Schedule1F1B) -> Metrics:
    """Two stages, each on two ranks that have parts of the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    group, part = mesh.get_group("pipeline"), mesh.get_local_rank("data")
    piped = Pipeline(make, group=group, wrap=partial(wrap, mesh["data"]))
    return train(piped, spec_of_copies(), lambda batch: batch.chunk(2)[part])


def spec_of_copies() -> tmm.Spec:
    """Without functions, which sharded parameters do not have."""
    return spec()


def in_ddp(mesh: Any, part: nn.Module) -> nn.Module:
    return DistributedDataParallel(part, process_group=mesh.get_group())


def in_fsdp(mesh: Any, part: nn.Module) -> nn.Module:
    for layer in part.layers.values():  # type: ignore[union-attr, operator]
        fully_shard(layer, mesh=mesh)
    fully_shard(part, mesh=mesh)
    return part


def with_tensor_parallel() -> Metrics:
    """Two stages, each of which two ranks share the layers of."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
    wrap = partial(in_tensor_parallel, mesh["tensor"])
    piped = Pipeline(Schedule1F1B, group=mesh.get_group("pipeline"), wrap=wrap)
    # No DTensor tells of what a stage is given.
    return train(piped, without_functions(), placements={".*": "replicate"})


def without_functions() -> tmm.Spec:
    """What shards have, too."""
    return tmm.Spec(
        *(tmm.activation("rms", "std", "absmax"), tmm.gradient("norm"), tmm.parameter("rms")),
        *(tmm.update("norm"), tmm.optimizer_state("exp_avg_norm")),
        every=EVERY,
    )


def in_tensor_parallel(mesh: Any, part: nn.Module) -> nn.Module:
    for layer in part.layers.values():  # type: ignore[union-attr, operator]
        parallelize_module(layer.feed, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return part


# Faults


def told() -> Metrics:
    """What users are told."""
    texts = {}
    net = part_of(model(), dist.get_rank(), 2)
    piped = Pipeline(Schedule1F1B)
    attempts: dict[str, Callable[[], Any]] = {
        "stages without schedule": lambda: tmm.instrument(net, tmm.Spec(tmm.activation("rms"))),
        "no such module": lambda: tmm.instrument(
            piped.schedule, tmm.Spec(tmm.activation("rms", modules="nowhere"))
        ),
        "another model": lambda: tmm.instrument(piped.schedule, spec(), module=model()),
        "reference": lambda: tmm.instrument(
            piped.schedule, tmm.Spec(tmm.activation_difference("rms"), reference="init")
        ),
        "parts": lambda: tmm.instrument(piped.schedule, spec(), parts=[net]),
        "monitor": lambda: tmm.monitor(piped.schedule),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, TypeError) as error:
            texts[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    tmm.instrument(piped.schedule, spec())
    try:
        tmm.instrument(piped.schedule, spec())
    except ValueError as error:
        texts["twice"] = str(error)
    tmm.remove(piped.schedule)
    clean = not any("forward_one_chunk" in vars(stage) for stage in piped.stages)
    return {0: texts | {"clean": clean}}


def differences(folder: Path) -> Metrics:
    """Parameters against those that all stages began with."""
    piped = Pipeline(Schedule1F1B)
    rule = tmm.parameter_difference("norm")
    found = train(piped, tmm.Spec(rule, reference="init", every=EVERY))
    torch.save(model().state_dict(), folder / f"whole-{dist.get_rank()}.pt")
    again = tmm.Spec(rule, reference=str(folder / f"whole-{dist.get_rank()}.pt"), every=EVERY)
    return {0: found, 1: train(Pipeline(Schedule1F1B), again)}


def evaluated() -> Metrics:
    """An evaluation between the steps, and one in a step, are kept apart from the training."""
    piped = Pipeline(Schedule1F1B)
    schedule = tmm.instrument(piped.schedule, spec())
    monitor = tmm.monitor(schedule)
    optimizer = optimizer_of(piped.plain)
    monitor.watch(optimizer)
    metrics: Metrics = {}
    for step, (inputs, targets) in enumerate(batches()):
        with monitor.step(step):
            loss = piped.step(inputs, targets)
            if loss is not None:
                monitor.log_scalar("loss", loss)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                arguments = (inputs.flip(0),) if dist.get_rank() == 0 else ()
                target = None if dist.get_rank() == 0 else targets
                schedule.eval(*arguments, target=target)
        if step % EVERY == 0:
            metrics[step] = monitor.get_step_metrics()
    tmm.remove(schedule)
    return metrics


def recorded(folder: Path) -> Metrics:
    """Every rank starts a run; that of rank 0 records."""
    piped = Pipeline(ScheduleInterleaved1F1B, stages_per_rank=2)
    with tmm.start_run("pipeline", root=folder, system_seconds=None) as run:
        run.watch(piped.schedule, spec(diagnosis=True))
        optimizer = optimizer_of(piped.plain)
        for inputs, targets in batches():
            loss = piped.step(inputs, targets)
            if loss is not None:
                run.monitor.log_scalar("loss", loss)  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    return {}


def counted() -> Metrics:
    """How many collectives tmm makes in each step."""
    calls: Counter[tuple[int, str]] = Counter()
    current = -1
    for name in ("maximum", "total", "everything", "payloads"):
        original = getattr(ProcessGroup, name)

        def counting(
            *args: Any, _name: str = name, _original: Any = original, **keywords: Any
        ) -> Any:
            calls[current, _name] += 1
            return _original(*args, **keywords)

        setattr(ProcessGroup, name, counting)
    piped = Pipeline(Schedule1F1B)
    schedule = tmm.instrument(piped.schedule, spec())
    monitor = tmm.monitor(schedule)
    optimizer = optimizer_of(piped.plain)
    monitor.watch(optimizer)
    found: Metrics = {}
    for step, batch in enumerate(batches()):
        current = step
        with monitor.step(step):
            piped.step(*batch)
            optimizer.step()
        monitor.get_step_metrics()
        found[step] = {name: count for (of, name), count in calls.items() if of == step}
    tmm.remove(schedule)
    return found


def killed(folder: Path) -> Metrics:
    """Rank 1 dies in step 2."""
    piped = Pipeline(Schedule1F1B)
    run = tmm.start_run("killed", root=folder, system_seconds=None)
    run.watch(piped.schedule, spec(every=1))
    optimizer = optimizer_of(piped.plain)
    for step, batch in enumerate(batches()):
        if step == 2 and dist.get_rank() == 1:
            time.sleep(1)  # so that the rows of step 1 are on their way
            os.kill(os.getpid(), signal.SIGKILL)
        piped.step(*batch)
        optimizer.step()
        optimizer.zero_grad()
        run.log({"number": step})
        run.step()
    return {}


def frozen(folder: Path) -> Metrics:
    """Rank 1 is stopped before step 2; the training's own messages wait for it 12 seconds."""
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    patience = timedelta(seconds=12)
    piped = Pipeline(Schedule1F1B, group=dist.new_group(timeout=patience))
    dist.distributed_c10d._set_pg_timeout(patience, dist.distributed_c10d._get_default_group())
    error = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tmm.start_run("frozen", root=folder, system_seconds=None) as run:
                run.watch(piped.schedule, spec(every=1))
                optimizer = optimizer_of(piped.plain)
                for step, batch in enumerate(batches()):
                    if step == 2 and dist.get_rank() == 1:
                        time.sleep(1)  # so that the rows of step 1 are on their way
                        os.kill(os.getpid(), signal.SIGSTOP)
                    piped.step(*batch)
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step()
    except RuntimeError as raised:
        error = str(raised)
    torch.save({"error": error}, folder / f"frozen-{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        with suppress(ProcessLookupError):
            os.kill(numbers[1], signal.SIGKILL)
    os._exit(0)


def interleaved(**options: Any) -> Pipeline:
    return Pipeline(ScheduleInterleaved1F1B, stages_per_rank=2, **options)


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "gpipe": lambda _: train(Pipeline(ScheduleGPipe)),
    "one_f_one_b": lambda _: train(Pipeline(Schedule1F1B)),
    "interleaved": lambda _: train(interleaved()),
    "zero_bubble": lambda _: train(Pipeline(ScheduleInterleavedZeroBubble, stages_per_rank=2)),
    "summed": lambda _: train(
        Pipeline(Schedule1F1B, loss=summed_loss, options={"scale_grads": False})
    ),
    "compiled": lambda _: train(Pipeline(Schedule1F1B, compile_it=whole_compiled)),
    "interleaved_traced": lambda _: train(interleaved(compile_it=traced)),
    "interleaved_compiled": lambda _: train(interleaved(compile_it=whole_compiled)),
    "blocks_compiled": lambda _: train(interleaved(compile_it=blocks_compiled)),
    "attention": lambda _: train(interleaved(), tmm.Spec(entropy(), every=EVERY)),
    "attention_compiled": lambda _: train(
        interleaved(compile_it=whole_compiled), tmm.Spec(entropy(), every=EVERY)
    ),
    "zero_bubble_traced": lambda _: train(
        Pipeline(ScheduleInterleavedZeroBubble, stages_per_rank=2), spec(entropy())
    ),
    "undisturbed": lambda _: undisturbed(lambda: Pipeline(Schedule1F1B)),
    "undisturbed_interleaved": lambda _: undisturbed(interleaved),
    "undisturbed_compiled": lambda _: undisturbed(lambda: interleaved(compile_it=whole_compiled)),
    "of_whole": lambda _: of_whole(),
    "without_whole": lambda _: without_whole(),
    "exported": lambda _: exported(),
    "ddp": lambda _: with_copies(in_ddp),
    "fsdp": lambda _: with_copies(in_fsdp),
    "tensor_parallel": lambda _: with_tensor_parallel(),
    "told": lambda _: told(),
    "differences": differences,
    "evaluated": lambda _: evaluated(),
    "recorded": recorded,
    "counted": lambda _: counted(),
    "killed": killed,
    "frozen": frozen,
}


def main(folder: Path, names: list[str], trainings: Mapping[str, Any] = TRAININGS) -> None:
    rank_trainings.main(folder, names, trainings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
