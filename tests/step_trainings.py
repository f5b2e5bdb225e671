"""A monitored training beside a copy that nobody monitors, and what each step must record."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import tmm
from tmm.runs.live import LiveRun

Values = dict[str, float]
Tensors = list[torch.Tensor]

SPEC = tmm.Spec(
    tmm.activation("mean", "std", "max"),
    tmm.activation_gradient("mean", "norm"),
    tmm.gradient("mean", "norm"),
    tmm.update("norm", "relative_norm"),
    tmm.parameter("mean"),
    exclude=r"\[root",
    every=2,
)


class Net(nn.Module):
    """Its numbers are small multiples of an eighth, so that float32 rounds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
            self.linear.bias.copy_(torch.tensor([0.25, -0.125]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(x)
        return output


@dataclass(eq=False)
class Pass:
    """A forward pass: what the model and its copy gave, and the step that it may count in.

    ``outputs`` is empty for a pass that has failed.
    """

    outputs: Tensors
    step: Step | None
    is_training: bool
    has_gradients: bool
    went_back: bool = False
    gradients: Tensors = field(default_factory=list)

    @property
    def evidence(self) -> int:
        """How much speaks for one of the training: of several, those with most of it count."""
        return 4 if self.went_back else 2 * self.has_gradients + self.is_training


@dataclass(eq=False)
class Step:
    """What has happened in a step that is open."""

    number: int
    passes: list[Pass] = field(default_factory=list)
    gradients: dict[str, Tensors] = field(default_factory=dict)
    before: dict[str, Tensors] = field(default_factory=dict)
    updates: dict[str, Tensors] = field(default_factory=dict)
    scalars: list[float] = field(default_factory=list)
    of_run: Values = field(default_factory=dict)

    @property
    def is_monitored(self) -> bool:
        return self.number % 2 == 0

    @property
    def trains(self) -> bool:
        """Whether a pass without gradients can be none of the training any more."""
        return any(p.is_training and p.has_gradients for p in self.passes)

    @property
    def likeliest(self) -> list[Pass]:
        most = max((p.evidence for p in self.passes), default=0)
        return [p for p in self.passes if p.evidence == most]

    def logged(self) -> Values:
        """Numbers that a monitor takes are averaged; of those that a run takes the last counts."""
        scalar = {"scalar": sum(self.scalars) / len(self.scalars)} if self.scalars else {}
        return scalar | self.of_run

    def values(self, counted: list[Pass], parameters: dict[str, torch.Tensor]) -> Values:
        """What is recorded, if these passes count."""
        found: dict[str, float | torch.Tensor] = {**self.logged()}
        if not self.is_monitored:
            return self.logged()
        if (all_ := joined([output for p in counted for output in p.outputs[1:]])) is not None:
            site = "activation/linear"
            found |= {f"{site}/mean": all_.mean(), f"{site}/std": all_.std()}
            found |= {f"{site}/max": all_.max()}
        if (all_ := joined([gradient for p in counted for gradient in p.gradients])) is not None:
            site = "activation_gradient/linear"
            found |= {f"{site}/mean": all_.mean(), f"{site}/norm": all_.norm()}
        for name, tensors in self.gradients.items():
            all_ = torch.cat(tensors)
            found |= {f"gradient/{name}/mean": all_.mean(), f"gradient/{name}/norm": all_.norm()}
        if (all_ := joined([g for some in self.gradients.values() for g in some])) is not None:
            found |= dict.fromkeys(("step/gradient_norm", "step/gradient_norm/linear"), all_.norm())
        for name, tensors in self.updates.items():
            norm = torch.cat(tensors).norm()
            found[f"update/{name}/norm"] = norm
            found[f"update/{name}/relative_norm"] = norm / torch.cat(self.before[name]).norm()
        found |= {f"parameter/{name}/mean": own.mean() for name, own in parameters.items()}
        return {key: float(value) for key, value in found.items()}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().flatten().clone()


def joined(tensors: Tensors) -> torch.Tensor | None:
    return torch.cat([*map(flat, tensors)]) if tensors else None


class Training:
    """A model that is monitored and its copy, which are trained alike.

    ``open`` is the step that is open. What it is to hold is told by ``history``, step by step.
    """

    def __init__(self, run: LiveRun | None = None) -> None:
        self.plain = Net()
        self.run = run
        self.model = self.instrumented(copy.deepcopy(self.plain))
        self.monitor = tmm.monitor(self.model)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.125) for m in self.models]
        self.monitor.watch(self.optimizers[0])
        self.open: Step | None = None
        self.history: dict[int, Values] = {}
        self.passes: list[Pass] = []

    def instrumented(self, model: Net) -> Net:
        return tmm.instrument(model, SPEC, run=self.run)

    @property
    def models(self) -> tuple[Net, Net]:
        return self.model, self.plain

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: flat(parameter) for name, parameter in self.plain.named_parameters()}

    @property
    def is_measured(self) -> bool:
        return self.open is not None and self.open.is_monitored

    def is_surely_evaluation(self) -> bool:
        """Whether a pass without gradients is known to be no training before it runs."""
        return self.open is not None and self.open.trains

    def forward(self, values: list[int], *, training: bool, gradients: bool) -> None:
        measured = self.is_measured and (gradients or not self.is_surely_evaluation())
        outputs = self.outputs(values, training=training, gradients=gradients)
        self.note(Pass(outputs, self.open if measured else None, training, gradients))

    def outputs(self, values: list[int], *, training: bool, gradients: bool) -> Tensors:
        batch = torch.tensor(values, dtype=torch.float32).reshape(-1, 1).repeat(1, 2)
        with torch.set_grad_enabled(gradients):
            outputs = [model.train(training)(batch) for model in self.models]
        assert torch.equal(*outputs)
        return outputs

    def note(self, made: Pass) -> None:
        if made.step is not None:
            made.step.passes.append(made)
        if made.has_gradients and made.outputs:
            self.passes.append(made)

    def fail(self) -> None:
        """A pass that raises, and that the training survives."""
        self.model.train()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            self.model(torch.ones(1, 3))
        self.note(Pass([], self.open if self.is_measured else None, True, True))

    def backward(self, place: int, factor: float) -> None:
        """Through a pass of this step or of an earlier one, and perhaps not for the first time."""
        chosen = self.passes[place % len(self.passes)]
        for output in chosen.outputs:
            (factor * output).sum().backward(retain_graph=True)
        if chosen.step is not None and chosen.step is self.open:
            chosen.went_back = True
            chosen.gradients.append(torch.full_like(chosen.outputs[1], factor))

    def optimize(self, *, clears: bool) -> None:
        before = self.parameters()
        named = self.plain.named_parameters()
        gradients = {name: flat(p.grad) for name, p in named if p.grad is not None}
        for optimizer in self.optimizers:
            optimizer.step()
            if clears:
                optimizer.zero_grad()
        if self.open is not None and self.open.is_monitored:
            for name, gradient in gradients.items():
                update = self.parameters()[name] - before[name]
                self.open.gradients.setdefault(name, []).append(gradient)
                self.open.before.setdefault(name, []).append(before[name])
                self.open.updates.setdefault(name, []).append(update)

    def check_undisturbed(self) -> None:
        own, plain = (list(model.parameters()) for model in self.models)
        for one, other in zip(own, plain, strict=True):
            assert torch.equal(one, other)
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]

    def check_removed(self) -> None:
        """Nothing is left on the model and its optimizer."""
        own, plain = (vars(optimizer) for optimizer in self.optimizers)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            assert own[hooks] == plain[hooks]
        for module, other in zip(*(model.modules() for model in self.models), strict=True):
            assert vars(module).keys() - {"_compiled_call_impl"} == vars(other).keys()
            assert module._compiled_call_impl is None
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def recorded(run: LiveRun) -> dict[int, Values]:
    """What is on the disk of what the run has handed over."""
    run.writer.flush()
    with tmm.open_run(run.path) as read:
        return {int(step): read.at(int(step)) for step in read.steps}  # type: ignore[misc]


def check_same(found: dict[int, Values], expected: dict[int, Values]) -> None:
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        own = {key: v for key, v in found[step].items() if not key.startswith("system/")}
        assert own == pytest.approx(values, rel=1e-6, abs=1e-12), step
