"""Training goes on as if nobody looked, and what looked leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.callback import callback_handler
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import BUILTIN, walk
from tests.model_zoo import (
    BREAKING,
    CASES,
    PAUSES,
    Block,
    Checkpointed,
    InPlace,
    Pair,
    Stack,
    convolutional,
    noise,
    perceptron,
    tokens,
)
from tmm.kernels.fused.choose_lowering import Lowering

Batches = list[dict[str, Any]]


def row_norms(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)


def full_spec(every: int = 1) -> tmm.Spec:
    return tmm.Spec(
        tmm.activation(*BUILTIN),
        tmm.activation(row_norms=row_norms),
        tmm.activation(median=lambda x: x.flatten().float(), aggregate=torch.median),
        tmm.activation(eager=lambda x: float(x.float().sum()), trace=False),
        every=every,
    )


def text(name: str) -> tuple[Callable[[], nn.Module], Batches]:
    batches = [{"input_ids": ids, "labels": ids} for ids in map(tokens, range(4))]
    return CASES[name].build, batches


def inputs(name: str, *batches: torch.Tensor) -> Batches:
    return [{name: batch} for batch in batches]


def drop_images() -> nn.Module:
    return nn.Sequential(nn.Dropout2d(0.2), *convolutional(), nn.Dropout(0.3))


def breaks() -> nn.Module:
    return Stack([Block(3.0, PAUSES["print"])], repeated=1)


def pairs() -> nn.Module:
    return Stack([Pair(3.0, PAUSES["print"])], repeated=1)


VECTORS = [noise(12, 8, seed=seed) for seed in range(4)]
IMAGES = [noise(2, 3, 10, 10, seed=seed) for seed in range(4)]
TEXTS = [tokens(seed) for seed in range(4)]
MODELS: dict[str, tuple[Callable[[], nn.Module], Batches]] = {
    "perceptron": (perceptron, inputs("input", *VECTORS)),
    "convolutional": (drop_images, inputs("input", *IMAGES)),
    "in_place": (InPlace, inputs("x", *VECTORS)),
    "breaks": (breaks, inputs("x", *VECTORS)),
    "breaks_within_blocks": (pairs, inputs("x", *VECTORS)),
    "disabling": (lambda: BREAKING["disabling"](PAUSES["print"]), inputs("x", *VECTORS)),
    "gpt2": text("GPT2LMHeadModel"),
    "resnet": (
        CASES["ResNetForImageClassification"].build,
        [dict(CASES["ResNetForImageClassification"].batch()) for _ in range(4)],
    ),
    **{
        f"checkpoint_{way}": (
            lambda way=way, layers=layers: Checkpointed(way, layers),
            inputs("ids", *TEXTS),
        )
        for way, layers in {"each": 1, "nested": 2, "wrapper": 1}.items()
    },
}


def total(output: object) -> torch.Tensor:
    """The loss of a model that has one, else a sum that depends on all of its outputs."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    return torch.stack([tensor.square().mean() for _, tensor in walk(output)]).sum()


def random_state() -> tuple[torch.Tensor, object, bytes]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()


def train(
    name: str, backend: str, spec: tmm.Spec | None, *, prepare: bool = False
) -> dict[str, torch.Tensor | object]:
    """All that training on three times the model's batches produced, by name."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, batches = MODELS[name]
    module = build().train()
    model = torch.compile(module, backend=backend)
    if spec is not None:
        model = tmm.instrument(model, spec)
        if prepare:
            tmm.monitor(model).prepare(**batches[0])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    produced: dict[str, torch.Tensor | object] = {}
    for step, batch in enumerate(batches * 3):
        monitor = contextlib.nullcontext() if spec is None else tmm.monitor(model).step(step)
        with monitor:
            for micro in range(2):
                loss = total(model(**batch))
                loss.backward()
                produced[f"loss {step}.{micro}"] = loss.detach()
        for key, parameter in module.named_parameters():
            produced[f"gradient {step} {key}"] = parameter.grad
        optimizer.step()
        optimizer.zero_grad()
        produced[f"random state {step}"] = random_state()
    produced |= {f"state {key}": value.clone() for key, value in module.state_dict().items()}
    if spec is not None:
        monitored = len(range(0, 3 * len(batches), spec.every))
        assert len(tmm.monitor(model).get_all_metrics()) == monitored
    return produced


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    assert first.keys() == second.keys()
    return [key for key in first if not same(first[key], second[key])]


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first.nan_to_num(12.5), second.nan_to_num(12.5))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


SLOW = pytest.mark.slow
QUICK = {
    **dict.fromkeys(("perceptron", "convolutional", "in_place", "checkpoint_each"), "aot_eager"),
    "breaks": "eager",
}
EVERY_STEP, PREPARED = (full_spec(), False), (full_spec(every=2), True)


@pytest.mark.parametrize(
    ("name", "backend", "ways"),
    [
        *[(name, backend, (PREPARED,)) for name, backend in QUICK.items()],
        ("in_place", "eager", (EVERY_STEP,)),
        *[
            pytest.param(name, backend, (EVERY_STEP, PREPARED), marks=SLOW)
            for name in MODELS
            for backend in ("aot_eager", "eager")
        ],
    ],
)
def test_training_is_bitwise_the_same(
    name: str, backend: str, ways: tuple[tuple[tmm.Spec, bool], ...]
) -> None:
    plain = train(name, backend, None)
    losses = {float(value) for key, value in plain.items() if key.startswith("loss")}
    assert len(losses) >= 12, "no training"
    for spec, prepare in ways:
        different = differences(plain, train(name, backend, spec, prepare=prepare))
        assert not different, (spec.every, different[:10])


def gradients(model: Callable[..., object], module: nn.Module, batch: dict[str, Any]) -> list[Any]:
    loss = total(model(**batch))
    loss.backward()
    found = [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return [tensor.double().flatten() for tensor in found]


def in_double(value: object) -> object:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


@pytest.mark.parametrize(
    "name", ["perceptron", pytest.param("gpt2", marks=SLOW), pytest.param("resnet", marks=SLOW)]
)
def test_inductor_is_as_exact_as_without(name: str, record_property: Any) -> None:
    build, batches = MODELS[name]
    module = build()
    for child in module.modules():  # float64 draws other random numbers
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    plain, watched, exact = module, copy.deepcopy(module), copy.deepcopy(module).double()
    model = tmm.instrument(torch.compile(watched), tmm.Spec(tmm.activation(*BUILTIN)))
    with tmm.monitor(model).step(0):
        seen = gradients(model, watched, batches[0])
    assert tmm.monitor(model).get_step_metrics()
    unseen = gradients(torch.compile(plain), plain, batches[0])
    truth = gradients(exact, exact, {key: in_double(value) for key, value in batches[0].items()})
    assert len(seen) == len(unseen) == len(truth) > 2

    def error(found: list[torch.Tensor]) -> dict[str, float]:
        loss = abs(found[0] - truth[0]) / abs(truth[0])
        gradient = torch.cat(found[1:]) - torch.cat(truth[1:])
        return {
            "loss": float(loss),
            "gradients": float(gradient.norm() / torch.cat(truth[1:]).norm()),
            "worst gradient": float(gradient.abs().max() / torch.cat(truth[1:]).abs().max()),
        }

    with_tmm, without = error(seen), error(unseen)
    for part in with_tmm:
        text = f"{with_tmm[part]:.2e} with tmm, {without[part]:.2e} without"
        record_property(f"relative error of {part}", text)
        print(f"{name}: relative error of {part}: {text}")
        assert 0 < without["gradients"] < 1e-4, "the comparison says nothing"
        assert with_tmm[part] <= 2 * without[part] + 1e-7, f"{part}: {text}"


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self, backend: str) -> None:
        self.compile = lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        self.graphs += 1
        return self.compile(graph, example)


def forward_and_backward(model: nn.Module, batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    total(model(**batch)).backward()


COUNTED = [
    "perceptron",
    "convolutional",
    "in_place",
    "checkpoint_each",
    "breaks",
    "disabling",
    pytest.param("gpt2", marks=SLOW),
    pytest.param("breaks_within_blocks", marks=SLOW),
]


@pytest.mark.parametrize("name", COUNTED)
def test_each_program_compiles_once(name: str) -> None:
    build, batches = MODELS[name]
    module, backend = build(), Counting("eager")
    model = tmm.instrument(torch.compile(module, backend=backend), full_spec(every=2))
    forward_and_backward(model, batches[0])
    forward_and_backward(model, batches[1])
    plain = backend.graphs
    breaks = sum(counters["graph_break"].values())
    monitor = tmm.monitor(model)
    with monitor.step(0):
        forward_and_backward(model, batches[0])
        forward_and_backward(model, batches[1])
    assert backend.graphs - plain == plain == len(tmm.explain(model).graphs)
    if not breaks:
        assert not counters["graph_break"]
    for step in range(1, 7):
        with monitor.step(step):
            forward_and_backward(model, batches[step % 4])
        forward_and_backward(model, batches[step % 4])
        assert backend.graphs == 2 * plain, f"recompiled at step {step}"
        assert bool(monitor.get_step_metrics()) == (step % 2 == 0)


@pytest.mark.parametrize("name", ["perceptron", "checkpoint_each", "breaks"])
def test_the_plain_program_after_the_twin(name: str) -> None:
    build, batches = MODELS[name]

    def run(model: nn.Module, backend: Counting) -> int:
        before = backend.graphs
        for batch in batches:
            forward_and_backward(model, batch)
        return backend.graphs - before

    backend = Counting("eager")
    alone = run(torch.compile(build(), backend=backend), backend)
    torch._dynamo.reset()
    model = tmm.instrument(torch.compile(build(), backend=backend), full_spec())
    with tmm.monitor(model).step(0):
        twin = run(model, backend)
    # After a graph break it may compile a layer that the plain program runs without compiling.
    assert twin == alone or (name == "breaks" and twin > alone)
    assert run(model, backend) == alone
    with tmm.monitor(model).step(1):
        assert run(model, backend) == 0
    assert run(model, backend) == 0


def all_hooks(module: nn.Module) -> dict[str, Any]:
    """Everything on the modules that is not a tensor or a child: hook dicts, forwards, flags."""
    state: dict[str, Any] = {}
    for name, child in module.named_modules():
        for attribute, value in vars(child).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                kept = dict(value) if isinstance(value, dict) else value
                state[f"{name}.{attribute}"] = kept
    for attribute, value in vars(torch.nn.modules.module).items():
        if attribute.startswith("_global") and isinstance(value, dict):
            state[attribute] = dict(value)
    state["callbacks"] = [*callback_handler.start_callbacks, *callback_handler.end_callbacks]
    assert not state["callbacks"]
    return state


@contextlib.contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    before = all_hooks(module)
    yield
    after = all_hooks(module)
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] is not after[key] and before[key] != after[key]]
    assert not changed


@pytest.mark.parametrize("name", ["perceptron", "breaks", "checkpoint_wrapper"])
def test_nothing_is_left_behind(name: str) -> None:
    build, batches = MODELS[name]
    module = build()
    module.register_forward_hook(lambda *_: None)
    model = torch.compile(module, backend="eager")
    before = dict(vars(model))
    with left_as_it_was(module):
        assert tmm.instrument(model, full_spec()) is model
        monitor = tmm.monitor(model)
        with left_as_it_was(module):
            monitor.prepare(**batches[0])
        with monitor.step(0):
            with left_as_it_was(module):
                forward_and_backward(model, batches[0])
            forward_and_backward(model, batches[1])
        assert tmm.remove(model) is model
    assert vars(model) == before
    with pytest.raises(ValueError, match="not instrumented"):
        tmm.monitor(model)
    again = tmm.instrument(model, full_spec())
    with tmm.monitor(again).step(0):
        forward_and_backward(again, batches[0])
    assert tmm.monitor(again).get_step_metrics()


def test_an_exception_of_the_model_leaves_nothing_behind() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    module.append(Fails())
    model = tmm.instrument(torch.compile(module, backend="eager"), full_spec())
    monitor = tmm.monitor(model)
    for step in range(0, 8, 2):
        module[2].failing = True
        with left_as_it_was(module), pytest.raises(OverflowError), monitor.step(step):
            model(VECTORS[0])
        module[2].failing = False
        with left_as_it_was(module), monitor.step(step + 1):
            model(VECTORS[1])
        want = module[1](module[0](VECTORS[1])).square().mean().sqrt()
        assert monitor.get_step_metrics()["activation/1/rms"] == pytest.approx(want.item(), 1e-6)


class Fails(nn.Module):
    """Fails outside of all graphs."""

    failing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        self.fail()
        return x * 2

    @torch.compiler.disable
    def fail(self) -> None:
        if self.failing:
            raise OverflowError("the model's own")


def test_names_types_and_copies_are_as_before() -> None:
    module = perceptron().eval()
    plain = torch.compile(module, backend="eager")
    keys = list(plain.state_dict())
    model = tmm.instrument(plain, full_spec())
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(VECTORS[0])
    metrics = monitor.get_step_metrics()

    assert isinstance(model, OptimizedModule)
    assert isinstance(model._orig_mod, nn.Sequential)
    assert model._orig_mod is module
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == keys
    model.load_state_dict(model.state_dict())

    with monitor.step(1):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model._orig_mod))]
        with monitor.no_monitor():
            want = module(VECTORS[1])
        with torch.no_grad():
            module[0].weight.zero_()
        for clean in copies:
            assert torch.equal(clean(VECTORS[1]), want)
            with pytest.raises(ValueError, match="not instrumented"):
                tmm.monitor(clean)
        assert list(copies[0].state_dict()) == keys
    assert monitor.get_step_metrics() == {}
    with monitor.step(2):
        model(VECTORS[0])
    changed = monitor.get_step_metrics()
    assert changed.keys() == metrics.keys()
    assert changed["activation/0/rms"] != metrics["activation/0/rms"]
    again = tmm.instrument(copies[0], full_spec())
    with tmm.monitor(again).step(0):
        again(VECTORS[0])
    assert tmm.monitor(again).get_step_metrics()["activation/0/rms"] == metrics["activation/0/rms"]


@pytest.mark.parametrize("name", ["convolutional", "breaks"])
def test_prepare_leaves_random_state_and_buffers_alone(name: str) -> None:
    build, batches = MODELS[name]
    module, backend = build(), Counting("aot_eager")
    model = tmm.instrument(torch.compile(module, backend=backend), full_spec())
    before, numbers = copy.deepcopy(module.state_dict()), random_state()
    tmm.monitor(model).prepare(**batches[0])
    assert same(numbers, random_state())
    assert not differences(before, module.state_dict())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert tmm.monitor(model).get_all_metrics() == {}
    prepared = backend.graphs
    assert prepared > 0
    with tmm.monitor(model).step(0):
        forward_and_backward(model, batches[0])
    assert backend.graphs == prepared
    assert tmm.monitor(model).get_step_metrics()


def cache_events(spec: tmm.Spec | None, lowering: Lowering = "auto") -> dict[str, int]:
    torch._dynamo.reset()
    counters.clear()
    module = nn.Sequential(nn.Linear(8, 4), nn.GELU())
    model = torch.compile(module)
    context: Any = contextlib.nullcontext()
    if spec is not None:
        model = tmm.instrument(model, spec, lowering=lowering)
        context = tmm.monitor(model).step(0)
    with context:
        model(VECTORS[0]).sum().backward()
    events = {**counters["aot_autograd"], **counters["inductor"]}
    return {key: count for key, count in events.items() if "cache" in key}


def cache_spec() -> tmm.Spec:
    return tmm.Spec(
        tmm.activation("rms", "kurtosis", "histogram"),
        tmm.activation(n=row_norms),
        tmm.activation_gradient("rms", "std", "histogram"),
    )


@pytest.mark.parametrize(
    ("spec", "lowering"),
    [
        *((cache_spec(), lowering) for lowering in ("operator", "auto", "fused")),
        pytest.param(None, "auto", marks=SLOW),
    ],
)
def test_rewritten_graphs_come_from_a_warm_cache(spec: tmm.Spec | None, lowering: Lowering) -> None:
    """As those of the plain program do, which ``None`` stands for."""
    module = tmm.instrument(nn.Linear(8, 4), cache_spec())  # compiles what all graphs share
    with tmm.monitor(module).step(0):
        module(VECTORS[0]).sum().backward()
    with fresh_cache():
        cold, warm = (cache_events(spec, lowering) for _ in range(2))
    for events in (cold, warm):
        assert not [key for key in events if "bypass" in key], events
    assert cold["autograd_cache_miss"] == warm["autograd_cache_hit"] == 1, (cold, warm)
    assert "autograd_cache_hit" not in cold, cold
    assert "autograd_cache_miss" not in warm, warm
    assert "fxgraph_cache_miss" not in warm, warm


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    script = (
        "import json; from tests.test_undisturbed import cache_events, cache_spec;"
        " print(json.dumps(cache_events(cache_spec())))"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        for _ in range(2)
    ]
    cold, warm = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert cold["autograd_cache_miss"] == warm["autograd_cache_hit"] == 1, (cold, warm)
    assert cold["fxgraph_cache_miss"] > 1, cold
    assert "fxgraph_cache_miss" not in warm, warm


class DroppingCheckpoint(nn.Module):
    """Checkpoints a block with a dropout, whose mask is to be the same when it is repeated."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.block = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return y


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["uncompiled", "aot_eager"])
def test_checkpoints_repeat_their_dropouts(use_reentrant: bool, mode: str) -> None:
    def run(*rules: tmm.Rule) -> tuple[list[torch.Tensor], dict[str, Any]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = DroppingCheckpoint(use_reentrant)
        model = module if mode == "uncompiled" else torch.compile(module, backend=mode)
        if rules:
            tmm.instrument(model, tmm.Spec(*rules))
        values: dict[str, Any] = {}
        with tmm.monitor(model).step(0) if rules else contextlib.nullcontext():
            output = model(torch.randn(3, 4, requires_grad=True))
            before = torch.get_rng_state()
            output.sum().backward()
            after = torch.get_rng_state()
        if rules:
            values = tmm.monitor(model).get_step_metrics()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        return [output.detach(), *gradients, before, after, torch.rand(2)], values

    plain, _ = run()
    monitored, values = run(tmm.activation("norm", "zero_fraction"))
    assert all(map(torch.equal, plain, monitored))
    assert values["activation/block/norm"] == pytest.approx(plain[0].norm().item(), rel=1e-5)


class Failing:
    """A metric function, or an aggregate, that works a few times only."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise OverflowError("the metric's own")
        return x.abs().mean()


class NormOutside(nn.Module):
    """Its norm, outside of all graphs, writes buffers: no forward pass of it can be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.outside(x))

    @torch.compiler.disable
    def outside(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    "rule",
    [
        lambda f: tmm.activation(f=f, trace=False),
        lambda f: tmm.activation_gradient(f=f, modules="norm"),
        lambda f: tmm.activation(rows=row_norms, aggregate=f, modules="last"),
        lambda f: tmm.gradient(f=f),
        lambda f: tmm.parameter(f=f),
        lambda f: tmm.update(f=f),
    ],
)
def test_a_metric_that_fails_later_ends_no_training(rule: Any) -> None:
    def run(*rules: tmm.Rule) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = NormOutside()
        model = torch.compile(module, backend="eager")
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        if rules:
            tmm.instrument(model, tmm.Spec(*rules))
            tmm.monitor(model).watch(optimizer)
        for step in range(9):
            with tmm.monitor(model).step(step) if rules else contextlib.nullcontext():
                model(VECTORS[step % 4]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return module.state_dict()

    plain = run()
    with pytest.warns(tmm.MonitoringWarning, match="the training goes on") as caught:
        monitored = run(rule(Failing(5)), tmm.activation("rms"))
    assert not differences(plain, monitored)
    texts = [str(w.message) for w in caught if "monitoring failed" in str(w.message)]
    assert len(texts) == 1, texts
