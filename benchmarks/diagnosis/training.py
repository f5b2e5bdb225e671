"""One training as a user would write it, with places where a fault can be planted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import tmm
from benchmarks.diagnosis.models import Batch, Task

Optimize = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The usual optimizer."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


@dataclass
class Training:
    """What is trained, how, and what goes wrong.

    ``at`` holds what happens before a step, ``batches`` changes batches, ``losses`` the loss before
    its backward pass, ``gradients`` are called before the optimizer steps. ``resumes_at`` ends the
    run before that step and goes on with it; ``loses_state`` and ``repeats_data`` tell what is
    forgotten then, ``on_resume`` happens before.
    """

    task: Task
    seed: int
    steps: int = 60
    every: int = 1
    lr: float = 0.0
    optimize: Optimize = adam
    schedule: Callable[[int], float] = lambda step: 1.0
    at: dict[int, Callable[[], object]] = field(default_factory=dict)
    batches: list[Callable[[int, Batch], Batch]] = field(default_factory=list)
    losses: list[Callable[[int, Tensor], Tensor]] = field(default_factory=list)
    gradients: list[Callable[[int], None]] = field(default_factory=list)
    accumulate: Callable[[int], int] = lambda step: 1
    left_out: Callable[[str], bool] = lambda name: False
    scaler: torch.amp.GradScaler | None = None
    attention: bool = False
    resumes_at: int | None = None
    loses_state: bool = False
    repeats_data: bool = False
    on_resume: Callable[[], object] = lambda: None
    data: int = 0

    def spec(self) -> tmm.Spec:
        """The default one; with attention, where that is asked for."""
        default = tmm.default_spec(every=self.every)
        if not self.attention:
            return default
        rule = tmm.attention("entropy", "max_logit", "sink_mass")
        return tmm.Spec(*default.rules, rule, every=self.every, **_diagnosis(default))


def _diagnosis(spec: tmm.Spec) -> dict[str, bool]:
    return {"diagnosis": True} if getattr(spec, "diagnosis", False) else {}


@dataclass(frozen=True)
class Part:
    """The steps from ``first`` to before ``last``, and what they are taken with."""

    first: int
    last: int
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    fixed: list[Batch]
    lr: float


def parts(training: Training) -> Iterator[Part]:
    """One part, two where the training is resumed."""
    model = training.task.model
    named = [(name, p) for name, p in model.named_parameters() if not training.left_out(name)]
    lr = training.lr or training.task.lr
    optimizer = training.optimize([p for _, p in named], lr)
    generator = torch.Generator().manual_seed(10 + training.seed)
    begun = generator.get_state()
    stretches = [(0, training.steps)]
    if training.resumes_at is not None:
        stretches = [(0, training.resumes_at), (training.resumes_at, training.steps)]
    fixed = [training.task.batch(generator) for _ in range(training.data)]
    for first, last in stretches:
        if first > 0:
            training.on_resume()
            if training.loses_state:
                optimizer = training.optimize([p for _, p in named], lr)
            if training.repeats_data:
                generator.set_state(begun)
        yield Part(first, last, optimizer, generator, fixed, lr)


def train(training: Training, root: Path) -> Path:
    """Train, recorded by tmm; gives the folder of the run."""
    model = training.task.model
    path: Path | None = None
    for part in parts(training):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = tmm.start_run(
                *("p",),
                root=root,
                system_seconds=None,
                resume=None if path is None else path.name,
            )
            with run:
                run.watch(model, training.spec(), optimizer=part.optimizer, scaler=training.scaler)
                for step in range(part.first, part.last):
                    run.log({"loss": take_step(training, part, step)})
                    run.step()
        path = run.path
    assert path is not None
    return path


def take_step(training: Training, part: Part, step: int) -> float:
    """Take a step; gives its loss, as it was before a fault weighed it."""
    if step in training.at:
        training.at[step]()
    for group in part.optimizer.param_groups:
        group["lr"] = part.lr * group.get("factor", 1.0) * training.schedule(step)
    total = 0.0
    for _ in range(count := training.accumulate(step)):
        fixed = part.fixed
        batch = fixed[step % len(fixed)] if fixed else training.task.batch(part.generator)
        for change in training.batches:
            batch = change(step, batch)
        inputs, targets = batch
        loss = training.task.loss(training.task.model(inputs), targets)
        total += float(loss) / count
        for weigh in training.losses:
            loss = weigh(step, loss)
        (loss if training.scaler is None else training.scaler.scale(loss)).backward()
    for touch in training.gradients:
        touch(step)
    if training.scaler is None:
        part.optimizer.step()
    else:
        training.scaler.step(part.optimizer)
        training.scaler.update()
    part.optimizer.zero_grad()
    return total
