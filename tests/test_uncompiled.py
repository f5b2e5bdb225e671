"""A model that is not compiled runs its own program on monitored steps, and is measured there."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tmm
from tests.model_zoo import noise
from tmm.core.failures import MonitoringWarning

BATCH = noise(6, 4)
OWN = (tmm.activation("rms"), tmm.activation(n=lambda x: x.norm(dim=-1)))
GRADIENT = (*OWN, tmm.activation_gradient("rms"))
TRACED = {
    "attention": ((tmm.attention("entropy"), *GRADIENT), {}),
    "reference": ((tmm.activation_difference("rms"), *GRADIENT), {"reference": "init"}),
}
SPECS: dict[str, tuple[tuple[tmm.Rule, ...], dict[str, Any]]] = {"own": (GRADIENT, {}), **TRACED}


class Program(nn.Module):
    """Has a linear layer, which its parts use; counts what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(4))
        self.seen: list[object] = []


class Asks(Program):
    """Doubles its output where it is told that it is being compiled."""

    def __init__(self, question: Callable[[], bool]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        if self.question():
            return y * 2
        self.seen.append(len(self.seen))
        return y


class CountsHooks(Program):
    """Takes another way where a module has a hook, as layers of torch do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules()]
        hooks.append(len(nn.modules.module._global_forward_hooks))
        hooks.append(int(torch.overrides.has_torch_function((x, self.fc.weight))))
        y: torch.Tensor = self.fc(x)
        return y * 2 if any(hooks) else y


class Draws(Program):
    """Draws random numbers of all kinds, keeps what it saw, and prints."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("begin", len(self.seen))
        y: torch.Tensor = self.drop(self.fc(x * random.random()))
        self.seen.append((float(np.random.rand()), random.random()))
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        print("end", len(self.seen))
        return y + self.mean


class Overwrites(Program):
    """Works in place on what a module gave back, and on a view of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x).clone()
        y[:, :2].mul_(3.0)
        return self.fc(y.relu_()).add_(1.0)


class Catches(Program):
    """Goes on after an exception from the middle of a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            self.fc(x[:, :3])
        except RuntimeError as error:
            self.seen.append(type(error))
        y: torch.Tensor = self.fc(x)
        return y


class Functional(Program):
    """Calls its layer with other parameters, and under transforms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = {"weight": self.fc.weight * 2, "bias": self.fc.bias}
        y: torch.Tensor = torch.func.functional_call(self.fc, weights, (x,))
        slope = torch.func.grad(lambda z: self.fc(z).sum())(x.detach())
        each = torch.func.vmap(self.fc)(x)
        return y + slope + each


class Copies(Program):
    """Calls a copy of itself, and itself once more."""

    def forward(self, x: torch.Tensor, deeper: bool = True) -> torch.Tensor:
        y: torch.Tensor = copy.deepcopy(self.fc)(x) + self.fc(x)
        return self(y, deeper=False) if deeper else y


class Differentiates(Program):
    """Its output holds a derivative, as forces are one of an energy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        energy = self.fc(x).tanh().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


class Repeats(Program):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.block, self.fc(x), use_reentrant=self.use_reentrant)
        return self.drop(y)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "asks": lambda: Asks(torch.compiler.is_compiling),
    "counts hooks": CountsHooks,
    "draws": Draws,
    "overwrites": Overwrites,
    "catches": Catches,
    "functional": Functional,
    "copies": Copies,
    "differentiates": Differentiates,
    "repeats": lambda: Repeats(use_reentrant=False),
    "repeats, reentrant": lambda: Repeats(use_reentrant=True),
}


def train(
    build: Callable[[], Program], spec: tmm.Spec | None, steps: int = 3
) -> tuple[dict[str, Any], Any]:
    """All that a training produces, and the model."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model: Any = build()
    if spec is not None:
        tmm.instrument(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    produced: dict[str, Any] = {}
    for step in range(steps):
        with tmm.monitor(model).step(step) if spec else contextlib.nullcontext():
            loss = model(BATCH).square().mean()
            loss.backward()
        produced[f"loss {step}"] = loss.detach()
        produced |= {f"gradient {step} {n}": p.grad for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        produced[f"state {step}"] = copy.deepcopy(model.state_dict())
        produced[f"random {step}"] = (torch.get_rng_state(), random.random(), np.random.rand())
    produced["seen"] = model.seen
    return produced, model


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_bitwise_the_users_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = train(PROGRAMS[name], None)
    printed = capsys.readouterr().out
    watched, model = train(PROGRAMS[name], tmm.Spec(*GRADIENT))
    assert capsys.readouterr().out == printed
    for key in plain:
        assert same(plain[key], watched[key]), key
    assert tmm.monitor(model).get_step_metrics()
    assert not tmm.explain(model).graphs
    assert not tmm.explain(model).regions


QUESTIONS = {
    "compiler": torch.compiler.is_compiling,
    "compiler, Dynamo": torch.compiler.is_dynamo_compiling,
    "exporting": torch.compiler.is_exporting,
    "dynamo": torch._dynamo.is_compiling,
    "utils": torch._utils.is_compiling,
}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        *((q, "own") for q in QUESTIONS),
        *(("compiler", kind) for kind in TRACED),
        ("utils", "reference"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_compiling")
def test_nothing_is_compiling(question: str, kind: str) -> None:
    rules, options = SPECS[kind]
    plain, _ = train(lambda: Asks(QUESTIONS[question]), None)
    watched, model = train(lambda: Asks(QUESTIONS[question]), tmm.Spec(*rules, **options))
    for key in plain:
        assert same(plain[key], watched[key]), key
    assert watched["seen"] == [0, 1, 2]
    assert "activation/fc/rms" in tmm.monitor(model).get_step_metrics()
    assert bool(tmm.explain(model).graphs) is (kind != "own")


def test_what_users_compile_is_told_so_after_a_trace() -> None:
    train(PROGRAMS["asks"], tmm.Spec(*TRACED["attention"][0]))
    told = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    assert told(torch.zeros(1)) == 1


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_layers_stay_fused(kind: str) -> None:
    rules, options = SPECS[kind]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = noise(3, 5, 8), torch.tensor([[False] * 4 + [True]] * 3)
    calls: list[tuple[Any, dict[str, Any]]] = [
        *((torch.no_grad(), {"src_key_padding_mask": padding}), (torch.no_grad(), {})),
        (torch.enable_grad(), {}),
    ]
    want = []
    for context, arguments in calls:
        with context:
            want.append(model(x, **arguments))
    assert not torch.equal(want[1], want[2])
    tmm.instrument(model, tmm.Spec(*rules, **options))
    for step, (context, arguments) in enumerate(calls):
        with context, tmm.monitor(model).step(step):
            assert torch.equal(model(x, **arguments), want[step])
        if kind == "own" and step == 1:
            unmeasured = tmm.explain(model).unmeasured
            assert "fast path" in unmeasured["layers.0.linear1"]
    if kind == "own":
        unmeasured = tmm.explain(model).unmeasured
        assert "layers.0.linear1" not in unmeasured
        not_called = tmm.explain(model).not_called
        assert "without" in (unmeasured | not_called)["layers.0.self_attn.out_proj"]


class Direct(nn.Module):
    """Calls a forward itself, uses parameters without a module, and leaves one module alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a.forward(self.b(x)) @ self.c.weight
        return y


def test_modules_without_a_call_are_named() -> None:
    model = tmm.instrument(Direct(), tmm.Spec(tmm.activation("rms")))
    with tmm.monitor(model).step(0):
        model(BATCH)
    explanation = tmm.explain(model)
    assert explanation.unmeasured.keys() == {"a", "c"}
    assert "called directly" in explanation.unmeasured["a"]
    assert explanation.not_called.keys() == {"d"}
    assert explanation.eager.keys() == {"b", "[root module]"}
    assert "graph" not in str(explanation)


def gradients_by_hooks(model: nn.Module, output: Callable[[], torch.Tensor]) -> dict[str, float]:
    """The root mean square of what flows back to the output of each module, repeated or not."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda g: seen.setdefault(name, []).append(g))

    for name, child in model.named_modules():
        child.register_forward_hook(lambda *_, name=name: watch(name, _[-1]))
    output().square().mean().backward()
    return {name: torch.cat(g).square().mean().sqrt().item() for name, g in seen.items()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("in_step", [False, True])
def test_gradients_of_checkpoints_are_measured_once(use_reentrant: bool, in_step: bool) -> None:
    torch.manual_seed(0)
    model = Repeats(use_reentrant)
    other = copy.deepcopy(model)
    spec = tmm.Spec(tmm.activation_gradient("rms"), tmm.activation("mean_abs"))

    def step() -> None:
        model(BATCH).square().mean().backward()

    run = tmm.instrument(step, spec, module=model) if in_step else step
    if not in_step:
        tmm.instrument(model, spec)
    torch.manual_seed(1)
    with tmm.monitor(model).step(0):
        run()
    got = tmm.monitor(model).get_step_metrics()
    torch.manual_seed(1)
    want = gradients_by_hooks(other, lambda: other(BATCH))
    for name, value in want.items():
        key = f"activation_gradient/{name or '[root module]'}/rms"
        if name or not in_step:
            assert got[key] == pytest.approx(value, rel=1e-6), name
    assert {"block.0", "block.2", "block.3", "fc"} <= want.keys()
    assert all("_compiled_call_impl" not in vars(m) for m in list(model.modules())[1:])


def test_gradients_inside_a_forward_pass_are_not_those_of_the_loss() -> None:
    torch.manual_seed(0)
    model, other = Differentiates(), Differentiates()
    other.load_state_dict(model.state_dict())
    tmm.instrument(model, tmm.Spec(tmm.activation_gradient("rms")))
    with tmm.monitor(model).step(0):
        model(BATCH).square().mean().backward()
    x = BATCH.detach().requires_grad_()
    y = other.fc(x)
    (force,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(force.square().mean(), y)
    got = tmm.monitor(model).get_step_metrics()["activation_gradient/fc/rms"]
    assert got == pytest.approx(want.square().mean().sqrt().item(), rel=1e-5)


class CountsOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class CountsFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CountsOperations, CountsFunctions])
def test_modes_of_the_program_do_not_see_what_is_measured(mode: Callable[[], Any]) -> None:
    def seen(*rules: tmm.Rule) -> list[str]:
        torch.manual_seed(0)
        model = Repeats(use_reentrant=False)
        if rules:
            tmm.instrument(model, tmm.Spec(*rules))
        with tmm.monitor(model).step(0) if rules else contextlib.nullcontext(), mode() as watching:
            model(BATCH).sum().backward()
        names: list[str] = watching.seen
        return names

    plain = seen()
    assert len(plain) > 6
    assert seen(*GRADIENT) == plain


def test_a_fault_of_a_metric_does_not_repeat_the_program() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        if broken:
            raise OverflowError("no")
        return x

    broken = False
    model = Asks(torch.compiler.is_compiling)
    tmm.instrument(model, tmm.Spec(tmm.activation(f=fails), tmm.activation("rms")))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(BATCH)
    broken = True
    with pytest.warns(MonitoringWarning, match="step 1.*no"), monitor.step(1):
        model(BATCH)
    assert monitor.get_step_metrics() == {}
    assert model.seen == [0, 1]
    broken = False
    with monitor.step(2):
        model(BATCH)
    assert "activation/fc/f" in monitor.get_step_metrics()


def test_an_error_of_the_model_is_raised_once() -> None:
    model = Asks(lambda: bool(1 / 0 if len(model.seen) == 1 else 0))
    tmm.instrument(model, tmm.Spec(*OWN))
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(BATCH)
    with pytest.raises(ZeroDivisionError), monitor.step(1):
        model(BATCH)
    assert len(calls) == 2
    assert all("_compiled_call_impl" not in vars(m) for m in list(model.modules())[1:])


def test_modules_that_come_later_are_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    tmm.instrument(model, tmm.Spec(tmm.activation("absmax")))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(BATCH)
    model.append(nn.Tanh())
    model[0] = nn.Linear(4, 4)
    with monitor.step(1):
        model(BATCH)
    got = monitor.get_step_metrics()
    assert got["activation/1/absmax"] == pytest.approx(model(BATCH).abs().max().item())
    assert got["activation/0/absmax"] == pytest.approx(model[0](BATCH).abs().max().item())


def test_hooks_of_users_come_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    tmm.instrument(model, tmm.Spec(tmm.activation("absmax")))
    model[0].register_forward_hook(lambda *_: torch.full((6, 4), 3.0))
    with tmm.monitor(model).step(0):
        model(BATCH)
    assert tmm.monitor(model).get_step_metrics()["activation/0/absmax"] == 3


def test_what_users_compile_inside_is_not_compiled_anew() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
            self.part = torch.compile(lambda x: self.fc(x).tanh(), backend=backend)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.part(x))
            return y

    model = tmm.instrument(Model(), tmm.Spec(*GRADIENT))
    monitor = tmm.monitor(model)
    for step in (0, 1):
        model(BATCH)
        with monitor.step(step):
            model(BATCH).sum().backward()
        model(BATCH)
    assert len(graphs) == 1
    assert "activation/out/rms" in monitor.get_step_metrics()
    assert "compiled by itself" in tmm.explain(model).unmeasured["fc"]


def test_a_backend_asks_for_a_trace() -> None:
    model = tmm.instrument(Asks(torch.compiler.is_compiling), tmm.Spec(*OWN), backend="eager")
    with tmm.monitor(model).step(0):
        model(BATCH)
    assert len(tmm.explain(model).graphs) == 1
    assert model.seen == []


def test_each_output_is_read_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    tmm.instrument(model, tmm.Spec(tmm.activation("rms", "absmax", "mean", "std", "kurtosis")))
    with tmm.monitor(model).step(0):
        model(BATCH)
    with torch.profiler.profile() as profile, tmm.monitor(model).step(1):
        model(BATCH)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["tmm::summarize"] == 3
    assert calls["tmm::pack"] == 1


def test_a_view_whose_base_is_written_to_afterwards_is_measured() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            view = y.view_as(x)
            y[:, 1] = x[:, 0]
            return view

    x = torch.randn(3, 8)
    model = tmm.instrument(Written(), tmm.Spec(tmm.activation_gradient("norm")))
    with tmm.monitor(model).step(0):  # torch crashes on a hook of such a view
        model(x).sum().backward()
    found = tmm.monitor(model).get_step_metrics()["activation_gradient/[root module]/norm"]
    assert found == pytest.approx(24**0.5)


class Tied(nn.Module):
    """As T5: a module that nobody calls has the parameters of one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.inside = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.inside.weight = self.shared.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inside(x)
        return output


def test_a_tied_module_that_nobody_calls_is_not_called() -> None:
    model = tmm.instrument(Tied(), tmm.Spec(tmm.activation("rms")))
    for step in range(2):
        with tmm.monitor(model).step(step):
            model(torch.randn(2, 4)).sum().backward()
    explanation = tmm.explain(model)
    assert not explanation.unmeasured
    assert "shared" in explanation.not_called


class Blocks(nn.Module):
    """Attention and a layer behind it, each block of which is checkpointed in its own way."""

    def __init__(self, ways: Sequence[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(4, 12 if n == "qkv" else 4) for n in PARTS}) for _ in ways
        )
        self.ways = ways

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, way in zip(self.blocks, self.ways, strict=True):

            def run(x: torch.Tensor, block: nn.ModuleDict = block) -> torch.Tensor:
                # Nodes without names of their own, as those of rows.
                parts = block["qkv"](x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
                attended = nn.functional.scaled_dot_product_attention(*parts)
                x = x + block["out"](attended.transpose(1, 2).flatten(2))
                pieces = block["narrow"](x).split(2, -1)
                return x + block["wide"](torch.cat([piece.tanh() for piece in pieces], -1))

            again = partial(checkpoint, use_reentrant=False)
            x = {"plain": run, "once": partial(again, run), "twice": partial(again, again, run)}[
                way
            ](x)
        return x


PARTS = ("qkv", "out", "narrow", "wide")


@pytest.mark.parametrize("ways", [("once", "once"), ("plain", "once", "once"), ("twice", "once")])
def test_gradients_in_checkpoints_of_a_model_that_is_traced(ways: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    net = Blocks(ways)
    x = noise(2, 3, 4)
    found: dict[str, float] = {}
    by_hooks = copy.deepcopy(net)
    for name, module in by_hooks.named_modules():
        if isinstance(module, nn.Linear):

            def look(_: object, __: object, output: torch.Tensor, name: str = name) -> None:
                key = f"activation_gradient/{name}/norm"
                output.register_hook(lambda gradient: found.update({key: gradient.norm().item()}))

            module.register_forward_hook(look)
    by_hooks(x).square().sum().backward()
    model = tmm.instrument(net, tmm.Spec(tmm.attention("entropy"), tmm.activation_gradient("norm")))
    monitor = tmm.monitor(model)
    for step in range(2):
        net.zero_grad()
        with monitor.step(step):
            model(x).square().sum().backward()
        values = monitor.get_step_metrics()
        assert {key: values[key] for key in found} == pytest.approx(found, rel=1e-5)
    assert all(map(torch.equal, *([p.grad for p in m.parameters()] for m in (net, by_hooks))))
