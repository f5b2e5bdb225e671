"""Gradients of activations, against what full backward hooks see."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import Recording, assert_agrees, tolerance, walk
from tests.model_zoo import CASES, Batch, noise
from tests.ways import WAYS, Callee, NoBlocksError, Way, call
from tmm.testing.eager_hooks import gradient_hooks

METRICS = ("rms", "absmax", "mean", "std")
SPEC = tmm.Spec(tmm.activation_gradient(*METRICS))
BOTH = tmm.Spec(tmm.activation_gradient(*METRICS), tmm.activation("rms"))
VECTORS = noise(6, 8)


def loss_of(output: object) -> torch.Tensor:
    tensors = [tensor for _, tensor in walk(output) if tensor.requires_grad]
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def expected(
    module: nn.Module, batches: list[Batch], eager: Collection[str]
) -> tuple[Recording, list[Any]]:
    """What hooks see of the gradients, and the gradients of the parameters."""
    recording = Recording()
    with torch.compiler.set_stance("force_eager"):
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            with gradient_hooks(module, recording, eager):
                output = call(module, batch)
            loss_of(output).backward()
    return recording, [parameter.grad for parameter in module.parameters()]


def keys(recording: Recording) -> dict[str, Any]:
    values = recording.expected(METRICS)
    return {key.replace("activation/", "activation_gradient/", 1): v for key, v in values.items()}


def trained(callee: Callee, module: nn.Module, batches: list[Batch]) -> list[Any]:
    """The gradients of the parameters after one step."""
    module.zero_grad()
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        loss_of(call(callee, batch)).backward()
    return [parameter.grad for parameter in module.parameters()]


def check(
    module: nn.Module,
    batches: list[Batch],
    way: Way,
    backend: str = "aot_eager",
    spec: tmm.Spec = SPEC,
) -> None:
    """Values are those of hooks, and gradients of parameters bitwise those without probes."""
    reference, own = copy.deepcopy(module), copy.deepcopy(module)
    is_exact = way.name in ("whole", "not compiled") and backend != "inductor"
    plain = trained(way.apply(own, backend), own, batches) if is_exact else []
    torch._dynamo.reset()
    callee = way.instrument(module, backend, spec)
    monitor = tmm.monitor(callee)
    for step in range(2):
        with monitor.step(step):
            probed = trained(callee, module, batches)
        for without, with_probes in zip(plain, probed, strict=True) if is_exact else ():
            assert without is with_probes is None or torch.equal(without, with_probes)
        got = {k: v for k, v in monitor.get_step_metrics().items() if "gradient" in k}
        explanation = tmm.explain(callee)
        eager = explanation.eager
        recording, gradients = expected(copy.deepcopy(reference), batches, eager)
        for site in recording.integers:
            for metric in METRICS:
                got.pop(f"activation_gradient/{site}/{metric}", None)
        want = keys(recording)
        # A probe there would change the program (CLIP gives back a view of its other output).
        refused = [s for s, reason in explanation.unmeasured.items() if "other names" in reason]
        for key in [
            key
            for key in want
            for site in refused
            if key.startswith(f"activation_gradient/{site}/")
        ]:
            assert key not in got
            del want[key]
        # Outputs of a graph that the loss does not depend on get zeros, as documented.
        unused = [key for key in got.keys() - want.keys() if got[key] == 0.0]
        for key in unused if backend != "eager" else ():
            del got[key]
        assert_agrees(got, want, tolerance(backend))
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def shaped(name: str) -> nn.Module:
    torch.manual_seed(0)
    return SHAPES[name]().train()


class InPlace(nn.Module):
    """What a module gives back is overwritten, or a view of it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.a(x))
        z = self.b(y)
        z.view(-1)[:5].mul_(3)
        return z


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frozen(x)  # needs no gradient, and gets none
        with torch.no_grad():
            z = self.b(y)
        return self.frozen(self.a(y) + z)


class Several(nn.Module):
    """Several outputs; one module twice; an output that is another module's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.a(x)
        z = self.b(self.a(y))
        return z, {"y": y, "double": z * 2}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.b = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.a, self.b(x), use_reentrant=False)
        return checkpoint(self.a, y, use_reentrant=False)


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Half(), Half()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return torch.tanh(self.b(y))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = x + 2.0**index * block(x)
        return x


SHAPES: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (InPlace, Frozen, Several, Checkpointed, Breaking, Blocks)
}


# Faults lie in shapes or in ways, seldom in both. Each shape is seen by aot_eager (in test_ways);
# by eager, those that run otherwise there; by Inductor, that with the most to rearrange. Each way
# sees Blocks, and each that meets a graph break in its own manner sees Breaking.
SLOW = pytest.mark.slow
AS_IT_STANDS = ("InPlace", "Frozen", "Several", "Checkpointed")
QUICK_SHAPES = (*[(name, "eager") for name in AS_IT_STANDS], ("InPlace", "inductor"))
BROKEN = ("in place", "blocks in place", "compiled step")
ALL_SHAPES = [(name, b) for name in SHAPES for b in ("eager", "aot_eager", "inductor")]


@pytest.mark.parametrize(
    ("name", "backend"),
    [pytest.param(*s, marks=() if s in QUICK_SHAPES else SLOW) for s in ALL_SHAPES],
)
def test_shapes(name: str, backend: str) -> None:
    if backend == "inductor" and name == "Blocks":
        pytest.skip("Inductor draws its own random numbers for dropout")
    second = VECTORS.flip(0) * 2 if (name, backend) == ("InPlace", "inductor") else VECTORS[:3] * 2
    check(shaped(name), [{"x": VECTORS}, {"x": second}], WAYS["whole"], backend, BOTH)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if quick else SLOW, id=f"{name}-{way}")
        for name in SHAPES
        for way in WAYS.values()
        for quick in [
            name == "Blocks"
            or way.name in ("whole", "not compiled")
            or (name == "Breaking" and way.name in BROKEN)
        ]
    ],
)
def test_ways(name: str, way: Way) -> None:
    module = shaped(name)
    try:
        check(module, [{"x": VECTORS}], way, spec=BOTH if way.name == "whole" else SPEC)
    except NoBlocksError as error:
        pytest.skip(str(error))


ORDINARY = (("Sequential", "aot_eager"), ("GPT2LMHeadModel", "eager"))


@pytest.mark.parametrize(
    ("name", "backend"),
    [*ORDINARY, *(pytest.param(n, "aot_eager", marks=SLOW) for n in CASES if n != "Sequential")],
)
def test_architectures(name: str, backend: str) -> None:
    case = CASES[name]
    check(case.build(), [case.batch()], WAYS["whole"], backend, BOTH)


def test_several_losses_and_retained_graphs_are_joined() -> None:
    model = tmm.instrument(torch.compile(nn.Linear(8, 2), backend="aot_eager"), SPEC)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        output = model(VECTORS)
        output[:, 0].sum().backward(retain_graph=True)
        (3 * output[:, 1]).sum().backward()
    values = torch.tensor([1.0, 0.0] * 6 + [0.0, 3.0] * 6)
    got = monitor.get_step_metrics()
    want = {"rms": values.square().mean().sqrt(), "absmax": 3.0, "mean": 1.0, "std": values.std()}
    for metric, value in want.items():
        key = f"activation_gradient/[root module]/{metric}"
        assert got[key] == pytest.approx(float(value), rel=1e-6)


def penalized(model: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """A loss with a penalty of the gradient of the input, as of WGAN-GP and R1."""
    x = x.clone().requires_grad_()
    output = model(x).pow(3).sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    return output + gradient.square().sum()


@pytest.mark.parametrize("rule", ["rms", "function"])
@pytest.mark.parametrize("way", ["uncompiled", "eager"])
def test_a_gradient_penalty_every_third_step_is_bitwise_that_of_the_plain_program(
    way: str, rule: str
) -> None:
    def train(*rules: tmm.Rule) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        model = module if way == "uncompiled" else torch.compile(module, backend=way)
        if rules:
            tmm.instrument(model, tmm.Spec(*rules))
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        metrics = []
        for step in range(7):
            with tmm.monitor(model).step(step) if rules else contextlib.nullcontext():
                is_lazy = step % 3 == 2
                loss = penalized(model, VECTORS) if is_lazy else model(VECTORS).square().sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            metrics.append(tmm.monitor(model).get_step_metrics() if rules else {})
        return list(module.parameters()), metrics

    plain, _ = train()
    chosen = {"rms": tmm.activation_gradient("rms"), "function": tmm.activation_gradient(n=norm)}
    monitored, metrics = train(chosen[rule])
    assert all(map(torch.equal, plain, monitored))
    assert len(metrics[0]) == 4
    assert all(step.keys() == metrics[0].keys() for step in metrics)


def norm(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.norm()


def hessian(model: Callable[..., Any], x: torch.Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda x: model(x).pow(3).sum(), x)


def products(model: Callable[..., Any], x: torch.Tensor) -> Any:
    return torch.autograd.functional.jvp(model, x, torch.ones_like(x))[1]


def jacobian(model: Callable[..., Any], x: torch.Tensor) -> Any:
    return torch.func.jacrev(model)(x)


def batched(model: Callable[..., Any], x: torch.Tensor) -> Any:
    x = x.clone().requires_grad_()
    output = model(x).flatten()
    return torch.autograd.grad(output, x, torch.eye(len(output)), is_grads_batched=True)[0]


def third(model: Callable[..., Any], x: torch.Tensor) -> Any:
    x = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(model(x).pow(4).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), x, create_graph=True)
    return torch.autograd.grad(twice.square().sum(), x)[0]


@pytest.mark.parametrize("derivative", [hessian, products, jacobian, batched, third])
def test_other_derivatives_are_those_of_the_plain_program(derivative: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    want = derivative(module, VECTORS)
    model = tmm.instrument(torch.compile(module, backend="eager"), SPEC)
    with tmm.monitor(model).step(0):
        got = derivative(model, VECTORS)
    assert want.abs().max() > 0
    assert torch.equal(got, want)


class WithoutGradient(nn.Module):
    """A module is called where nothing hands on a gradient; what it gives back is used later."""

    def __init__(self, inner: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(8, 8), inner, nn.Linear(8, 8)
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        with self.context():
            z = self.inner(y)
        while not isinstance(z, torch.Tensor):
            z = z[0]
        return self.b(z)


class Gives(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        kinds = {"view": x[:, :], "detached": x.detach(), "new": x * 2}
        return ((x, None), x + 1) if self.kind == "tuple" else kinds[self.kind]


INNER: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "empty": nn.Sequential,
    "evaluated": lambda: nn.Dropout(0.5).eval(),
    "no dropout": lambda: nn.Dropout(0.0),
    "in place": lambda: nn.ReLU(inplace=True),
    **{kind: (lambda kind=kind: Gives(kind)) for kind in ("tuple", "view", "detached", "new")},
}
CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "enabled": torch.enable_grad,
}


@pytest.mark.parametrize(
    ("inner", "context", "way"),
    [
        *[(inner, "no_grad", "eager") for inner in INNER],
        *[(inner, "no_grad", "aot_eager") for inner in ("identity", "in place", "tuple", "view")],
        *[(inner, "no_grad", "uncompiled") for inner in ("identity", "tuple")],
        *[("identity", context, "aot_eager") for context in CONTEXTS if context != "no_grad"],
        *[
            pytest.param("empty", context, "eager", marks=SLOW)
            for context in CONTEXTS
            if context != "no_grad"
        ],
        *[
            pytest.param(inner, "no_grad", "aot_eager", marks=SLOW)
            for inner in ("empty", "evaluated", "no dropout", "detached", "new")
        ],
    ],
)
def test_a_module_called_without_gradients_does_not_cut_them(
    inner: str, context: str, way: str
) -> None:
    gradients = []
    for rules in ((), (tmm.activation("rms"),), (tmm.activation_gradient("rms"),)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = WithoutGradient(INNER[inner](), CONTEXTS[context])
        model = module if way == "uncompiled" else torch.compile(module, backend=way)
        if rules:
            tmm.instrument(model, tmm.Spec(*rules))
        with tmm.monitor(model).step(0) if rules else contextlib.nullcontext():
            model(VECTORS).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, *monitored in zip(*gradients, strict=True):
        assert all(g is plain is None or torch.equal(g, plain) for g in monitored)
    got, unmeasured = tmm.monitor(model).get_step_metrics(), tmm.explain(model).unmeasured
    passes_on = inner in ("identity", "empty", "tuple") and context != "enabled"
    if passes_on and way != "uncompiled":
        site = "inner[0][0]" if inner == "tuple" else "inner"
        assert "torch.no_grad" in unmeasured[site]
        assert f"activation_gradient/{site}/rms" not in got


def test_functions_and_histograms() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    spec = tmm.Spec(
        tmm.activation_gradient("histogram", modules="0"),
        tmm.activation_gradient(rows=lambda g: g.norm(dim=-1), aggregate="max", modules="0"),
        tmm.activation_gradient(wiped=lambda g: g.zero_().sum(), modules="1"),
    )
    recording, want = expected(copy.deepcopy(module), [{"input": VECTORS}], ())
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), spec)
    with tmm.monitor(model).step(0):
        loss_of(model(VECTORS)).backward()
    got = tmm.monitor(model).get_step_metrics()
    (gradient,) = recording.sites["0"]
    assert got["activation_gradient/0/rows"] == pytest.approx(gradient.norm(dim=-1).max().item())
    histogram = recording.expected(("histogram",))["activation/0/histogram"].value
    assert (got["activation_gradient/0/histogram"] == histogram).all()
    assert got["activation_gradient/1/wiped"] == 0
    for parameter, gradient in zip(module.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_nothing_arrives_outside_of_the_step() -> None:
    model = tmm.instrument(torch.compile(nn.Linear(8, 2), backend="aot_eager"), SPEC)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        early = model(VECTORS).sum()
    with monitor.step(1):
        early.backward()
        with torch.no_grad():
            model(VECTORS)
        with monitor.no_monitor():
            model(VECTORS).sum().backward()
    assert monitor.get_step_metrics() == {}


def test_a_function_that_cannot_be_an_aggregate() -> None:
    with pytest.raises(ValueError, match="aggregate= cannot be a function here.*mean, sum"):
        tmm.activation_gradient(mine=torch.mean, aggregate=torch.median)


class Aliased(nn.Module):
    """What a module gives back lives on under another name, and is overwritten there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.out, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind
        self.drop, self.act = nn.Dropout(0.0, inplace=True), nn.ReLU(inplace=True)
        self.part = Part(kind)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.fc(x) * 1
        if self.kind == "two modules":
            identity = y
            return self.out(self.act(self.drop(y))) + identity
        z, alias = self.part(y)
        if self.kind == "outputs":
            return z, alias, z.t()
        with torch.no_grad() if self.kind == "detached" else contextlib.nullcontext():
            (alias if self.kind == "detached" else z).mul_(2)
        return self.out(z) + alias.sum()


class Part(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y.detach() if self.kind == "detached" else y[:, :4]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["two modules", "views", "detached", "outputs"])
def test_other_names_of_a_tensor_keep_their_memory(kind: str, backend: str) -> None:
    """Where a probe would make another program of the model, there is none, and explain says so."""
    torch.manual_seed(0)
    model = torch.compile(Aliased(kind), backend=backend)
    found = []
    tmm.instrument(model, SPEC)
    monitor = tmm.monitor(model)
    for step in (None, 0):
        model.zero_grad()
        with contextlib.nullcontext() if step is None else monitor.step(step):
            output = model(VECTORS)
            parts = [tensor for _, tensor in walk(output)]
            if kind == "outputs":
                with torch.no_grad():
                    parts[0].mul_(3)  # its views change with it
            loss = sum(part.sum() * (i + 1) for i, part in enumerate(parts))
            loss.backward()
        found.append([*parts, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, monitored in zip(*found, strict=True):
        assert torch.equal(plain, monitored)
    assert any("has other names" in reason for reason in tmm.explain(model).unmeasured.values())


class DropsNothing(nn.Module):
    """A dropout that drops nothing: its own input where a graph runs as it stands, else a copy."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.out, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind
        self.drop = nn.Dropout(0.5 if kind == "evaluation" else 0.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.fc(x) * 1
        if self.kind == "evaluation":
            self.drop.eval()
        if self.kind == "checkpoint":
            z = checkpoint(self.drop, y, use_reentrant=False)
        elif self.kind == "twice":
            z = self.drop(self.drop(y))
        else:
            z = self.drop(y)
        if self.kind == "view":
            return z + 1, z[:, :4], y
        if self.kind == "overwritten":
            y.mul_(2)
            return self.out(z), self.out(y)
        return z, y


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "kind", ["training", "evaluation", "checkpoint", "twice", "view", "overwritten"]
)
def test_a_dropout_that_drops_nothing_shares_the_memory_that_it_shares_without_probes(
    kind: str, backend: str
) -> None:
    def leave(monitored: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        net = DropsNothing(kind)
        model = torch.compile(net, backend=backend)
        if monitored:
            tmm.instrument(model, SPEC)
        with tmm.monitor(model).step(0) if monitored else contextlib.nullcontext():
            outputs = model(VECTORS)
            with torch.no_grad():
                outputs[-1].mul_(3)
            sum(output.sum() * (i + 1) for i, output in enumerate(outputs)).backward()
        return [*outputs, *(p.grad for p in net.parameters() if p.grad is not None)]

    for plain, monitored in zip(leave(False), leave(True), strict=True):
        assert torch.equal(plain, monitored)


class MeasuredLater(nn.Module):
    """What ``first`` gives is overwritten under the name that ``second`` gave it."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), second

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.first(x)
        second = self.second(first)
        second[:, :1].mul_(2)
        return {"overwritten": second, "under its first name": first}


class UsesOne(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.part = MeasuredLater(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)["overwritten"].sin()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("second", [nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Identity()], ids=repr)
def test_a_tensor_that_is_only_measured_later_is_measured_as_it_is_then(
    second: nn.Module, backend: str
) -> None:
    net = UsesOne(second)
    expected = net.part(VECTORS)["under its first name"].double().square().mean().sqrt().item()
    rules = (tmm.activation("rms"), tmm.activation_gradient("rms"))
    model = tmm.instrument(torch.compile(net, backend=backend), tmm.Spec(*rules))
    with tmm.monitor(model).step(0):
        model(VECTORS).sum().backward()
    found = tmm.monitor(model).get_step_metrics()
    key = "activation/part[under its first name]/rms"
    assert found[key] == pytest.approx(expected, rel=1e-6)


def _penalty(loss: torch.Tensor, x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(7 * loss, x, create_graph=True)
    return gradient.square().sum()


def _adversarial(loss: torch.Tensor, x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    (7 * loss).backward(inputs=[x], retain_graph=True)
    return loss.new_zeros(())


def _inner_step(loss: torch.Tensor, x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    gradients = torch.autograd.grad(7 * loss, list(net.parameters()), retain_graph=True)
    return gradients[0].sum().detach()


class Residual(nn.Module):
    """Blocks whose parameters lie behind others, and one that a break of the graph leaves alone."""

    def __init__(self, *, is_broken: bool, is_frozen: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.blocks[1].requires_grad_(not is_frozen)
        self.last = nn.Softplus()
        self.is_broken = is_broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
            if self.is_broken:
                torch._dynamo.graph_break()
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    ("backend", "is_broken"), [(None, False), ("eager", False), ("eager", True)]
)
@pytest.mark.parametrize("also", [_penalty, _adversarial, _inner_step])
def test_gradients_that_are_asked_for_by_themselves_are_not_those_of_the_loss(
    also: Any, backend: str | None, is_broken: bool, is_frozen: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Residual(is_broken=is_broken, is_frozen=is_frozen).double()
    if is_frozen and also is _inner_step:
        net.blocks[1].requires_grad_(True)
    compiled: Any = net if backend is None else torch.compile(net, backend=backend)
    model = tmm.instrument(compiled, tmm.Spec(tmm.activation_gradient("norm")))
    monitor = tmm.monitor(model)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    with monitor.step(0):
        output = model(x)
        (output.square().sum() + also(output.sum(), x, net)).backward()
    found = monitor.get_step_metrics()
    want = (2 * output).norm().item()
    assert found["activation_gradient/[root module]/norm"] == pytest.approx(want, rel=1e-12)
    assert found["activation_gradient/last/norm"] == pytest.approx(want, rel=1e-12)
    assert {f"activation_gradient/blocks.{i}/norm" for i in range(3)} <= found.keys()
