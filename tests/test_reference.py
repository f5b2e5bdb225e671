"""Differences from a reference and the refined coordinate check, against eager forwards."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import Tolerance, assert_agrees, backward, walk
from tests.eager_reference import Batch, expected
from tests.model_zoo import CASES, CORE, convolutional, noise
from tests.ways import WAYS, Callee, Way, call
from tmm.runs.instrument import steps_of

METRICS = ("norm", "rms", "relative_norm", "absmax", "cosine", "l2")
RULES = (tmm.activation_difference(*METRICS), tmm.rcc())
FEW_RULES = (tmm.activation_difference("norm", "cosine"), tmm.rcc())
SINGLE = Tolerance(1e-5, 1e-5)
DOUBLE = Tolerance(1e-9, 1e-9)


def moved(module: nn.Module, amount: float = 0.3) -> nn.Module:
    """A copy with other parameters of about the same size."""
    other = copy.deepcopy(module)
    move(other, amount)
    return other


def move(module: nn.Module, amount: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
            change = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += amount * (size + 0.05) * change


def run(model: Any, batches: Sequence[Batch], step: int = 0) -> dict[str, Any]:
    monitor = tmm.monitor(model)
    with monitor.step(step):
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            backward(model(**batch))
    return monitor.get_step_metrics()


def trained(callee: Callee, module: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """What one step leaves: outputs, gradients, buffers, and the random numbers after it."""
    module.zero_grad()
    left: list[torch.Tensor] = []
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        output = call(callee, batch)
        backward(output)
        left += [tensor.detach().clone() for _, tensor in walk(output)]
    left += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [*left, *(buffer.clone() for buffer in module.buffers()), torch.rand(3)]


def check(
    module: nn.Module,
    batches: Sequence[Batch],
    backend: str = "aot_eager",
    way: Way = WAYS["whole"],
    *,
    allowed: Tolerance = DOUBLE,
    floor: float = 1e-3,
) -> tmm.Explanation:
    """First nothing differs, and training is bitwise the plain one; then values are right.

    All of it from one compilation, for it is this that takes long.
    """
    start, own = copy.deepcopy(module), copy.deepcopy(module)
    plain = [] if backend == "inductor" else trained(way.apply(own, backend), own, batches)
    torch._dynamo.reset()
    callee = way.instrument(module, backend, tmm.Spec(*RULES, reference="init"))
    monitor, state = tmm.monitor(callee), copy.deepcopy(module.state_dict())
    with monitor.step(0):
        left = trained(callee, module, batches)
    assert_nothing_differs(monitor.get_step_metrics())
    if backend != "inductor":
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, left, strict=True))
    want = expected(moved(start), start, batches, floor=floor)
    for step in (1, 2):
        module.load_state_dict(state)
        move(module)
        with monitor.step(step):
            trained(callee, module, batches)
        assert_agrees(monitor.get_step_metrics(), want, allowed)
    return tmm.explain(callee)


def assert_nothing_differs(values: dict[str, Any]) -> None:
    sizes = {k: v for k, v in values.items() if not k.startswith("RCC x_t")}
    differences = {k: v for k, v in sizes.items() if not k.endswith("/cosine")}
    assert len(differences) > 12
    assert set(differences.values()) == {0.0}


def as_double(batch: Batch) -> dict[str, Any]:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def quick_or_slow(quick: Sequence[Any], every: Sequence[Any]) -> list[Any]:
    """All that is in either, and that is not in the first one marked as slow."""
    rest = [one for one in every if one not in quick]
    parameters = [pytest.param(*one) for one in quick]
    return parameters + [pytest.param(*one, marks=pytest.mark.slow) for one in rest]


LARGE = ("GPT2LMHeadModel", "BertForMaskedLM", "ResNetForImageClassification")


@pytest.mark.parametrize(
    ("name", "backend"),
    quick_or_slow(
        [
            ("Sequential", "aot_eager"),
            ("ResNetForImageClassification", "eager"),
        ],
        [(case.name, "aot_eager") for case in CORE],
    ),
)
def test_architectures_in_float64(name: str, backend: str) -> None:
    check(CASES[name].build().double(), [as_double(CASES[name].batch())], backend)


@pytest.mark.parametrize(
    ("name", "backend"),
    quick_or_slow(
        [("Sequential", "eager")],
        [
            (name, backend)
            for name in ("Sequential", *LARGE)
            for backend in ("eager", "aot_eager", "inductor")
        ],
    ),
)
def test_backends_in_float32(name: str, backend: str) -> None:
    module = CASES[name].build()
    if backend == "inductor":
        without_dropout(module)  # it draws its own random numbers
    check(module, [CASES[name].batch()], backend, allowed=SINGLE, floor=0.1)


def test_inductor_in_float32() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.LayerNorm(6))
    check(module, [{"input": noise(6, 8)}], "inductor", allowed=SINGLE, floor=0.1)


def blocks(count: int = 2, *, broken: bool = False, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Stacked(count, broken=broken, checkpointed=checkpointed).double().train()


class Block(nn.Module):
    """A convolution, a normalization with statistics, in-place operations, several outputs."""

    def __init__(self, broken: bool, tracked: bool) -> None:
        super().__init__()
        self.broken = broken
        self.norm = nn.LayerNorm(8)
        self.fc, self.proj = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(8, track_running_stats=tracked)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.act(self.fc(self.norm(x)))
        if self.broken:
            torch._dynamo.graph_break()
        y = self.drop(self.proj(y))
        z = self.batch_norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        z = z * 2
        z[:, 0] = y[:, 0]
        x = x + y
        x += 0.5 * z
        return x, z


class Stacked(nn.Module):
    def __init__(self, count: int, *, broken: bool, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(11, 8)
        # Counting batches inside a checkpoint fails under the eager backend, also without tmm.
        self.blocks = nn.ModuleList([Block(broken, not checkpointed) for _ in range(count)])
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids) + torch.linspace(0, 1, 8, dtype=torch.float64)
        noise_like = torch.rand_like(x)
        side = torch.zeros_like(x)
        for block in self.blocks:
            if self.checkpointed:
                x, z = checkpoint(block, x, use_reentrant=False)
            else:
                x, z = block(x)
            side = side + z
        x, _ = self.attention(x, x + side, x, need_weights=False)
        return {"logits": self.head(x + noise_like), "side": side}


IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))


KINDS = {"plain": {}, "broken": {"broken": True}, "checkpointed": {"checkpointed": True}}
# Faults lie in models or in ways, seldom in both: each way sees a model, each model a way or two.
FEW_WAYS = (
    ("plain", "compiled step", "eager"),
    ("broken", "whole", "eager"),
    ("broken", "blocks in place", "eager"),
    ("checkpointed", "whole", "aot_eager"),
    ("checkpointed", "not compiled", "eager"),
)
ALL_WAYS = (
    *[("plain", "blocks in place", "eager"), ("broken", "compiled step", "eager")],
    *[("plain", "not compiled", "eager"), ("broken", "not compiled", "eager")],
    *[(kind, way, "aot_eager") for kind in KINDS for way in WAYS if way != "not compiled"],
    *[(kind, "whole", backend) for kind in KINDS for backend in ("eager", "inductor")],
)


@pytest.mark.parametrize(("kind", "way", "backend"), quick_or_slow(FEW_WAYS, ALL_WAYS))
def test_ways(kind: str, way: str, backend: str) -> None:
    # A second size is compiled with dynamic shapes, which takes long, as a second block does;
    # under Inductor there is one size, for with a second one it fixes a stride of attention by
    # the first one's.
    quick = (kind, way, backend) in FEW_WAYS and way != "blocks in place"
    module = blocks(1 if quick else 2, **KINDS[kind])
    batches = [{"ids": IDS}, {"ids": IDS.flip(0) if quick or backend == "inductor" else IDS[:2]}]
    if backend == "inductor":
        without_dropout(module)
    with torch._inductor.config.patch(fallback_random=True):
        explanation = check(module, batches, backend, WAYS[way])
    assert not explanation.unmeasured


def without_dropout(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = 0.0


class Dropping(nn.Module):
    """Blocks that draw random numbers behind a graph break."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Part() for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(x)
        torch._dynamo.graph_break()
        y = self.drop(y)
        return x + y, y


@pytest.mark.parametrize(
    ("backend", "count"),
    [
        *[("aot_eager", 2), ("inductor", 1)],
        pytest.param("inductor", 2, marks=pytest.mark.slow),
    ],
)
def test_dropouts_drop_the_same_of_the_reference(backend: str, count: int) -> None:
    module = Dropping(count)
    spec = tmm.Spec(tmm.activation_difference("absmax"), tmm.rcc(), reference="init")
    model = tmm.instrument(torch.compile(module, backend=backend), spec)
    got = run(model, [{"x": noise(4, 8)}])
    assert_nothing_differs(got)
    if backend == "inductor":
        # Called a second time outside of the graphs, a block would drop other elements.
        assert not any(key.startswith("RCC W_0(x_t-x_0)/blocks.0[0]") for key in got)
        reason = tmm.explain(model).unmeasured["blocks.0, refined coordinate check"]
        assert "draws random numbers of its own" in reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_under_inductor_nothing_differs_at_the_reference(kind: str) -> None:
    spec = tmm.Spec(tmm.activation_difference("absmax"), tmm.rcc(), reference="init")
    model = tmm.instrument(torch.compile(blocks(**KINDS[kind]), backend="inductor"), spec)
    assert_nothing_differs(run(model, [{"ids": IDS}]))


class Sized(nn.Module):
    """Reads the sizes of its input in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        x = self.embed(ids) + torch.linspace(0, 1, length, dtype=torch.float64)[:, None]
        x = self.norm(self.fc(x).view(batch * length, 8)).unflatten(0, (batch, length))
        x = x + torch.zeros(batch, 1, 8, dtype=torch.float64)
        y: torch.Tensor = self.out(x.transpose(0, 1).reshape(length, -1, 8)) * batch
        return y


@pytest.mark.parametrize("make", [Sized, pytest.param(blocks, marks=pytest.mark.slow)])
def test_dynamic_shapes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().double()
    reference = moved(module)
    statistics = [buffer.clone() for buffer in reference.buffers()]
    spec = tmm.Spec(*RULES, reference=reference)
    model = tmm.instrument(torch.compile(module, backend="aot_eager", dynamic=True), spec)
    for step, size in enumerate((4, 3, 2)):
        batch = {"ids": IDS[:size].clone()}  # how a view lies in its base would be guarded on
        assert_agrees(run(model, [batch], step), expected(module, reference, [batch]), DOUBLE)
        assert len(tmm.explain(model).graphs) == 1
    assert all(map(torch.equal, statistics, reference.buffers()))


def test_autocast() -> None:
    module = CASES["Sequential"].build()
    module[3].p = 0.0
    reference, batch = moved(module), CASES["Sequential"].batch()

    def autocast(module: Any, batch: Batch) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(**batch)

    with torch.autocast("cpu", torch.bfloat16):
        want = expected(module, reference, [batch], floor=0.1)
    model = tmm.instrument(
        torch.compile(module, backend="aot_eager"), tmm.Spec(*RULES, reference=reference)
    )
    with tmm.monitor(model).step(0):
        autocast(model, batch)
    assert_agrees(tmm.monitor(model).get_step_metrics(), want, Tolerance(1e-5, 1e-5))


def test_evaluation_mode_is_followed() -> None:
    module = convolutional().double().eval()
    batch = {"input": noise(2, 3, 10, 10).double()}
    reference = moved(module).eval()
    with torch.no_grad():
        for buffer in reference.buffers():
            if buffer.is_floating_point():
                buffer += 0.3
    want = expected(module, reference, [batch], floor=1e-3)
    spec = tmm.Spec(*RULES, reference=reference)
    model = tmm.instrument(torch.compile(module, backend="eager"), spec)
    assert_agrees(run(model, [batch]), want, DOUBLE)


SIZES = {
    "widths": st.lists(st.integers(1, 9), min_size=2, max_size=4),
    "rows": st.integers(1, 4),
    "bias": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=3, deadline=None)
@given(**SIZES)
def test_the_terms_add_up(widths: list[int], rows: int, bias: bool, seed: int) -> None:
    check_terms(widths, rows, bias, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_the_terms_add_up_of_many(widths: list[int], rows: int, bias: bool, seed: int) -> None:
    check_terms(widths, rows, bias, seed)


def check_terms(widths: list[int], rows: int, bias: bool, seed: int) -> None:
    """W_t x_t - W_0 x_0 = (W_t-W_0) x_t + W_0 (x_t-x_0), vector by vector."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    module = nn.Sequential(*layers).double()
    reference = moved(module)
    spec = tmm.Spec(tmm.rcc(), tmm.activation_difference("l2"), reference=reference)
    model = tmm.instrument(module, spec)
    x = torch.randn(rows, widths[0], dtype=torch.float64)
    with tmm.monitor(model).step(0):
        model(x)
    got = tmm.monitor(model).get_step_metrics()
    live, start = x, x
    for index, (own, other) in enumerate(zip(module, reference, strict=True)):
        with torch.no_grad():
            update, change = own(live) - other(live), other(live) - other(start)
            total = own(live) - other(start)
            live, start = own(live), other(start)
        torch.testing.assert_close(total, update + change)
        for key, vectors in (
            (f"RCC (W_t-W_0)x_t/{index}/l2norm", update),
            (f"RCC W_0(x_t-x_0)/{index}/l2norm", change),
            (f"activation_difference/{index}/l2", total),
        ):
            assert got[key] == pytest.approx(vectors.norm(dim=-1).mean().item(), abs=1e-12)


def test_functions_get_both_tensors() -> None:
    module = CASES["Sequential"].build().double()
    reference, batch = moved(module), as_double(CASES["Sequential"].batch())
    spec = tmm.Spec(
        tmm.activation_difference(l2=lambda a, ref: (a - ref).norm(dim=-1)),
        tmm.activation_difference(wiped=lambda a, ref: a.zero_().sum() + ref.sum(), modules="0"),
        tmm.activation_difference(
            most=lambda a, ref: (a - ref).abs(), aggregate=torch.median, modules="4"
        ),
        reference=reference,
    )
    got = run(tmm.instrument(torch.compile(module, backend="aot_eager"), spec), [batch])
    want = expected(module, reference, [batch])
    for name in ("0", "2", "4", "[root module]"):
        key = f"activation_difference/{name}/l2"
        assert got[key] == pytest.approx(want[key].value)
    torch.manual_seed(0)
    own = module(batch["input"])
    torch.manual_seed(0)
    other = reference(batch["input"])
    assert got["activation_difference/4/most"] == pytest.approx((own - other).abs().median().item())
    first = reference[0](batch["input"]).sum().item()
    assert got["activation_difference/0/wiped"] == pytest.approx(first)


def test_only_what_is_asked_for_is_in_the_graph() -> None:
    module = blocks(1)
    for rule, most in (
        (tmm.parameter_difference("norm"), 0),
        (tmm.rcc(modules="embed"), 1),
        (tmm.activation_difference("norm", modules="embed"), 1),
        (tmm.activation_difference("norm", modules=r"blocks\.0\.fc"), 4),
    ):
        spec = tmm.Spec(rule, tmm.activation("rms"), reference="init")
        model = tmm.instrument(torch.compile(copy.deepcopy(module), backend="eager"), spec)
        run(model, [{"ids": IDS}])
        (graph,) = tmm.explain(model).graphs
        copies = [str(node) for node in graph.after if "insert_reference: reference/" in str(node)]
        assert len(copies) <= most, copies


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.nn.functional.gumbel_softmax(self.a(x), dim=-1))


def test_what_cannot_be_followed_is_named() -> None:
    spec = tmm.Spec(tmm.activation_difference("norm"), tmm.rcc(), reference="init")
    model = tmm.instrument(torch.compile(Random(), backend="aot_eager"), spec)
    got = run(model, [{"x": noise(3, 8)}])
    assert {key.split("/")[1] for key in got} == {"a", "a.weight"}
    assert "gumbel_softmax draws random numbers" in tmm.explain(model).unmeasured["b"]


def test_forms_of_a_reference(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    reference, batch = moved(module), {"input": noise(4, 8)}
    torch.save({"model": reference.state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    save_file(reference.state_dict(), tmp_path / "reference.safetensors")
    compiled = {f"_orig_mod.{name}": value for name, value in reference.state_dict().items()}

    def values(source: Any, *, backend: str | None = None, **options: Any) -> dict[str, Any]:
        rules = (*FEW_RULES, tmm.parameter_difference("cosine", "l2"))
        own: Any = copy.deepcopy(module)
        own = own if backend is None else torch.compile(own, backend=backend)
        model = tmm.instrument(own, tmm.Spec(*rules, reference=source, **options))
        monitor = tmm.monitor(model)
        with monitor.step(0):
            torch.manual_seed(0)
            model(**batch)
            monitor.monitor_parameters()
        return monitor.get_step_metrics()

    others = (
        reference.state_dict(),
        compiled,
        tmp_path / "checkpoint.pt",
        str(tmp_path / "reference.safetensors"),
    )
    options = ({"reference_device": "cpu"}, {"reference_dtype": torch.float64})
    results = [
        values(reference),
        *[values(source) for source in others],
        *[values(reference, **option) for option in options],
        values(others[-1], **options[-1]),
    ]
    assert len({str(result) for result in results}) == 1  # text, for NaN is not equal to itself
    of_graphs = [
        values(reference, backend="eager"),
        values(compiled, backend="eager", **options[1]),
    ]
    assert len({str(result) for result in of_graphs}) == 1
    assert of_graphs[0] == pytest.approx(results[0], rel=1e-5, abs=1e-6, nan_ok=True)
    own, other = module[0].weight.double(), reference[0].weight.double()
    cosine = torch.nn.functional.cosine_similarity(own.flatten(), other.flatten(), dim=0)
    assert results[0]["parameter_difference/0.weight/cosine"] == pytest.approx(float(cosine))
    l2 = (own - other).norm(dim=-1).mean()
    assert results[0]["parameter_difference/0.weight/l2"] == pytest.approx(float(l2))


def test_a_reference_in_another_dtype_is_converted() -> None:
    module = CASES["Sequential"].build()
    half = copy.deepcopy(module).to(torch.bfloat16)
    with pytest.raises(ValueError, match="0.weight has torch.bfloat16, not torch.float32"):
        tmm.instrument(module, tmm.Spec(*RULES, reference=half))
    spec = tmm.Spec(*RULES, reference=half, reference_dtype=torch.bfloat16)
    model = tmm.instrument(module, spec)
    got = run(model, [CASES["Sequential"].batch()])
    want = expected(module, half.float(), [CASES["Sequential"].batch()])
    assert_agrees(got, want, SINGLE)


def test_references_that_do_not_fit(tmp_path: Path) -> None:
    module = CASES["Sequential"].build()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    other = {f"net.{name}": value for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="0.weight is missing; .* and .* more"):
        tmm.instrument(module, tmm.Spec(*RULES, reference=other))
    with pytest.raises(ValueError, match="list.pt' holds no state dict"):
        tmm.instrument(module, tmm.Spec(*RULES, reference=tmp_path / "list.pt"))
    with pytest.raises(ValueError, match="is neither 'init' nor a file"):
        tmm.Spec(*RULES, reference="nowhere.pt")
    with pytest.raises(ValueError, match=r"tmm.rcc\(\) needs a reference"):
        tmm.Spec(tmm.rcc())
    with pytest.raises(ValueError, match="reference_dtype=torch.int64 is not a floating-point"):
        tmm.Spec(*RULES, reference="init", reference_dtype=torch.int64)


def test_the_reference_can_be_replaced_and_removed() -> None:
    module = CASES["Sequential"].build().double()
    batch = as_double(CASES["Sequential"].batch())
    first, second = moved(module), moved(module, 0.6)
    spec = tmm.Spec(*RULES, tmm.activation("rms"), reference=first)
    model = tmm.instrument(torch.compile(module, backend="eager"), spec)
    monitor = tmm.monitor(model)

    def compared(step: int) -> dict[str, Any]:
        got = run(model, [batch], step)
        return {key: value for key, value in got.items() if not key.startswith("activation/")}

    assert_agrees(compared(0), expected(module, first, [batch], floor=1e-3), DOUBLE)
    monitor.set_reference(second)
    assert_agrees(compared(1), expected(module, second, [batch], floor=1e-3), DOUBLE)
    monitor.remove_reference()
    assert compared(2) == {}
    assert "activation/0/rms" in monitor.get_step_metrics()
    monitor.set_reference("init")
    assert compared(3)["activation_difference/0/norm"] == 0
    with monitor.step(4), pytest.raises(RuntimeError, match="before begin_step"):
        monitor.remove_reference()


@pytest.mark.skipif(
    importlib.util.find_spec("torch_module_monitor") is None,
    reason="torch-module-monitor is not installed",
)
def test_values_are_those_of_torch_module_monitor() -> None:
    from torch_module_monitor import (  # type: ignore[import-not-found,unused-ignore]
        ModuleMonitor,
        RefinedCoordinateCheck,
    )

    module = CASES["Sequential"].build().double()
    module[3].p = 0.0
    batch = as_double(CASES["Sequential"].batch())
    reference = moved(module)
    peer = ModuleMonitor(monitor_step_fn=lambda step: True)
    watched, other = copy.deepcopy(module), copy.deepcopy(reference)
    peer.set_module(watched)
    peer.set_reference_module(other)
    peer.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    check = RefinedCoordinateCheck(peer)
    peer.begin_step(0)
    with torch.no_grad():
        other(**batch)
    watched(**batch)
    check.refined_coordinate_check()
    peer.end_step()
    spec = tmm.Spec(tmm.rcc(), tmm.activation_difference("l2"), reference=reference)
    got = run(tmm.instrument(torch.compile(module, backend="aot_eager"), spec), [batch])
    want = {key: float(value) for key, value in peer.get_step_metrics().items()}
    further = (".weight/W_t x_t/", ".weight/W_0 x_0/", ".weight/x_t/", ".weight/x_t-x_0/")
    common = {key for key in want if not any(part in key for part in further)}
    assert common == got.keys()
    for key in common:
        assert got[key] == pytest.approx(want[key], rel=1e-9, abs=1e-12), key


class IntoABuffer(nn.Module):
    """Results are written into views of a tensor that no parameter had touched."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        together = torch.zeros(2, *x.shape, dtype=x.dtype)
        first = together[0]
        first.copy_(self.a(x))
        together[1] += self.b(x)
        first.mul_(2)
        return together.sum(0)


def test_what_is_written_into_views_is_followed_between_graphs() -> None:
    class Disabled(IntoABuffer):
        forward = torch._dynamo.disable(IntoABuffer.forward)

    module = Disabled().double()
    reference, batch = moved(module), {"x": noise(3, 4).double()}
    model = torch.compile(module, backend="aot_eager")
    tmm.instrument(model, tmm.Spec(*RULES, reference=reference))
    assert_agrees(run(model, [batch]), expected(module, reference, [batch]), DOUBLE)


def test_what_is_written_into_views_is_refused_in_graphs() -> None:
    module = IntoABuffer().double()
    reference, batch = moved(module), {"x": noise(3, 4).double()}
    model = torch.compile(module, backend="aot_eager")
    tmm.instrument(model, tmm.Spec(*RULES, reference=reference))
    want = expected(module, reference, [batch])
    kept = {key: value for key, value in want.items() if "[root module]" not in key}
    assert_agrees(run(model, [batch]), kept, DOUBLE)
    assert "has other names" in tmm.explain(model).unmeasured["[root module]"]


def test_recurrent_layers_are_followed() -> None:
    """They run between graphs, and with batch_first turn their output in place."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self, kind: type[nn.RNNBase]) -> None:
            super().__init__()
            self.layer, self.head = kind(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.layer(x)[0])
            return y

    for kind in (nn.GRU, nn.LSTM, nn.RNN):
        model, reference = Recurrent(kind), Recurrent(kind)
        x = torch.randn(3, 5, 4)
        tmm.instrument(model, tmm.Spec(tmm.activation_difference("norm"), reference=reference))
        with tmm.monitor(model).step(0):
            model(x)
        found = tmm.monitor(model).get_step_metrics()
        with torch.no_grad():
            differences = {
                "head": model(x) - reference(x),
                "layer[0]": model.layer(x)[0] - reference.layer(x)[0],
            }
        for name, difference in differences.items():
            expected = difference.norm().item()
            assert found[f"activation_difference/{name}/norm"] == pytest.approx(expected, rel=1e-5)
        assert not tmm.explain(model).unmeasured


def test_the_operands_of_both_terms() -> None:
    torch.manual_seed(0)

    class Layers(nn.Module):
        def __init__(self, breaks: bool) -> None:
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, False)
            self.breaks = breaks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            if self.breaks:
                torch._dynamo.graph_break()
            z: torch.Tensor = self.out(self.norm(y))
            return z

    for breaks in (False, True):
        model, reference = Layers(breaks), Layers(breaks)
        with torch.no_grad():
            for module in (model, reference):
                module.norm.weight.normal_()
                module.norm.bias.normal_()
        x = torch.randn(5, 4)
        tmm.instrument(
            model, tmm.Spec(tmm.rcc(operands=True), reference=reference), on_error="raise"
        )
        with tmm.monitor(model).step(0):
            model(x)
        found = tmm.monitor(model).get_step_metrics()
        with torch.no_grad():
            ours = [x, model.fc(x), model.norm(model.fc(x))]
            theirs = [x, reference.fc(x), reference.norm(reference.fc(x))]
            normal, initial = (nn.functional.layer_norm(t[1], (6,)) for t in (ours, theirs))
            update, change = "RCC (W_t-W_0)x_t", "RCC W_0(x_t-x_0)"
            expected = {
                f"{update}/fc.weight/W_t x_t": ours[0] @ model.fc.weight.T,
                f"{change}/fc.weight/W_0 x_0": theirs[0] @ reference.fc.weight.T,
                f"{update}/norm.weight/W_t x_t": normal * model.norm.weight,
                f"{change}/norm.weight/W_0 x_0": initial * reference.norm.weight,
                f"{update}/norm.weight/x_t": normal,
                f"{change}/norm.weight/x_t-x_0": normal - initial,
                f"{update}/out.weight/W_t x_t": model.out(ours[2]),
                f"{change}/out.weight/W_0 x_0": reference.out(theirs[2]),
            }
        for key, operand in expected.items():
            value = operand.norm(dim=-1).mean().item()
            assert found[f"{key}/l2norm"] == pytest.approx(value, rel=1e-4), key
        further = {key for key in found if key.count("/") > 2}
        assert further == {f"{key}/l2norm" for key in expected}
        assert not tmm.explain(model).unmeasured


def test_inputs_of_the_reference() -> None:
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 4), nn.Linear(4, 4)
    compiled = torch.compile(model, backend="aot_eager")
    tmm.instrument(compiled, tmm.Spec(tmm.activation_difference("norm"), reference=reference))
    monitor, x, y = tmm.monitor(compiled), torch.randn(3, 4), torch.randn(3, 4)
    for step, other in enumerate((None, x, y, None)):
        with monitor.step(step):
            if other is not None:
                monitor.give_reference_inputs(other)
            compiled(x)
        expected = (model(x) - reference(x if other is None else other)).norm().item()
        (value,) = monitor.get_step_metrics().values()
        assert value == pytest.approx(expected, rel=1e-5)
    comparing = steps_of(compiled).twin.comparing
    assert comparing is not None
    assert len(list(comparing.inputs.remarks())) == 1
    monitor.remove_reference()
    with pytest.raises(RuntimeError, match="there is no reference"):
        monitor.give_reference_inputs(x)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    garbage, pickled = tmp_path / "garbage.pt", tmp_path / "pickled.pt"
    garbage.write_text("garbage")
    torch.save(nn.Linear(2, 2), pickled)
    for path in (garbage, pickled):
        spec = tmm.Spec(tmm.activation_difference("rms"), reference=path)
        with pytest.raises(ValueError, match=rf"{path.name}' cannot be read as a state dict"):
            tmm.instrument(nn.Linear(2, 2), spec)


def test_a_reference_with_other_code_is_told() -> None:
    model, other = (
        nn.Sequential(nn.Linear(2, 2), activation) for activation in (nn.ReLU(), nn.Tanh())
    )
    spec = tmm.Spec(tmm.activation_difference("rms"), reference=other)
    with pytest.warns(UserWarning, match="by the model's code.*1 is a Tanh, not a ReLU") as told:
        tmm.instrument(model, spec)
    assert {warning.filename for warning in told} == {__file__}
