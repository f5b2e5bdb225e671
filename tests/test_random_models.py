"""Random small modules agree with eager hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

import tmm
from tests.eager_hooks import BUILTIN, assert_agrees, record_calls, run_calls, tolerance
from tests.model_zoo import noise

WIDTH = 4
CHANNELS, SIDE = 2, 2  # an image of a vector: CHANNELS * SIDE is its width

Build = Callable[[], nn.Module]


class Image(nn.Module):
    """Applies a module for images to vectors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x.reshape(-1, CHANNELS, SIDE, 1)
        return self.inner(image).reshape(-1, WIDTH)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + first(self.inner(x))


class Twice(nn.Module):
    """Calls its child again on what the child gave."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return first(self.inner(first(self.inner(x)) * 0.5))


class Outputs(nn.Module):
    """Several outputs, one of them its own input and one of them a child's output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        y = first(self.inner(x))
        return y * 2, {"input": x, "inner": (y, None)}, y.argmax(-1)


class Mutating(nn.Module):
    """Changes what its child gave, after the child gave it."""

    def __init__(self, inner: nn.Module, view: bool) -> None:
        super().__init__()
        self.inner = inner
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = first(self.inner(x))
        if self.view:
            y[:, :1].mul_(3)
        else:
            y.add_(1)
        return y


class Chain(nn.Module):
    """Its children in a row."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = first(part(x))
        return x


class Breaking(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = first(self.inner(x)) + 1
        torch._dynamo.graph_break()
        return y * 2


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class AddInPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(0.5)


LEAVES: dict[str, Build] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv": lambda: Image(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
    "conv1d": lambda: Image(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)),
    "batch_norm": lambda: Image(nn.BatchNorm2d(CHANNELS)),
    "batch_norm_1d": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "group_norm": lambda: Image(nn.GroupNorm(1, CHANNELS)),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.ReLU(inplace=True),
    "leaky_relu_in_place": lambda: nn.LeakyReLU(inplace=True),
    "hardtanh_in_place": lambda: nn.Hardtanh(inplace=True),
    "add_in_place": AddInPlace,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(dim=-1),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout_in_place": lambda: nn.Dropout(0.3, inplace=True),
    "identity": nn.Identity,
    "empty": nn.Sequential,
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "residual": Residual,
    "twice": Twice,
    "outputs": Outputs,
    "mutating": lambda inner: Mutating(inner, view=False),
    "mutating_view": lambda inner: Mutating(inner, view=True),
    "sequential": nn.Sequential,
}


@dataclass(frozen=True)
class Plan:
    """How a module is built; equal shared numbers stand for one and the same module."""

    kind: str
    children: tuple[Plan, ...] = ()
    shared: int | None = None

    def build(self, known: dict[Plan, nn.Module]) -> nn.Module:
        if self.shared is not None and self in known:
            return known[self]
        if self.kind in LEAVES:
            module = LEAVES[self.kind]()
        elif self.kind == "chain":
            module = Chain([child.build(known) for child in self.children])
        elif self.kind == "breaking":
            module = Breaking(self.children[0].build(known))
        else:
            module = WRAPPERS[self.kind](self.children[0].build(known))
        if self.shared is not None:
            known[self] = module
        return module


def plans(wrappers: Sequence[str]) -> st.SearchStrategy[Plan]:
    leaves = st.builds(
        Plan, st.sampled_from(sorted(LEAVES)), shared=st.sampled_from([None, None, 1])
    )

    def larger(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        wrapped = st.builds(lambda kind, one: Plan(kind, (one,)), st.sampled_from(wrappers), inner)
        chained = st.lists(inner, min_size=1, max_size=4).map(lambda p: Plan("chain", tuple(p)))
        return wrapped | chained

    return st.recursive(leaves, larger, max_leaves=6)


def chain(plan: Plan, training: bool) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(WIDTH, WIDTH), plan.build({}), nn.Linear(WIDTH, WIDTH)]
    return Chain(parts).train(training)


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1)


def call(batch: torch.Tensor, model: nn.Module) -> object:
    return model(batch.clone())


def agrees(plan: Plan, backend: str, sizes: Sequence[int], training: bool) -> None:
    torch._dynamo.reset()
    batches = [noise(size, WIDTH, seed=seed) for seed, size in enumerate(sizes)]
    calls = [partial(call, batch) for batch in batches]
    try:
        recording = record_calls(chain(plan, training), calls)
    except RuntimeError:  # an in-place operation that autograd forbids in plain eager mode too
        reject()
    spec = tmm.Spec(tmm.activation(*BUILTIN), tmm.activation(largest=largest))
    model = tmm.instrument(torch.compile(chain(plan, training), backend=backend), spec)
    with tmm.monitor(model).step(0):
        run_calls(model, calls)
    want = recording.expected(largest=largest)
    assert_agrees(tmm.monitor(model).get_step_metrics(), want, tolerance(backend))
    assert set(tmm.explain(model).unmeasured) == recording.integers


SIZES = st.lists(st.integers(2, 5), min_size=1, max_size=3)
WITHOUT_BREAKS = sorted(WRAPPERS)
WITH_BREAKS = [*WITHOUT_BREAKS, "breaking", "breaking"]
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]


def examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, suppress_health_check=HEALTH, derandomize=count < 50
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(plan=plans(WITHOUT_BREAKS), sizes=SIZES, training=st.booleans())
@examples(12)
def test_random_modules(backend: str, plan: Plan, sizes: list[int], training: bool) -> None:
    agrees(plan, backend, sizes, training)


@given(plan=plans(WITH_BREAKS), sizes=SIZES, training=st.booleans())
@examples(12)
def test_random_modules_with_graph_breaks(plan: Plan, sizes: list[int], training: bool) -> None:
    agrees(plan, "eager", sizes, training)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(plan=plans(WITH_BREAKS), sizes=SIZES, training=st.booleans())
@examples(300)
def test_many_random_modules(backend: str, plan: Plan, sizes: list[int], training: bool) -> None:
    agrees(plan, backend, sizes, training)
