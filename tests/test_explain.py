"""What explain says, before the first step and after, and that it is true."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.graphs import check_golden
from tmm.passes.graph.printer import Needs, _define

RMS = tmm.Spec(tmm.activation("rms"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.fc(x))
        tmm.record("gate", y, "max")
        output: torch.Tensor = self.drop(y)
        return output


@torch.compiler.disable
def outside(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = module(x)
    return output


class Model(nn.Module):
    """Two equal blocks, one module that no graph holds and one whose output has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.classes = Classes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        output: torch.Tensor = self.classes(outside(self.norm, x))
        return output


class Classes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


def without_times(explanation: tmm.Explanation) -> str:
    text = re.sub(r"\d+\.\d ms", "N ms", str(explanation))
    return re.sub(r"[^ ]*/test_explain.py:\d+", "test_explain.py:N", text) + "\n"


def test_golden() -> None:
    spec = tmm.Spec(
        tmm.activation("rms", modules="blocks|norm|classes"),
        tmm.activation(spread=lambda x: x.amax(-1) - x.amin(-1), modules=r"blocks\.\d\.fc"),
    )
    model = tmm.instrument(torch.compile(Model(), backend="eager"), spec)
    text = "before the first step\n\n" + without_times(tmm.explain(model))
    with tmm.monitor(model).step(0):
        model(torch.randn(2, 4))
    check_golden("explain", text + "\nafter\n\n" + without_times(tmm.explain(model)))


def test_compiled_blocks_share_a_graph() -> None:
    module = nn.Sequential(*[Block() for _ in range(3)], nn.Linear(4, 2))
    for block in module[:3]:
        block.compile(backend="eager", dynamic=False)
    tmm.instrument(module, RMS)
    explanation = tmm.explain(module)
    settings = "backend='eager', dynamic=False"
    assert explanation.regions == dict.fromkeys(("0", "1", "2"), settings)
    assert f"0, 1, 2: {settings}" in str(explanation)
    with torch.no_grad(), tmm.monitor(module).step(0):
        module(torch.randn(2, 4))
    explanation = tmm.explain(module)
    (graph,) = explanation.graphs
    assert graph.owner == "0"
    assert graph.rows == 4
    assert {line.measures for line in graph.after if line.inserted_by == "insert_reductions"} == {
        ("activation/fc",),
        ("record 'gate'",),
        ("activation/drop",),
        ("activation/drop", "activation/[this module]"),
    }
    assert explanation.eager == dict.fromkeys(("3", "[root module]"), "it is not compiled")
    measured = {module.name: module.measured for module in explanation.modules}
    assert measured["1.fc"] == "graph"
    assert measured["3"] == "eager"


def test_the_diff_only_adds() -> None:
    model = tmm.instrument(torch.compile(Model(), backend="eager"), RMS)
    with tmm.monitor(model).step(0):
        model(torch.randn(2, 4))
    for graph in tmm.explain(model).graphs:
        kept = [line.text for line in graph.after if not line.inserted_by]
        assert kept[:-1] == [line.text for line in graph.before][:-1]  # all but the outputs
        added = [line for line in graph.after if line.inserted_by]
        assert graph.diff.count("\n+") == len(added) + 2 * bool(added)
        for line in added:
            assert line.inserted_by in graph.seconds
            assert line.measures or line.inserted_by == "pack_rows"
        assert bool(graph.rows) == bool(graph.bytes) == bool(graph.outputs)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.block, x * torch.tensor([0.5]), use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.nn.functional.gelu((y @ torch.ones(4, 3)).clamp(max=float("inf"))).sum(-1)


@pytest.mark.parametrize("module", [Block(), Checkpointed()])
def test_the_code_of_a_graph_runs_and_computes_the_same(module: nn.Module) -> None:
    seen: list[tuple[list[torch.Tensor], object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        def run(*arguments: torch.Tensor) -> object:
            outputs = graph(*arguments)
            seen.append((list(arguments), outputs))
            return outputs

        return run

    model = tmm.instrument(torch.compile(module.train(), backend=backend), RMS)
    with tmm.monitor(model).step(0):
        model(torch.randn(2, 4))
    names: dict[str, object] = {}
    (graph,) = tmm.explain(model).graphs
    exec(graph.code, names)
    ((inputs, want),) = seen
    got = names["graph"](*inputs)  # type: ignore[operator]
    assert len(got) == len(want) == 1 + graph.outputs  # type: ignore[arg-type]
    for left, right in zip(got, want, strict=True):  # type: ignore[call-overload]
        assert torch.equal(left, right)


def test_bytes_are_those_of_the_extra_outputs() -> None:
    spec = tmm.Spec(
        tmm.activation("rms", modules=r"\[root"),
        tmm.activation(rows=lambda x: x.norm(dim=-1), aggregate=torch.median, modules=r"\[root"),
    )
    model = tmm.instrument(torch.compile(nn.Linear(4, 3), backend="eager", dynamic=True), spec)
    with tmm.monitor(model).step(0):
        model(torch.randn(6, 4))
    (graph,) = tmm.explain(model).graphs
    assert (graph.rows, graph.outputs) == (2, 2)
    assert graph.bytes == 2 * 8 + 6 * 4  # count and sum of squares; six row norms


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_trace_holds_each_graph_before_and_after_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    folder = tmp_path / "trace"
    options = {"trace": folder} if by == "argument" else {}
    if by == "environment":
        monkeypatch.setenv("TMM_TRACE", str(folder))
    for index in range(2):
        torch._dynamo.reset()
        model = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
        model = tmm.instrument(model, RMS, **options)  # type: ignore[arg-type]
        with tmm.monitor(model).step(0):
            model(torch.randn(2, 4))
        graph = folder / f"graph-{index:03}"
        passes = [
            *("join_identities", "insert_reductions"),
            *("remove_taps", "lift_rows", "pack_rows"),
        ]
        names = ["traced", *passes]
        texts = [graph / f"{i}-{name}.txt" for i, name in enumerate(names)]
        assert sorted(graph.iterdir()) == sorted([*texts, graph / "seconds.txt"])
        before, _, inserted, *_, after = (text.read_text() for text in texts)
        assert "tap(" in before
        assert "summarize" not in before
        assert "summarize" in inserted
        (report,) = tmm.explain(model).graphs
        assert after.splitlines() == [str(line) for line in report.after]
        lines = (graph / "seconds.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == passes
        assert {line.split()[0]: float(line.split()[1]) for line in lines} == pytest.approx(
            report.seconds, abs=1e-6
        )


class Nameless:
    """A callable that has no name, and whose text cannot be written."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def __repr__(self) -> str:
        raise RecursionError("of itself")

    def __getattr__(self, name: str) -> object:
        raise ValueError(name)


class Numeric(nn.Module):
    """Calls NumPy, whose functions Dynamo wraps, and a method by its descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.Tensor.mul(self.fc(x), 2.0)
        scale = np.sqrt(np.arange(4, dtype=np.float32)) + np.abs(np.float32(-1.0))
        return torch.Tensor.add(y, 1) * torch.from_numpy(scale.clip(0, 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_forward_that_calls_numpy(backend: str) -> None:
    module = Numeric()
    model = tmm.instrument(torch.compile(module, backend=backend, fullgraph=True), RMS)
    x = torch.randn(2, 4)
    with tmm.monitor(model).step(0):
        output = model(x)
    assert torch.equal(output, torch.compile(module, backend=backend)(x))
    values = tmm.monitor(model).get_step_metrics()
    rms = module.fc(x).detach().square().mean().sqrt().item()
    assert values["activation/fc/rms"] == pytest.approx(rms, rel=1e-6)
    (graph,) = tmm.explain(model).graphs
    compile(graph.code, "graph", "exec")
    assert not tmm.explain(model).notes


def test_the_code_of_a_graph_imports_whatever_it_calls() -> None:
    wrapped = torch._dynamo.utils.numpy_to_tensor_wrapper(torch._numpy.sqrt)
    method = torch._dynamo.utils.numpy_method_wrapper("clip")
    functions = (torch.relu, torch.Tensor.abs, functools.partial(torch.add, other=1), wrapped)
    needs = Needs(set(), {})
    for index, function in enumerate((*functions, method, Nameless())):
        _define(f"f{index}", function, needs)
    space: dict[str, Any] = {}
    exec("\n".join([*sorted(needs.imports), *needs.definitions]), space)
    x = torch.tensor([-4.0, 4.0])
    for index, function in enumerate(functions[:3]):
        assert torch.equal(space[f"f{index}"](x), function(x))
    assert torch.equal(space["f3"](x.abs()), x.abs().sqrt())
    assert space["f4"].method == "clip"
    assert space["f5"] is None


def test_what_only_explains_does_not_break_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> str:
        raise AttributeError("no name")

    for name in ("node_lines", "runnable_code", "_extra_bytes", "end_of_graph"):
        monkeypatch.setattr(f"tmm.instrumentation.graph_report.{name}", fails)
    monkeypatch.setattr("tmm.instrumentation.pass_trace.node_lines", fails)
    monkeypatch.setattr(tmm.Explanation, "__str__", fails)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = torch.compile(module, backend="eager")
    tmm.instrument(model, RMS, run=tmp_path / "run", trace=tmp_path / "trace")
    monitor = tmm.monitor(model)
    x = torch.randn(2, 4)
    with monitor.step(0):
        model(x)
    rms = module[0](x).detach().square().mean().sqrt().item()
    assert monitor.get_step_metrics()["activation/0/rms"] == pytest.approx(rms, rel=1e-6)
    notes = tmm.explain(model).untold
    assert any("graph 0, of [root module]: AttributeError: no name" in note for note in notes)
    assert any("explain.txt" in note for note in notes)
    monkeypatch.undo()
    assert "not told here:" in str(tmm.explain(model))
    tmm.remove(model)


@pytest.mark.parametrize("compiled", [True, False])
def test_how_own_functions_are_computed(compiled: bool) -> None:
    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x**2).mean()

    def middle(x: torch.Tensor) -> torch.Tensor:
        return x.median()

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    called = torch.compile(model, backend="aot_eager") if compiled else model
    rules = (tmm.activation("rms", energy=energy, middle=middle), tmm.gradient("norm"))
    tmm.instrument(called, tmm.Spec(*rules))
    assert not [name for name in tmm.explain(called).notes if name.startswith("own")]
    with tmm.monitor(called).step(0):
        called(torch.ones(2, 4))
    notes = tmm.explain(called).notes
    told = {name: notes.get(f"own metric {name}", "") for name in ("energy", "middle", "rms")}
    if compiled:
        assert "one that tmm knows" in told["energy"]
        assert "read each tensor once more" in told["middle"]
    else:
        assert told["energy"] == told["middle"]
        assert "called for each tensor" in told["energy"]
    assert not told["rms"]
    assert "own metric middle" in str(tmm.explain(called))
