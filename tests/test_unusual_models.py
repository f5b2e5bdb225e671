"""Models of unusual shape, and unusual ways to run them, under each way of compiling."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import Recording, assert_agrees, eager_hooks, record_calls, tolerance
from tests.model_zoo import CASES, LABELS, noise, tokens
from tests.ways import WAYS, NoBlocksError, Way, call
from tmm.core.failures import MonitoringWarning

METRICS = ("mean", "rms", "absmax", "norm")  # norms see what is counted twice
SPEC = tmm.Spec(tmm.activation(*METRICS))
VECTORS = noise(6, 8)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        y = torch.tanh(self.blocks[0](x))
        return y if depth == 0 else self(y, depth - 1) * 0.5


class Tied(nn.Module):
    """One module under two names, one parameter in two modules, and a module in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.again = self.blocks[1]
        self.head = nn.Linear(8, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x)
        for _ in range(3):
            y = torch.relu(self.blocks[0](y))
        output: torch.Tensor = self.head(self.again(self.blocks[1](y)))
        return output


class Choice(nn.Module):
    """Data-dependent control flow, over a dictionary of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.experts = nn.ModuleDict({"low": nn.Linear(8, 8), "high": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks[0](x)
        name = "high" if y.sum() > 0 else "low"
        output: torch.Tensor = self.experts[name](y)
        return output


@dataclass
class Result:
    loss: torch.Tensor
    parts: dict[str, Any]


class Containers(nn.Module):
    """Gives back a dataclass that holds containers; measures complex numbers and integers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.spectrum = Spectrum()
        self.classes = Classes()

    def forward(self, x: torch.Tensor) -> Result:
        y = self.blocks[0](x)
        return Result(y.sum(), {"pair": [y, (self.spectrum(y), self.classes(y))], "none": None})


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(x)


class Classes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


class Jagged(nn.Module):
    """Works on sequences of different lengths, without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([0, 2, 6])
        nested = torch.nested.nested_tensor_from_jagged(x, lengths)
        output: torch.Tensor = self.blocks[0](nested).values()
        return output


class Sequences(nn.Module):
    """Torch's own attention and recurrent modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.gated = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x)
        y, _ = self.recurrent(self.encoder(y))
        output: torch.Tensor = self.gated(y)[0]
        return output


def parametrized() -> nn.Module:
    """Weights that are computed, and hooks of the user that change what passes."""
    blocks = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8)
    )
    blocks[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    blocks[2].register_forward_hook(lambda _, __, output: output + 1)
    return blocks


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def adapted() -> nn.Module:
    """LoRA adapters around the blocks."""
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(Sequence(), config)
    return model


def adapted_language_model() -> nn.Module:
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    base = CASES["GPT2LMHeadModel"].build()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model: nn.Module = peft.get_peft_model(base, lora)
    return model


BATCHES: dict[str, dict[str, Any]] = {
    "Tied": {"x": tokens()},
    "Sequences": {"x": noise(2, 5, 8)},
    "parametrized": {"input": VECTORS},
    "adapted_language_model": {"input_ids": tokens(), "labels": tokens()},
}
SHAPES: tuple[Callable[[], nn.Module], ...] = (
    *(Recursive, Tied, Choice, Containers, Jagged, Sequences),
    *(parametrized, adapted, adapted_language_model),
)


FEW_WAYS = ("whole",)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def batch_of(make: Callable[[], nn.Module]) -> dict[str, Any]:
    return BATCHES.get(make.__name__, {"x": VECTORS})


def expected(module: nn.Module, batch: dict[str, Any]) -> Recording:
    return record_calls(copy.deepcopy(module), [lambda model: call(model, batch)])


# Faults lie in shapes or in ways, seldom in both: each shape is seen whole and uncompiled, but the
# largest one only uncompiled; each way sees one that breaks its graph and one that calls itself.
ALL_WAYS = (Choice, Recursive)
ONCE = {
    "in place": Containers,
    "blocks in place": Sequences,
    "blocks wrapped": Tied,
    "parts inside whole": adapted,
    "compiled step": parametrized,
}


def shapes_and_ways() -> list[Any]:
    parameters = []
    for make in SHAPES:
        for way in WAYS.values():
            quick = make in ALL_WAYS or way.name == "not compiled" or ONCE.get(way.name) is make
            quick = quick or (way.name == "whole" and make is not adapted_language_model)
            marks = () if quick else (pytest.mark.slow,)
            parameters.append(pytest.param(make, way, marks=marks, id=f"{make.__name__}-{way}"))
    return parameters


@pytest.mark.parametrize(("make", "way"), shapes_and_ways())
def test_every_shape_under_every_way(make: Callable[[], nn.Module], way: Way) -> None:
    module, batch = build(make), batch_of(make)
    recording = expected(module, batch)
    try:
        callee = way.instrument(module, "aot_eager", SPEC)
    except NoBlocksError as error:
        pytest.skip(str(error))
    monitor = tmm.monitor(callee)
    for step in range(2):
        with monitor.step(step):
            call(callee, batch)
        want = recording.expected(METRICS)
        assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))
    assert set(tmm.explain(callee).unmeasured) == recording.integers


@pytest.mark.parametrize("way", WAYS.values(), ids=str)
def test_inference_mode(way: Way) -> None:
    module = build(Sequence).eval()
    recording = expected(module, {"x": VECTORS})
    callee = way.instrument(module, "aot_eager", SPEC)
    monitor = tmm.monitor(callee)
    for step in range(2):
        with torch.inference_mode(), monitor.step(step):
            call(callee, {"x": VECTORS})
        want = recording.expected(METRICS)
        assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if name in FEW_WAYS else pytest.mark.slow, id=name)
        for name, way in WAYS.items()
    ],
)
def test_compiled_autograd(way: Way) -> None:
    module = build(Sequence)
    recording = expected(module, {"x": VECTORS})
    want = [p.grad.clone() for p in _with_gradients(copy.deepcopy(module))]
    callee = way.instrument(module, "aot_eager", SPEC)
    monitor = tmm.monitor(callee)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        for step in range(2):
            module.zero_grad()
            with monitor.step(step):
                call(callee, {"x": VECTORS}).sum().backward()  # type: ignore[attr-defined]
            values = recording.expected(METRICS)
            assert_agrees(monitor.get_step_metrics(), values, tolerance("aot_eager"))
            got = [parameter.grad for parameter in module.parameters()]
            torch.testing.assert_close(got, want)


def _with_gradients(module: nn.Module) -> list[Any]:
    module(VECTORS).sum().backward()
    return list(module.parameters())


@pytest.mark.parametrize(
    "mode",
    [
        "reduce-overhead",
        pytest.param("max-autotune", marks=pytest.mark.slow),
        pytest.param("max-autotune-no-cudagraphs", marks=pytest.mark.slow),
    ],
)
def test_modes_of_inductor_with_micro_batches(mode: str) -> None:
    module = build(Sequence)
    batches = [noise(6, 8, seed=seed) for seed in range(3)]
    calls = [lambda model, x=x: model(x) for x in batches]
    recording = record_calls(copy.deepcopy(module), calls)
    model = tmm.instrument(torch.compile(module, mode=mode), SPEC)
    monitor = tmm.monitor(model)
    for step in range(2):
        with monitor.step(step):
            for x in batches:
                model(x).sum().backward()
                monitor.after_micro_batch()
        want = recording.expected(METRICS)
        assert_agrees(monitor.get_step_metrics(), want, tolerance("inductor"))


@pytest.mark.parametrize("way", ["whole", "in place", "blocks in place", "compiled step"])
def test_fullgraph_and_dynamic_lengths(way: str) -> None:
    module = build(Sequence)
    lengths = [noise(n, 8) for n in (3, 5, 9)]
    recording = record_calls(copy.deepcopy(module), [lambda m, x=x: m(x) for x in lengths])
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": True}
    callee: Any = module
    if way == "whole":
        callee = torch.compile(module, **options)
    elif way == "compiled step":
        callee = torch.compile(lambda x: module(x), **options)
    else:
        for part in [module] if way == "in place" else module.blocks:
            part.compile(**options)
    callee = tmm.instrument(callee, SPEC, module=module if way == "compiled step" else None)
    monitor = tmm.monitor(callee)
    with monitor.step(0):
        for x in lengths:
            callee(x)
    assert_agrees(monitor.get_step_metrics(), recording.expected(METRICS), tolerance("aot_eager"))
    # The first block's input needs no gradient, that of the other does: two graphs, as plain has.
    assert len(tmm.explain(callee).graphs) == (2 if way == "blocks in place" else 1)


def test_a_whole_training_step_in_one_function() -> None:
    module, reference = build(Sequence), build(Sequence)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, reference)]

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = module(x).square().mean()
        tmm.record("loss", loss)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        return loss

    plain = torch.compile(step, backend="aot_eager")
    function = tmm.instrument(plain, SPEC, module=module)
    monitor = tmm.monitor(module)
    assert monitor is tmm.monitor(function)
    with pytest.raises(RuntimeError, match="would train"):
        monitor.prepare(VECTORS)
    for index in range(3):
        recording = Recording()
        with eager_hooks(reference, recording):
            loss = reference(VECTORS).square().mean()
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        with monitor.step(index):
            got = function(VECTORS)
        torch.testing.assert_close(got, loss)
        values = monitor.get_step_metrics()
        assert values.pop("loss") == pytest.approx(loss.item(), rel=1e-6)
        assert_agrees(values, recording.expected(METRICS), tolerance("aot_eager"))
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    assert tmm.remove(function) is plain


def test_an_outer_compile_is_noticed_and_said() -> None:
    module = build(Sequence)
    model = tmm.instrument(torch.compile(module, backend="eager"), SPEC)
    monitor = tmm.monitor(model)
    outer = torch.compile(lambda x: model(x).sum(), backend="eager")
    said = "no forward pass.*inside a function or module that"
    with pytest.warns(MonitoringWarning, match=said), monitor.step(0):
        outer(VECTORS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        with monitor.step(1):
            outer(VECTORS)
        with monitor.step(2):
            model(VECTORS)
        assert len(monitor.get_step_metrics()) == 3 * len(METRICS)
        with monitor.step(3), monitor.no_monitor():
            model(VECTORS)


def test_models_that_share_a_compiled_block() -> None:
    shared = nn.Linear(8, 8)
    shared.compile(backend="aot_eager")
    modules = [nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Linear(8, 8), shared)]
    recordings = [expected(module, {"input": VECTORS}) for module in modules]
    for module in modules:
        tmm.instrument(module, SPEC)
    monitors = [tmm.monitor(module) for module in modules]
    for step in range(2):
        with monitors[0].step(step), monitors[1].step(step):
            for module in modules:
                module(VECTORS)
        for monitor, recording in zip(monitors, recordings, strict=True):
            want = recording.expected(METRICS)
            assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))
    tmm.remove(modules[0])
    with monitors[1].step(2):
        modules[1](VECTORS)
    assert_agrees(
        monitors[1].get_step_metrics(), recordings[1].expected(METRICS), tolerance("aot_eager")
    )
    tmm.remove(modules[1])
    assert torch.equal(modules[0](VECTORS), torch.tanh(shared(VECTORS)))


class Repeated(nn.Module):
    """Activation checkpointing around blocks that are compiled one by one."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))])
        self.blocks.append(copy.deepcopy(self.blocks[0]))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize(
    ("backend", "reentrant"),
    [
        *[("aot_eager", False), ("aot_eager", True), ("inductor", False)],
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_recomputed_blocks_count_once(backend: str, reentrant: bool) -> None:
    module = build(lambda: Repeated(reentrant=reentrant))
    x = VECTORS.clone().requires_grad_()
    recording = expected(module, {"x": x})
    for block in module.blocks:
        block.compile(backend=backend)
    tmm.instrument(module, SPEC)
    monitor = tmm.monitor(module)
    gradients = []
    for step in range(4):
        module.zero_grad()
        with monitor.step(step) if step % 2 else monitor.no_monitor():
            module(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
        if step % 2:
            want = recording.expected(METRICS)
            assert_agrees(monitor.get_step_metrics(), want, tolerance(backend))
    for other in gradients[1:]:
        exactly = {"rtol": 0.0, "atol": 0.0} if backend == "aot_eager" else {}
        torch.testing.assert_close(other, gradients[0], **exactly)
    with monitor.step(5):
        loss = module(x).sum()
    loss.backward()  # after the step: it repeats what the step ran


def test_labels_are_untouched() -> None:
    """Integer inputs reach a compiled step as they are."""
    module = nn.Sequential(nn.Linear(8, 2))
    step = torch.compile(
        lambda x, y: nn.functional.cross_entropy(module(x), y), backend="aot_eager"
    )
    function = tmm.instrument(step, SPEC, module=module)
    with tmm.monitor(module).step(0):
        loss = function(VECTORS[:2], LABELS)
    assert torch.equal(loss, nn.functional.cross_entropy(module(VECTORS[:2]), LABELS))
