"""Each way of compiling a model gives the rows that eager hooks see, for many architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import (
    Call,
    assert_agrees,
    disagreements,
    record_calls,
    run_calls,
    tolerance,
    walk,
)
from tests.model_zoo import (
    BREAKING,
    CASES,
    PAUSES,
    Batch,
    Block,
    Case,
    Checkpointed,
    InPlace,
    Pause,
    convolutional,
    noise,
    tokens,
)
from tests.model_zoo import WAYS as CHECKPOINTING
from tests.truth_table import PROPERTY, Line
from tests.ways import WAYS, Callee, Counting, NoBlocksError, Way, call, graph_breaks

METRICS = ("mean", "rms", "absmax", "zero_fraction")
STEPS = 2
BACKEND = "aot_eager"

RecordProperty = Callable[[str, object], None]


def row_norms(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)  # type: ignore[no-any-return]


def spec() -> tmm.Spec:
    return tmm.Spec(tmm.activation(*METRICS), tmm.activation(row_norms=row_norms))


def another(batch: Batch) -> Batch:
    """Other values of the same shapes: what is left from the first call shows."""
    known: dict[int, torch.Tensor] = {}  # one tensor under two names remains one: it is guarded on

    def changed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        other = value * -1.5 + 0.1 if value.is_floating_point() else value.roll(1, -1)
        return known.setdefault(id(value), other)

    return {name: changed(value) for name, value in batch.items()}


def build(case: Case) -> nn.Module:
    module = case.build()
    module.zero_grad()  # a parameter of a class has those of the modules before
    return module


def calls_of(case: Case, outputs: list[object] | None = None) -> list[Call]:
    """Two micro-batches; what the model returns for them is added to ``outputs``."""

    def run(batch: Batch, model: Callee) -> object:
        output = call(model, batch)
        if outputs is not None:
            outputs.append(output)
        return output

    first = case.batch()
    return [partial(run, first), partial(run, another(first))]


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:120]


class NotAccepted(Exception):  # noqa: N818 - says what torch.compile did, not that tmm failed
    """Plain torch.compile does not run this model in this way."""


def count_plain_graphs(case: Case, module: nn.Module, way: Way) -> tuple[int, int]:
    """Graphs and graph breaks of the program without monitoring.

    Its graphs stay cached while the twin compiles, as they do in a training; how many they are
    is settled before a backend sees them.
    """
    backend = Counting("eager")
    before = graph_breaks()
    try:
        run_calls(way.apply(copy.deepcopy(module), backend), calls_of(case))
    except Exception as error:
        raise NotAccepted(first_line(error)) from error
    return backend.graphs, graph_breaks() - before


def compare(case: Case, way: Way, backend: str, record_property: RecordProperty) -> None:
    """Run steps of two micro-batches, against eager hooks on a copy; hand over a line of it."""
    module = build(case)
    original, reference = copy.deepcopy(module), copy.deepcopy(module)
    put = partial(Line, case.name, way.name)
    plain, breaks = 0, 0
    try:
        if way.compiled:
            plain, breaks = count_plain_graphs(case, module, way)
    except NotAccepted as reason:
        refusal = "no blocks" if isinstance(reason.__cause__, NoBlocksError) else None
        result = refusal or f"not accepted by torch.compile: {reason}"
        record_property(PROPERTY, put(result=result).handed_over())
        pytest.skip(result)

    model = way.instrument(module, backend, spec())
    monitor = tmm.monitor(model)
    rows, faults, remark = 0, [], ""
    outputs: list[object] = []
    for step in range(STEPS):
        with monitor.step(step):
            run_calls(model, calls_of(case, outputs), seed=step)
        recording = record_calls(reference, calls_of(case), seed=step)
        want = recording.expected(METRICS, row_norms=row_norms)
        rows += len(want)
        faults += disagreements(monitor.get_step_metrics(), want, tolerance(backend))
        unmeasured = tmm.explain(model).unmeasured
        faults += [f"unmeasured: {name}" for name in set(unmeasured) ^ recording.integers]

    if not way.compiled:
        remark, wrong = other_bits(case, original, everything(outputs, module))
        faults += wrong

    explanation = tmm.explain(model)
    twin = len(explanation.graphs)
    shown = f"{plain}/{twin}" if way.compiled else f"-/{twin}"
    if breaks:
        shown += f" ({breaks} breaks)"
    elif way.compiled and twin > plain and not leaves_parts_alone(model):
        faults.append(f"{twin} graphs of the twin, {plain} of the plain program")
    eager = f"{len(explanation.eager)} of {len(explanation.modules)}"
    result = f"{len(faults)} FAULTS" if faults else f"agrees{remark}"
    record_property(PROPERTY, put(rows, shown, eager, result).handed_over())
    assert not faults, f"{len(faults)} faults in {rows} rows:\n" + "\n".join(faults[:12])
    assert rows


def leaves_parts_alone(model: Callee) -> bool:
    """Whether a module that torch itself defines was compiled in place: Dynamo never traces it.

    The plain program runs it eagerly then, without a graph.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(
        module._compiled_call_impl is not None and type(module).__module__.startswith("torch.nn.")
        for module in modules
    )


def everything(outputs: list[object], module: nn.Module) -> list[torch.Tensor]:
    """What a program computed: its outputs and the gradients."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [*(tensor for _, tensor in walk(outputs)), *gradients]


def other_bits(case: Case, original: nn.Module, got: list[torch.Tensor]) -> tuple[str, list[str]]:
    """Whether tracing changed a single bit: a remark, and what is wrong.

    Some models (Mamba) choose another algorithm when they are traced, which rounds otherwise.
    Then it is torch.compile with the eager backend, unmonitored, that must be matched.
    """

    def differing(traced: bool) -> int:
        outputs: list[object] = []
        module = copy.deepcopy(original)
        model: Callee = torch.compile(module, backend="eager") if traced else module
        for step in range(STEPS):
            run_calls(model, calls_of(case, outputs), seed=step)
        pairs = zip(got, everything(outputs, module), strict=True)
        return sum(not torch.equal(ours, theirs) for ours, theirs in pairs)

    if not (count := differing(traced=False)):
        return "", []
    if not differing(traced=True):
        return " (rounds as torch.compile with backend='eager' does)", []
    return "", [f"{count} outputs and gradients are not those of the plain program"]


def handwritten() -> Iterator[Case]:
    for name, build in BREAKING.items():
        for pause in ("graph_break", "item"):
            make = partial(build, PAUSES[pause])
            yield Case(f"{name} ({pause})", make, lambda: {"x": noise(12, 8)})
    yield Case("convolutional", convolutional, lambda: {"input": noise(2, 3, 10, 10)})
    yield Case("in place", InPlace, lambda: {"x": noise(12, 8)})
    for way in (*CHECKPOINTING, "none"):
        yield Case(f"checkpointed ({way})", partial(Checkpointed, way), lambda: {"ids": tokens()})


HANDWRITTEN = {case.name: case for case in handwritten()}

# Of each kind of architecture; all others are compared under one way each, by turns.
THOROUGH = (
    *("Sequential", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"),
    *("Gemma2ForCausalLM", "MistralForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM"),
    *("OPTForCausalLM", "BloomForCausalLM"),
    *("BertForMaskedLM", "AlbertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"),
    *("DebertaV2ForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"),
    *("MixtralForCausalLM", "Qwen2MoeForCausalLM"),
    *("MambaForCausalLM", "Mamba2ForCausalLM"),
    *("ViTForImageClassification", "ResNetForImageClassification", "SwinForImageClassification"),
    *("ConvNextForImageClassification", "Dinov2ForImageClassification"),
    *("SegformerForImageClassification", "ViTMAEForPreTraining"),
    *("WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "CLIPModel"),
)
# Faults lie in models or in ways, seldom in both: each way sees a plain model, under a compiler,
# and an awkward one; every other model one way, GPT-2 and T5 in test_truth.
ALWAYS = {"Sequential": BACKEND, "tied (graph_break)": "eager"}
ONCE = {
    "LlamaForCausalLM": "blocks in place",
    "BertForMaskedLM": "in place",
    "ViTForImageClassification": "compiled step",
    "convolutional": "blocks wrapped",
    "checkpointed (each)": "blocks in place",
    "blocks (graph_break)": "in place",
    "in place": "not compiled",
}


def combinations() -> list[Any]:
    parameters = []
    for index, (name, case) in enumerate({**CASES, **HANDWRITTEN}.items()):
        ways = list(WAYS)
        if name not in THOROUGH and name not in HANDWRITTEN:
            ways = [ways[index % len(ways)]]
        for way in ways:
            quick = ALWAYS.get(name) or ("eager" if ONCE.get(name) == way else None)
            for backend in dict.fromkeys((quick or BACKEND, BACKEND)):
                marks = () if backend == quick else (pytest.mark.slow,)
                identity = f"{name}-{way}-{backend}".replace(" ", "_")
                parameters.append(pytest.param(case, WAYS[way], backend, marks=marks, id=identity))
    return parameters


@pytest.mark.parametrize(("case", "way", "backend"), combinations())
def test_every_way_agrees_with_eager_hooks(
    case: Case, way: Way, backend: str, record_property: RecordProperty
) -> None:
    compare(case, way, backend, record_property)


class Shuffled(nn.Module):
    """Runs its blocks in the order that it is told; their weights are of different scales."""

    def __init__(self, count: int, pause: Pause) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(10 ** (i / count), pause) for i in range(count))

    def forward(self, x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        for index in order:
            x, _ = self.blocks[index](x)
        return x


def orders(count: int) -> list[list[int]]:
    """All blocks in another order for each call, and lastly some of them, one of these twice."""
    generator = torch.Generator().manual_seed(count)
    shuffled = [torch.randperm(count, generator=generator).tolist() for _ in range(6)]
    return [*shuffled, [*range(0, count, 2), 0], [count - 1]]


def graphs_of_shuffled(way: Way, count: int, pause: Pause, backend: str) -> int:
    """Compare four steps with eager hooks; how many graphs the twin came to have."""
    torch._dynamo.reset()
    module = Shuffled(count, pause)
    reference = copy.deepcopy(module)
    model = way.instrument(module, backend, spec())
    monitor = tmm.monitor(model)
    batches = [{"x": noise(6, 8, seed=s), "order": order} for s, order in enumerate(orders(count))]
    for step in range(4):
        calls: list[Call] = [
            partial(call_with, batch) for batch in batches[2 * step : 2 * step + 2]
        ]
        with monitor.step(step):
            run_calls(model, calls, seed=step)
        want = record_calls(reference, calls, seed=step).expected(METRICS, row_norms=row_norms)
        assert_agrees(monitor.get_step_metrics(), want, tolerance(backend))
        # Were rows exchanged between blocks, it would show: no two of them are alike.
        for kind in ("[0]", ".fc", ".act", ".norm"):
            keys = [f"activation/blocks.{i}{kind}/rms" for i in range(count)]
            values = [want[key].value for key in keys if key in want]
            assert len(set(values)) == len(values)
    assert not tmm.explain(model).unmeasured
    return len(tmm.explain(model).graphs)


def call_with(batch: Batch, callee: Callee) -> object:
    return call(callee, batch)


def keep_going(x: torch.Tensor) -> None:
    """No break at all."""


MORE_THAN_DYNAMO_RECOMPILES = 9


@pytest.mark.parametrize(
    ("pause", "backend"),
    [
        ("graph_break", "eager"),
        pytest.param("graph_break", BACKEND, marks=pytest.mark.slow),
        pytest.param("item", BACKEND, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("way", ["blocks in place", "blocks wrapped"])
def test_blocks_that_break_their_graphs_keep_their_own_rows(
    way: str, pause: str, backend: str
) -> None:
    # The parts between the breaks are graphs of their own, and are shared as well.
    few = graphs_of_shuffled(WAYS[way], 2, PAUSES[pause], backend)
    count = MORE_THAN_DYNAMO_RECOMPILES
    assert count > torch._dynamo.config.recompile_limit
    assert graphs_of_shuffled(WAYS[way], count, PAUSES[pause], backend) == few


@pytest.mark.parametrize(
    ("count", "backend"),
    [
        (MORE_THAN_DYNAMO_RECOMPILES, "eager"),
        pytest.param(48, BACKEND, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("way", ["blocks in place", "blocks wrapped"])
def test_more_blocks_need_no_more_graphs(way: str, count: int, backend: str) -> None:
    few = graphs_of_shuffled(WAYS[way], 2, keep_going, backend)
    assert count > torch._dynamo.config.recompile_limit
    assert graphs_of_shuffled(WAYS[way], count, keep_going, backend) == few <= 3
