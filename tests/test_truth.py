"""Every value agrees with what a plain eager hook on the same module computes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import (
    BUILTIN,
    COUNTS,
    EDGES,
    Call,
    Recording,
    Tolerance,
    assert_agrees,
    disagreements,
    record_calls,
    run_calls,
    tolerance,
)
from tests.model_zoo import (
    BREAKING,
    CASES,
    CORE,
    PAUSES,
    WAYS,
    Block,
    Case,
    Checkpointed,
    InPlace,
    Pause,
    Stack,
    convolutional,
    language,
    noise,
    perceptron,
    print_something,
    tokens,
)
from tmm.kernels.fused.choose_lowering import Lowering


def row_norms(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)


def call_with(batch: Mapping[str, Any]) -> Call:
    return lambda model: model(**batch)


def on(*inputs: torch.Tensor) -> Call:
    return lambda model: model(*inputs)


def check(
    module: nn.Module,
    *calls: Call,
    backend: str = "aot_eager",
    steps: int = 2,
    allowed: Tolerance | None = None,
    lowering: Lowering = "auto",
    **compile_options: Any,
) -> tmm.Explanation:
    """Compare steps of ``calls`` with eager hooks on a copy, also on programs already warm."""
    reference = copy.deepcopy(module)
    spec = tmm.Spec(tmm.activation(*BUILTIN), tmm.activation(row_norms=row_norms))
    compiled = torch.compile(module, backend=backend, **compile_options)
    model = tmm.instrument(compiled, spec, lowering=lowering)
    monitor = tmm.monitor(model)
    for step in range(steps):
        with monitor.step(step):
            run_calls(model, list(calls), seed=step)
        recording = record_calls(reference, list(calls), seed=step)
        assert_agrees(
            monitor.get_step_metrics(),
            recording.expected(row_norms=row_norms),
            allowed or tolerance(backend),
        )
        unmeasured = tmm.explain(model).unmeasured
        assert set(unmeasured) == recording.integers, unmeasured
    return tmm.explain(model)


def backends(*names: str, slow: tuple[str, ...] = ()) -> list[Any]:
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


# Those of CORE that are not among these, test_ways compares by default, each in another way.
FAST = {
    "eager": ("T5ForConditionalGeneration", "GPT2LMHeadModel (graph break)"),
    "aot_eager": ("Sequential", "ResNetForImageClassification"),
    "inductor": ("Sequential",),
}


def zoo() -> list[Any]:
    parameters = []
    for name, case in CASES.items():
        for backend in FAST:
            marks = () if name in FAST[backend] else (pytest.mark.slow,)
            parameters.append(pytest.param(case, backend, marks=marks, id=f"{name}-{backend}"))
    return parameters


@pytest.mark.parametrize(("case", "backend"), zoo())
def test_every_architecture_agrees_with_eager_hooks(case: Case, backend: str) -> None:
    # Inductor draws other random numbers than eager, so that dropout is off there.
    module = case.build().train(backend != "inductor")
    check(module, call_with(case.batch()), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_architecture_agrees_where_statistics_are_fused(name: str) -> None:
    case = CASES[name]
    module = case.build().train(False)
    check(module, call_with(case.batch()), backend="inductor", lowering="fused")


EVERYWHERE = backends("eager", "aot_eager", slow=("inductor",))
EAGER = backends("eager", slow=("aot_eager", "inductor"))
"""For what does not depend on the compiler, but on what tmm does with its graphs."""


def slow_pairs(*pairs: tuple[object, ...]) -> list[Any]:
    return [pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


class Apply(nn.Module):
    """A module that is nothing but a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> object:
        return self.function(*inputs)


class Fan(nn.Module):
    """One linear layer, whose output goes through each of several functions."""

    def __init__(self, width: int = 8, **functions: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, width)
        self.parts = nn.ModuleDict({name: Apply(f) for name, f in functions.items()})

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.fc(x)
        return {name: part(y) for name, part in self.parts.items()}


LAYOUTS: dict[str, Callable[[torch.Tensor], object]] = {
    "transposed": lambda y: y.t(),
    "expanded": lambda y: y[:, :1].expand(-1, 7),
    "spread": lambda y: y[:, ::2],
    "inner": lambda y: y[1:3, 2:5],
    "overlapping": lambda y: y.unfold(1, 3, 1),
    "scalar": lambda y: y.sum(),
    "single": lambda y: y[:1, :1],
    "prime": lambda y: y.flatten()[:47],
    "rows": lambda y: y.repeat(64, 5),
    "permuted": lambda y: y.view(3, 2, 2, -1).permute(0, 3, 1, 2),
    "spread_channels": lambda y: y.view(3, 2, 2, -1).permute(0, 3, 1, 2)[:, ::2],
}
VALUES: dict[str, Callable[[torch.Tensor], object]] = {
    "some_nan": lambda y: y.masked_fill(y > 0.5, math.nan),
    "last_nan": lambda y: torch.cat([y.flatten(), y.new_full((1,), math.nan)]),
    "all_nan": lambda y: y * math.nan,
    "infinite": lambda y: y.masked_fill(y > 0.5, math.inf),
    "minus_infinite": lambda y: y.masked_fill(y > 0.5, -math.inf),
    "both_infinite": lambda y: torch.where(y > 0, math.inf, -math.inf),
    "nan_and_infinite": lambda y: torch.where(y > 0, math.inf, math.nan),
    "zero": lambda y: y * 0,
    "constant": lambda y: torch.full_like(y, 0.1),
    "large_constant": lambda y: torch.full_like(y, 12345.678),
    "rectified": lambda y: y.relu(),
    "offset": lambda y: y + 1000.0,
    "outlier": lambda y: torch.cat([y.flatten(), y.new_full((3,), 1e4)]),
    "small": lambda y: y * 1e-8,
    "large": lambda y: y * 1e8,
    "very_small": lambda y: y * 1e-13,
    "very_large": lambda y: y * 1e13,
    "negative_zero": lambda y: -(y * 0),
}
KINDS: dict[str, Callable[[torch.Tensor], object]] = {
    "complex64": lambda y: torch.complex(y, y.flip(0)),
    "spectrum": lambda y: torch.fft.rfft(y),
    "complex_nan": lambda y: torch.complex(y, y.masked_fill(y > 0, math.nan)),
    "integer": lambda y: y.argmax(-1),
    "boolean": lambda y: (y > 0, y),
    "empty": lambda y: y[:, :0],
    "none": lambda y: None,
    "number": lambda y: 3.5,
    "fp16": lambda y: y.half(),
    "bf16": lambda y: y.bfloat16(),
    "fp64": lambda y: y.double() * 1.1,
    "fresh": lambda y: torch.ones(3, 2),
    "detached": lambda y: y.detach() * 2,
}
FUNCTIONS = {"layouts": LAYOUTS, "values": VALUES, "kinds": KINDS}
FEW = ("transposed", "overlapping", "spread_channels")


@pytest.mark.parametrize(
    ("functions", "backend"),
    [
        *[(functions, "eager") for functions in FUNCTIONS],
        *[("layouts", "aot_eager"), ("kinds", "aot_eager")],
        *slow_pairs(("values", "aot_eager"), *[(functions, "inductor") for functions in FUNCTIONS]),
    ],
)
def test_every_kind_of_tensor_is_measured(functions: str, backend: str) -> None:
    check(Fan(**FUNCTIONS[functions]), on(noise(12, 8)), backend=backend)


@pytest.mark.parametrize(
    ("functions", "backend"),
    [
        *[("few layouts", "inductor"), ("layouts", "eager"), ("values", "eager")],
        *slow_pairs(("layouts", "inductor"), ("values", "inductor")),
    ],
)
def test_the_compiled_kernel_measures_every_kind_of_tensor(functions: str, backend: str) -> None:
    few = {name: LAYOUTS[name] for name in FEW}
    fan = few if functions == "few layouts" else FUNCTIONS[functions]
    # Wide enough that the kernel works through many rows, of several lengths.
    check(Fan(384, **fan), on(noise(12, 8)), backend=backend, steps=1)


@dataclasses.dataclass
class Fields:
    first: torch.Tensor
    rest: object = None


class Named(NamedTuple):
    left: torch.Tensor
    right: object


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[Any, object]:
        y = self.fc(x)
        return {
            "pair": (y, {"z": y.relu(), 5: [y * 2, None]}),
            "fields": Fields(y + 1, [None, 3, "text", y.sum()]),
            "named": Named(x * 2, Fields(y.tanh(), {"deep": y.argmax(-1)})),
            "again": y,
        }


class Shared(nn.Module):
    """One module under two names, called three times; one function under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.act = nn.Tanh()
        self.same_fc = self.fc
        self.same_act = self.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same_act(self.fc(x))
        x = self.act(self.same_fc(x) * 3)
        return self.fc(x[:2])


class PassThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.nothing = nn.Sequential()
        self.identity = nn.Identity()
        self.deep = nn.Sequential(nn.Sequential(nn.Identity()), nn.Dropout(0.0))
        self.pair = Apply(lambda a, b: (b, a, (a, b)))

    def forward(self, x: torch.Tensor) -> object:
        y = self.identity(self.nothing(x))
        z = self.fc(self.deep(y))
        return self.pair(z, self.nothing(y))


class Stored(nn.Module):
    """A tensor that leaves one module by an attribute, and a parameter and a buffer as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("table", torch.randn(12, 8))
        self.fc = nn.Linear(8, 8)
        self.get_weight = Apply(lambda owner: owner.weight)
        self.get_table = Apply(lambda owner: owner.table)
        self.keep = Apply(keep)
        self.kept = Apply(lambda owner: owner.stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.keep(self, self.fc(x)) + self.get_weight(self) + self.get_table(self)
        return y + self.kept(self)


def keep(owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    owner.stored = x * 2
    return x + 1


class Direct(nn.Module):
    """Calls that hooks do not see: ``forward`` itself, and a module that is nobody's child."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.hidden = [nn.Linear(8, 8)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](self.fc.forward(x)) + self.fc(x)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.fc(x)
        return self.fc(self.frozen(x) + y)


def hooked() -> nn.Module:
    """A model with hooks of its user's own, which change inputs and outputs."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    module[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    module[1].register_forward_hook(lambda _, __, output: (output + 2) * 5)
    return module


def normalized() -> nn.Module:
    """Parametrized weights: their modules are called too."""
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        states = []
        for position in range(x.shape[1]):
            state = self.cell(x[:, position], state)
            states.append(state)
        y = torch.stack(states, 1)
        attended, _ = self.attention(y, y, y)
        return self.layer(attended)


VECTORS = noise(12, 8)
IMAGES = noise(2, 3, 10, 10)
SHAPES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "nested": (Nested, VECTORS),
    "shared": (Shared, VECTORS),
    "pass_through": (PassThrough, VECTORS),
    "in_place": (InPlace, VECTORS),
    "stored": (Stored, VECTORS),
    "direct": (Direct, VECTORS),
    "frozen": (Frozen, VECTORS),
    "hooked": (hooked, VECTORS),
    "normalized": (normalized, VECTORS),
    "channels_first": (convolutional, IMAGES),
    "channels_last": (
        lambda: convolutional().to(memory_format=torch.channels_last),
        IMAGES.to(memory_format=torch.channels_last),
    ),
    "recurrent": (Recurrent, noise(2, 5, 8)),
    "one_layer": (lambda: nn.Linear(8, 3), VECTORS),
    "one_element": (lambda: nn.Linear(8, 1), noise(1, 8)),
    "no_parameters": (nn.Tanh, VECTORS),
}


# Those that a compiler changes: what is in place, unused, or passed on.
COMPILED = ("nested", "pass_through", "in_place", "stored", "frozen", "channels_last")


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        *[(shape, "eager") for shape in SHAPES],
        *[(shape, "aot_eager") for shape in COMPILED],
        *slow_pairs(
            *[(shape, "aot_eager") for shape in SHAPES if shape not in COMPILED],
            *[(shape, "inductor") for shape in SHAPES],
        ),
    ],
)
def test_awkward_modules(shape: str, backend: str) -> None:
    build, inputs = SHAPES[shape]
    module = build().train(backend != "inductor")
    check(module, on(inputs), backend=backend)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_compiled_module_inside_a_compiled_module(backend: str) -> None:
    inner = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="eager")
    check(nn.Sequential(inner, nn.Linear(8, 4)), on(VECTORS), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_models_of_other_precisions(backend: str, dtype: torch.dtype) -> None:
    module = perceptron().to(dtype).train(backend != "inductor")
    check(module, on(VECTORS.to(dtype)), backend=backend, allowed=tolerance(backend, dtype))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *[("Sequential", "eager"), ("Sequential", "aot_eager")],
        *slow_pairs(
            *[("GPT2LMHeadModel", "eager"), ("GPT2LMHeadModel", "aot_eager")],
            *[("Sequential", "inductor"), ("GPT2LMHeadModel", "inductor")],
        ),
    ],
)
def test_autocast(name: str, backend: str) -> None:
    case = CASES[name]
    batch = case.batch()

    def call(model: nn.Module) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)

    module = case.build().train(backend != "inductor")
    check(module, call, backend=backend, allowed=tolerance(backend, torch.bfloat16))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        *[("eager", None), ("eager", True)],
        *slow_pairs(
            ("eager", False),
            *[("aot_eager", dynamic) for dynamic in (True, None, False)],
            *[("inductor", dynamic) for dynamic in (True, None, False)],
        ),
    ],
)
def test_two_sequence_lengths(backend: str, dynamic: bool | None) -> None:
    module = Checkpointed("none", layers=1).train(backend != "inductor")
    short, long = on(tokens(1, length=9)), on(tokens(2, length=17))
    check(module, short, long, short, backend=backend, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("backend", backends("aot_eager", "inductor"))
@pytest.mark.parametrize("name", [case.name for case in CORE if "input_ids" in case.batch()])
def test_two_sequence_lengths_of_transformers(
    name: str, backend: str, dynamic: bool | None
) -> None:
    module = CASES[name].build().train(backend != "inductor")
    short, long = (call_with(language(seed, length=length)) for seed, length in ((1, 9), (2, 17)))
    check(module, short, long, short, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize("backend", EAGER)
def test_micro_batches_of_different_sizes_are_joined(backend: str) -> None:
    module = perceptron().train(backend != "inductor")
    batches = (noise(6, 8), noise(3, 8, seed=1) * 9 + 5, noise(1, 8, seed=2) - 40)
    check(module, *map(on, batches), backend=backend)
    check(convolutional(), on(IMAGES), on(IMAGES[:, :, :7] + 3), backend=backend)


@pytest.mark.parametrize("backend", EAGER)
def test_a_nan_of_one_micro_batch_is_seen_in_the_step(backend: str) -> None:
    batches = (noise(6, 8), noise(3, 8) * math.nan, noise(2, 8) * math.inf, noise(4, 8))
    for chosen in (batches, batches[1::-1], batches[:1] + batches[2:]):
        check(nn.Sequential(nn.Linear(8, 8)), *map(on, chosen), backend=backend)
        torch._dynamo.reset()


# Each model with one pause, each pause in some model, and one under a compiler.
QUICK_BREAKS = (
    *[(model, "print", "eager") for model in BREAKING if model not in ("pairs", "disabling")],
    *[("blocks", "item", "eager"), ("pairs", "graph_break", "eager")],
    ("disabling", "print", "aot_eager"),
)
BREAKS = [
    (model, pause, backend)
    for backend in ("aot_eager", "eager", "inductor")
    for model in BREAKING
    for pause in PAUSES
]


@pytest.mark.parametrize(
    ("model", "pause", "backend"),
    [*QUICK_BREAKS, *slow_pairs(*[one for one in BREAKS if one not in QUICK_BREAKS])],
)
def test_graph_breaks_credit_the_right_block(model: str, pause: str, backend: str) -> None:
    module = BREAKING[model](PAUSES[pause]).train(backend != "inductor")
    # A second size is compiled again, with dynamic shapes, which takes long.
    is_quick = (model, pause, backend) in QUICK_BREAKS and (model, pause) != ("blocks", "print")
    second = VECTORS.flip(0) * 2 if is_quick else VECTORS[:5]
    check(module, on(VECTORS), on(second), backend=backend, steps=3)


def keep_going(x: torch.Tensor) -> None:
    """No break at all: each order is a graph of its own."""


@pytest.mark.parametrize(
    ("pause", "chosen"),
    [
        (print_something, [0, 1, 2]),
        pytest.param(print_something, [2, 1, 0], marks=pytest.mark.slow),
        (keep_going, [1, 2]),
    ],
)
@pytest.mark.parametrize("backend", EAGER)
def test_blocks_in_another_order_after_compilation(
    backend: str, pause: Pause, chosen: list[int]
) -> None:
    """Graphs compiled for one block come to serve another one, in another place."""

    class Chosen(Stack):
        def forward(self, x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
            for index in order:
                x, _ = self.blocks[index](x)
            return self.head(x)

    orders = ([0, 1, 2], [2, 0], [1, 1, 0])
    calls = [lambda model, order=order: model(VECTORS, order) for order in orders]
    module = Chosen([Block(3.0**i, pause) for i in range(3)]).eval()
    check(module, *[calls[index] for index in chosen], backend=backend)


class Branches(nn.Module):
    """Modules inside of a control-flow operator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.positive = nn.Linear(8, 8)
        self.negative = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return torch.cond(y.sum() > 0, self.positive, self.negative, (y,))


def test_what_no_row_can_leave_is_named_and_not_guessed() -> None:
    module = Branches()
    recording = Recording()
    recording.add("fc", middle := module.fc(VECTORS))
    chosen = module.positive if middle.sum() > 0 else module.negative
    recording.add("[root module]", chosen(middle))
    spec = tmm.Spec(tmm.activation("rms", "mean"))
    model = tmm.instrument(torch.compile(module, backend="eager"), spec)
    with tmm.monitor(model).step(0):
        model(VECTORS)
    assert set(tmm.explain(model).unmeasured) == {"positive", "negative"}
    want = recording.expected(("rms", "mean"))
    assert_agrees(tmm.monitor(model).get_step_metrics(), want, tolerance("eager"))


# A compiler plans anew what it repeats, whichever way says so.
COUNTED = {
    "nested": "aot_eager",
    **dict.fromkeys(("each", "wrapper", "selective", "reentrant"), "eager"),
}


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        *[(way, backend) for way, backend in COUNTED.items() if way != "each"],  # as in test_ways
        *slow_pairs(
            ("each", COUNTED["each"]),
            *[
                (way, backend)
                for way in WAYS
                for backend in ("eager", "aot_eager", "inductor")
                if COUNTED[way] != backend
            ],
        ),
    ],
)
def test_recomputed_activations_count_once(way: str, backend: str) -> None:
    module = Checkpointed(way).train(backend != "inductor")
    check(module, on(tokens(0)), on(tokens(1)), backend=backend)


CHECKPOINTING = ("LlamaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", *backends(slow=CHECKPOINTING)])
@pytest.mark.parametrize("backend", EAGER)
def test_gradient_checkpointing_of_transformers(name: str, backend: str) -> None:
    case = CASES[name]
    module = case.build()
    module.gradient_checkpointing_enable()
    if backend == "inductor":
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
    check(module, call_with(case.batch()), backend=backend)


def test_the_comparison_finds_faults() -> None:
    """The tests of this file can fail: for a wrong, a missing, an exchanged, an extra value."""
    recording = record_calls(perceptron(), [on(VECTORS)])
    want = recording.expected(row_norms=row_norms)
    right = {key: expected.value for key, expected in want.items()}
    assert {name for name, *_ in (key.split("/")[::-1] for key in want)} - {"row_norms"} == set(
        tmm.METRIC_NAMES
    )
    assert (EDGES == tmm.HISTOGRAM_EDGES).all()
    allowed = tolerance("aot_eager")
    assert not disagreements(right, want, allowed)
    for key in right:
        metric = key.rpartition("/")[2]
        without = {other: value for other, value in right.items() if other != key}
        assert disagreements(without, want, allowed) == [f"missing: {key}"]
        wrong = dict(right)
        if metric == "histogram":
            wrong[key] = np.roll(right[key], 1)
        elif metric in COUNTS or right[key] == 0:
            wrong[key] += 1
        else:
            wrong[key] += 2e-5 * want[key].scale
        assert len(disagreements(wrong, want, allowed)) == 1, key
    extra = right | {"activation/0.0/rms": 1.0}
    assert disagreements(extra, want, allowed) == ["superfluous: activation/0.0/rms = 1.0"]
    exchanged = right | {"activation/0/rms": right["activation/2/rms"]}
    assert len(disagreements(exchanged, want, allowed)) == 1
