"""Each pass: it matches, leaves the rest alone, is idempotent, keeps metadata; and its golden text.

Small passes over the same few graphs share this file; the golden texts are in ``golden``.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from tests.graphs import NOTHING, applied, check_golden, measure, text, trace
from tmm.core.metrics import HISTOGRAM_EDGES, Reduction, builtin_reductions, function_reduction
from tmm.kernels.ops import summarize, tap, tap_value
from tmm.passes.findings import GraphFindings
from tmm.passes.fuse_reductions import fuse_reductions
from tmm.passes.graph.attended import is_only_attended
from tmm.passes.graph.between_products import is_between_products
from tmm.passes.graph.copy import copy_graph
from tmm.passes.graph.edits import add_placeholder
from tmm.passes.graph.printer import node_lines
from tmm.passes.graph.provenance import all_nodes, pass_of, sites_of
from tmm.passes.graph.slots import slots_of
from tmm.passes.graph.values import set_value
from tmm.passes.insert_gradient_probes import insert_probes
from tmm.passes.insert_reductions import insert_reductions
from tmm.passes.lift_rows import lift_rows
from tmm.passes.metrics.gradient_probe import probe
from tmm.passes.metrics.trace import MetricFunctionError
from tmm.passes.pack_rows import pack_rows
from tmm.passes.pipeline import PassError, passes_left_out, rewrite
from tmm.passes.remove_evaluations import is_evaluation, remove_evaluations, runs_without_gradients
from tmm.passes.remove_taps import remove_taps
from tmm.passes.request import GraphRequest


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(self.fc, x, use_reentrant=False)
        return output * 2


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))


X = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0], [2.0, 2.0]])


def nothing(_: str, __: torch.dtype) -> tuple[Reduction, ...]:
    return ()


def test_copy_graph_leaves_the_original_alone() -> None:
    original = trace(Checkpointed(), X)
    before = text(original)
    copied = copy_graph(original)
    assert text(copied) == before
    applied(remove_taps, copied)
    assert text(original) == before
    assert text(copied) != before


def test_copy_graph_keeps_metadata() -> None:
    original = trace(in_place(), X)
    copied = copy_graph(original)
    for ours, theirs in zip(copied.graph.nodes, original.graph.nodes, strict=True):
        assert ours is not theirs
        assert ours.meta.keys() == theirs.meta.keys()


def test_insert_reductions_golden() -> None:
    module = in_place()
    graph = trace(module, X)
    before = text(graph)
    options = measure(module, "rms", "histogram", l2=lambda x: x.norm(dim=-1))
    assert applied(insert_reductions, graph, options).unmeasured == []
    check_golden("insert_reductions", before + "\n# becomes\n\n" + text(graph))


def test_insert_reductions_measures_before_an_in_place_operation() -> None:
    module = in_place()
    graph = trace(module, X)
    applied(insert_reductions, graph, measure(module, "min"))
    nodes = list(graph.graph.nodes)
    (relu,) = (n for n in nodes if n.target is torch.nn.functional.relu)
    rows = [n for n in nodes if slots_of(n)]
    assert [nodes.index(row) < nodes.index(relu) for row in rows] == [True, False]


def test_insert_reductions_shares_rows_of_one_tensor() -> None:
    module = in_place()
    graph = trace(module, X)
    applied(insert_reductions, graph, measure(module, "rms"))
    rows = [n for n in graph.graph.nodes if slots_of(n)]
    sites = [[slot.measurement.site.module for slot in slots_of(row)] for row in rows]
    assert sites == [["0"], ["1", ""]]


class PassThroughThenChanged(nn.Module):
    """The child's output is the root's, but changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        y.mul_(2)
        return y


def test_insert_reductions_does_not_share_rows_across_a_change() -> None:
    module = PassThroughThenChanged()
    graph = trace(module, X)
    applied(insert_reductions, graph, measure(module, "rms"))
    assert len([n for n in graph.graph.nodes if slots_of(n)]) == 2


def test_insert_reductions_is_idempotent_and_leaves_unselected_graphs_alone() -> None:
    module = Checkpointed()
    graph = trace(module, X)
    options = measure(module, "rms")
    untouched = text(graph)
    applied(insert_reductions, graph, GraphRequest(options.modules, nothing))
    assert text(graph) == untouched

    graph = trace(module, X)
    applied(insert_reductions, graph, options)
    once = text(graph)
    applied(insert_reductions, graph, options)
    assert text(graph) == once


def test_insert_reductions_reports_integer_outputs() -> None:
    class Integers(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.argmax(-1), x * 2

    module = Integers()
    graph = trace(module, X)
    ((site, reason),) = applied(insert_reductions, graph, measure(module, "rms")).unmeasured
    assert (site.module, site.path, reason) == ("", "[0]", "int64 output")


def test_remove_taps_golden() -> None:
    graph = trace(Checkpointed(), X)
    before = text(graph)
    applied(remove_taps, graph)
    after = text(graph)
    check_golden("remove_taps", before + "\n# becomes\n\n" + after)
    applied(remove_taps, graph)
    assert text(graph) == after


def test_lift_rows_golden() -> None:
    module = Checkpointed()
    graph = trace(module, X)
    applied(insert_reductions, graph, measure(module, "rms"))
    applied(remove_taps, graph)
    before = text(graph)
    applied(lift_rows, graph)
    after = text(graph)
    check_golden("lift_rows", before + "\n# becomes\n\n" + after)
    sites = [s.measurement.site.module for n in graph.graph.nodes for s in slots_of(n)]
    assert sites == ["fc", ""]
    applied(lift_rows, graph)
    assert text(graph) == after


@pytest.mark.parametrize("module", [in_place(), Checkpointed()], ids=["plain", "nested"])
def test_fuse_reductions_golden(module: torch.nn.Module) -> None:
    graph = trace(module, X)
    asked = replace(measure(module, "std", "absmax"), fuses=True, lowering="fused")
    applied(insert_reductions, graph, asked)
    applied(remove_taps, graph)
    before = text(graph)
    found = applied(fuse_reductions, graph, asked)
    after = text(graph)
    check_golden(
        f"fuse_reductions_{type(module).__name__.lower()}", before + "\n# becomes\n\n" + after
    )
    assert found.lowerings
    assert not any(why for *_, why in found.lowerings)
    assert not applied(fuse_reductions, graph, asked).lowerings
    assert text(graph) == after


def test_small_tensors_are_read_together_but_what_is_overwritten_later() -> None:
    module = in_place()
    graph = trace(module, X)
    asked = replace(measure(module, "std", "absmax"), fuses=True)
    applied(insert_reductions, graph, asked)
    applied(remove_taps, graph)
    found = applied(fuse_reductions, graph, asked)
    assert [(site.module, why.split(":")[0]) for _, site, why in found.lowerings] == [
        ("0", "overwritten later"),
        ("1", "small"),
        ("", "small"),
    ]


@pytest.mark.parametrize("module", [in_place(), Checkpointed()], ids=["plain", "nested"])
def test_rows_that_are_fused_are_those_of_operators(module: torch.nn.Module) -> None:
    asked = measure(module, "std", "min", own=lambda x: x.abs().sum())
    numbers = []
    for lowering in ("operator", "fused", "auto"):
        graph = trace(module, X)
        rewritten = rewrite(graph, replace(asked, fuses=True, lowering=lowering))
        outputs = rewritten.module(X, *module.parameters())[-rewritten.layout.outputs :]
        numbers.append(
            {
                (slot.measurement.site, slot.measurement.reduction): outputs[slot.output][
                    list(slot.indices)
                ]
                for slot in rewritten.layout.slots
            }
        )
    operators, *others = numbers
    for other in others:
        assert operators.keys() == other.keys()
        for key, row in operators.items():
            torch.testing.assert_close(other[key], row, rtol=1e-6, atol=1e-9)


def test_pack_rows_golden() -> None:
    module = in_place()
    graph = trace(module, X)
    applied(insert_reductions, graph, measure(module, "rms"))
    applied(remove_taps, graph)
    before = text(graph)
    layout = applied(pack_rows, graph).layout
    after = text(graph)
    check_golden("pack_rows", before + "\n# becomes\n\n" + after)
    assert layout.outputs == 1
    assert [(r.measurement.site.module, r.indices) for r in layout.slots] == [
        ("0", (0, 1)),
        ("1", (2, 3)),
        ("", (2, 3)),
    ]
    assert applied(pack_rows, graph).layout.outputs == 0
    assert text(graph) == after


@pytest.mark.parametrize("module", [in_place(), Checkpointed()], ids=["plain", "nested"])
def test_rows_written_in_place_are_those_that_are_joined(module: torch.nn.Module) -> None:
    asked = measure(module, "rms", "min", own=lambda x: x.abs().sum())
    layouts, found, texts = [], [], []
    for in_place_too in (False, True):
        graph = trace(module, X)
        rewritten = rewrite(graph, replace(asked, writes_in_place=in_place_too))
        layouts.append(rewritten.layout)
        found.append(rewritten.module(X, *module.parameters())[-1])
        texts.append(text(rewritten.module))
    assert layouts[0] == layouts[1]
    assert torch.equal(*found)
    assert "pack" not in texts[1]
    assert "summarize_into" in texts[1]
    assert ("tmm.put" in texts[1]) == isinstance(module, Checkpointed)
    check_golden(f"write_rows_{type(module).__name__.lower()}", texts[1])


def test_pack_rows_leaves_a_graph_without_measurements_alone() -> None:
    graph = trace(in_place(), X)
    before = text(graph)
    layout = applied(pack_rows, graph).layout
    assert (layout.slots, layout.outputs) == ((), 0)
    assert text(graph) == before


def test_rewrite_gives_the_outputs_and_then_the_rows() -> None:
    module = in_place()
    graph = trace(module, X)
    rewritten = rewrite(graph, measure(module, "min", "max"))
    parameters = list(module.parameters())
    output, packed = rewritten.module(X, *parameters)
    linear = torch.nn.functional.linear(X, *parameters)
    linear = linear.detach()
    expected = [12, linear.min(), linear.max(), 12, linear.relu().min(), linear.relu().max()]
    assert torch.equal(output, linear.relu())
    assert packed.tolist() == [float(value) for value in expected]
    assert not rewritten.module.graph.find_nodes(op="call_function", target=tap)
    assert list(rewritten.seconds) == [
        *("join_identities", "insert_reductions", "remove_taps", "lift_rows", "pack_rows")
    ]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sum().item(), "cannot be traced"),
        (lambda x: x * torch.rand_like(x), "random numbers"),
        (lambda x: x @ torch.ones(7), "cannot be traced"),
        (lambda x: "text", "neither a number nor a tensor"),
    ],
)
def test_rewrite_names_a_function_that_cannot_be_traced(function: object, reason: str) -> None:
    module = in_place()
    graph = trace(module, X)
    with pytest.raises(MetricFunctionError, match=f"'mine'.*{reason}"):
        rewrite(graph, measure(module, mine=function))


def test_a_function_that_captures_a_tensor_is_refused() -> None:
    module = in_place()
    direction = torch.ones(3)
    graph = trace(module, X)
    with pytest.raises(MetricFunctionError, match="'projection'.*outside"):
        rewrite(graph, measure(module, projection=lambda x: x @ direction))


def test_a_function_that_changes_its_argument_gets_a_copy() -> None:
    module = in_place()
    graph = trace(module, X)
    rewritten = rewrite(graph, measure(module, largest=lambda x: x.mul_(100).amax()))
    output, packed = rewritten.module(X, *module.parameters())
    assert torch.equal(output, module(X))
    assert packed[1] == module[0](X).mul(100).amax()


def test_a_fault_of_a_pass_names_the_pass() -> None:
    module = in_place()
    graph = trace(module, X)

    def select(_: str, __: torch.dtype) -> tuple[Reduction, ...]:
        raise KeyError("broken")

    options = GraphRequest(measure(module).modules, select)
    with pytest.raises(
        PassError, match="pass insert_reductions failed.*passes before it: join_identities"
    ):
        rewrite(graph, options)


def test_passes_can_be_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Checkpointed()
    request = replace(measure(module, "rms"), select_gradient=probes(module, "rms").select_gradient)
    whole = rewrite(trace(module, X.requires_grad_()), request)
    assert whole.row_inputs
    without = rewrite(trace(module, X.requires_grad_()), request, without=["insert_probes"])
    assert list(without.seconds) == [name for name in whole.seconds if name != "insert_probes"]
    assert without.layout == whole.layout
    assert not without.row_inputs
    monkeypatch.setenv("TMM_PASSES", "-insert_probes, -insert_reductions")
    assert not rewrite(trace(module, X.requires_grad_()), request).layout.slots


@pytest.mark.parametrize("name", ["insert_everything", "pack_rows"])
def test_passes_that_cannot_be_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be left out; choose among -join"):
        passes_left_out(f"-{name}")


class Recorded(nn.Module):
    """Records its input by name and overwrites it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tap_value(x, "input")
        tap_value(x, "all")
        return x.add_(1)


def test_values_recorded_by_name_are_measured_where_they_are_recorded() -> None:
    values = {
        "input": function_reduction("", torch.clone, "max"),
        "all": function_reduction("", torch.clone, torch.median),
    }
    graph = trace(Recorded(), X.clone())
    rewritten = rewrite(graph, GraphRequest({}, nothing, values))
    assert [row.measurement.site.module for row in rewritten.layout.slots] == ["input", "all"]
    _, packed, whole = rewritten.module(X.clone())
    assert packed.tolist() == [X.numel(), X.max()]
    assert torch.equal(whole, X.reshape(-1))


def test_each_device_has_a_packed_output_of_its_own() -> None:
    graph = Graph()
    rms = builtin_reductions(("rms",), is_complex=False)
    with FakeTensorMode():
        for index, device in enumerate(("cpu", "cuda", "cpu")):
            node = graph.placeholder(f"x{index}")
            node.meta["example_value"] = torch.empty(4, 2, device=device)
            mark = graph.call_function(tap, (node, ""))
            mark.meta["nn_module_stack"] = {"7": ("", nn.Module)}
        graph.output((node,))
        module = GraphModule(nn.Module(), graph)
        layout = rewrite(module, GraphRequest({7: "fc"}, lambda *_: rms)).layout
    assert layout.outputs == 2
    assert [(row.output, row.indices) for row in layout.slots] == [
        (0, (0, 1)),
        (1, (0, 1)),
        (0, (2, 3)),
    ]


def test_inserted_nodes_name_their_pass_and_their_site() -> None:
    seen: list[tuple[str, int]] = []
    module = Checkpointed()
    rewritten = rewrite(
        trace(module, X.requires_grad_()),
        measure(module, "rms"),
        watch=lambda name, module, seconds: seen.append((name, len(list(all_nodes(module))))),
    )
    assert [name for name, _ in seen] == list(rewritten.seconds)
    traced = [node for node in all_nodes(rewritten.module) if pass_of(node) is None]
    assert not any(sites_of(node) for node in traced)
    inserted = [node for node in all_nodes(rewritten.module) if pass_of(node) is not None]
    assert {pass_of(node) for node in inserted} == {"insert_reductions", "lift_rows", "pack_rows"}
    for node in inserted:
        assert bool(sites_of(node)) == (pass_of(node) != "pack_rows")


def test_the_text_of_a_graph_has_a_line_for_each_node() -> None:
    graph = trace(Checkpointed(), X.requires_grad_())
    nodes = list(all_nodes(graph))
    marks = [node for node in nodes if node.target is tap]
    assert marks
    assert len(node_lines(graph)) == len(nodes) - len(marks)
    assert len(node_lines(graph, taps=True)) == len(nodes)
    nested = [line.text for line in node_lines(graph) if line.text.startswith("    ")]
    assert nested[-1].startswith("    return (")


def probes(module: nn.Module, *metrics: str) -> GraphRequest:
    names = {id(child): name for name, child in module.named_modules()}

    def select(_: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
        return builtin_reductions(metrics, is_complex=dtype.is_complex)

    return GraphRequest(names, nothing, select_gradient=select)


def test_insert_probes_golden() -> None:
    module = in_place()
    graph = copy_graph(trace(module, X))
    before = text(graph)
    (rows,) = applied(insert_probes, graph, probes(module, "rms", "histogram")).row_inputs
    assert rows.length == 2 * (2 + len(HISTOGRAM_EDGES))
    assert [row.measurement.site.module for row in rows.layout.slots] == [
        "0",
        "0",
        "1",
        "",
        "1",
        "",
    ]
    check_golden("insert_probes", before + "\n# becomes\n\n" + text(graph))


def test_insert_probes_leaves_graphs_without_gradients_alone() -> None:
    module = in_place().requires_grad_(False)
    graph = copy_graph(trace(module, X.detach()))
    before = text(graph)
    assert applied(insert_probes, graph, probes(module, "rms")) == GraphFindings()
    assert text(graph) == before
    module.requires_grad_(True)
    graph = copy_graph(trace(module, X.detach()))
    assert (
        applied(insert_probes, graph, GraphRequest({}, nothing, select_gradient=nothing))
        == GraphFindings()
    )


def test_insert_probes_copies_what_is_overwritten_or_returned() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2), nn.Linear(2, 2))
    graph = copy_graph(trace(module, X.detach()))
    applied(insert_probes, graph, probes(module, "rms"))
    found = graph.graph.find_nodes(op="call_function", target=probe)
    assert [node.args[4] for node in found] == [True, True, False, True]


def test_insert_probes_reaches_into_checkpoints_and_is_idempotent() -> None:
    module = Checkpointed()
    graph = copy_graph(trace(module, X.detach().requires_grad_()))
    (rows,) = applied(insert_probes, graph, probes(module, "norm")).row_inputs
    assert [row.measurement.site.module for row in rows.layout.slots] == ["fc", ""]
    after = text(graph)
    assert applied(insert_probes, graph, probes(module, "norm")) == GraphFindings()
    assert text(graph) == after
    nested = [node for node in all_nodes(graph) if node.target is probe]
    assert len(nested) == 2
    for node in nested:
        assert sites_of(node)


def test_inputs_that_are_added_are_told_apart_from_nodes_of_their_names() -> None:
    graph = Graph()
    pair = graph.placeholder("pair")
    parts = [graph.call_function(operator.getitem, (pair, index)) for index in range(3)]
    graph.output(tuple(parts))
    module = GraphModule(nn.Module(), graph)
    for node in graph.nodes:
        set_value(node, None)
    assert str(parts[-1]) == "getitem_2"
    names = ("getitem_2", "getitem_3", "getitem_4", "pair", "pair_1", "x")
    added = [add_placeholder(module, name, None) for name in names]
    (output,) = graph.find_nodes(op="output")
    output.args = ((*parts, *added),)
    graph.lint()
    module.recompile()
    given = ([1, 2, 3], *range(4, 10))
    assert module(*given) == tuple(range(1, 10))
    assert torch.fx.Interpreter(module).run(*given) == tuple(range(1, 10))
    assert len({node.target for node in graph.find_nodes(op="placeholder")}) == 7


def test_the_gradient_of_the_extra_input_holds_the_rows() -> None:
    module = Checkpointed()
    graph = trace(module, X.detach().requires_grad_())
    rewritten = rewrite(
        graph,
        replace(
            measure(module, "rms"), select_gradient=probes(module, "norm", "max").select_gradient
        ),
    )
    (wanted,) = rewritten.row_inputs
    rows = torch.zeros(wanted.length, dtype=torch.float64, requires_grad=True)
    x, weight, bias = X.detach().requires_grad_(), module.fc.weight, module.fc.bias
    inputs = {"weight": weight, "bias": bias}
    arguments = [
        next((t for n, t in inputs.items() if node.name.endswith(f"_{n}_")), x)
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    output, *_ = rewritten.module(*arguments, rows)
    output.square().sum().backward()
    want = 2 * output.detach()
    by_site = {row.measurement.site.module: row for row in wanted.layout.slots}
    for name, gradient in (("", want), ("fc", 2 * want)):
        row = by_site[name]
        part = rows.grad[list(row.indices)]
        values = dict(zip(row.measurement.reduction.columns, part, strict=True))
        assert values["count"] == gradient.numel()
        assert values["sum_squares"] == pytest.approx(gradient.square().sum().item())
        assert values["maximum"] == gradient.max()


def distilled() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Linear(2, 2), "model": Checkpointed()})


def distill(parts: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features = parts["encoder"](x)
        target = parts["model"](features)
    output: torch.Tensor = parts["model"](features) - target
    return output


def measured(graph: GraphModule, module: nn.Module) -> list[str]:
    applied(insert_reductions, graph, measure(module, "rms"))
    rows = [node for node in all_nodes(graph) if slots_of(node)]
    return [slot.measurement.site.module for row in rows for slot in slots_of(row)]


STEP = replace(NOTHING, is_step_function=True)


def test_remove_evaluations_golden() -> None:
    graph = trace(distilled(), X, step=distill)
    before = text(graph)
    assert applied(remove_evaluations, graph, STEP).evaluations == 1
    check_golden("remove_evaluations", before + "\n# becomes\n\n" + text(graph))


def test_remove_evaluations_leaves_what_runs_without_gradients_only() -> None:
    module = distilled()
    graph = trace(module, X, step=distill)
    applied(remove_evaluations, graph, STEP)
    assert sorted(measured(graph, module)) == ["encoder", "model", "model.fc"]
    modes = [is_evaluation(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert any(modes)
    assert not all(modes)


def test_remove_evaluations_knows_inference_mode() -> None:
    def infer(parts: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            target = parts["encoder"](x)
        output: torch.Tensor = parts["encoder"](x) - target.clone()
        return output

    assert applied(remove_evaluations, trace(distilled(), X, step=infer), STEP).evaluations == 1


def test_remove_evaluations_leaves_the_rest_alone() -> None:
    def infer(parts: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = parts["encoder"](parts["encoder"](x))
        return output

    for graph in (trace(distilled(), X, step=infer), trace(in_place(), X)):
        before = text(graph)
        assert applied(remove_evaluations, graph, STEP).evaluations == 0
        assert text(graph) == before
    assert runs_without_gradients(trace(distilled(), X, step=infer))
    assert not runs_without_gradients(trace(in_place(), X))


def test_remove_evaluations_is_idempotent_and_keeps_metadata() -> None:
    graph = trace(distilled(), X, step=distill)
    known = {node: dict(node.meta) for node in graph.graph.nodes}
    applied(remove_evaluations, graph, STEP)
    once = text(graph)
    applied(remove_evaluations, graph, STEP)
    assert text(graph) == once
    assert all(known[node].items() <= node.meta.items() for node in graph.graph.nodes)


class Attending(nn.Module):
    """A product that an attention reads, and with a ``reader`` something else as well."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.projection = nn.Linear(2, 6)
        self.reader = reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.projection(x).unflatten(-1, (3, 1, 2))
        query, key, value = heads.unsqueeze(0).permute(2, 0, 3, 1, 4).unbind()
        if self.reader == "rotation":
            query = query.cos()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed + key if self.reader == "sum" else mixed


@pytest.mark.parametrize(
    ("reader", "grad", "is_so"),
    [("", True, True), ("rotation", True, False), ("sum", True, False), ("", False, False)],
)
def test_what_only_an_attention_reads(reader: str, grad: bool, is_so: bool) -> None:
    module = Attending(reader).requires_grad_(grad)
    graph = trace(module, X.detach().clone())
    applied(insert_reductions, graph, measure(module, "rms"))
    applied(remove_taps, graph)
    row, *_ = (node for node in graph.graph.nodes if node.target is summarize)
    (tensor, _) = row.args
    assert isinstance(tensor, Node)
    assert is_only_attended(tensor) == is_so


class Hidden(nn.Module):
    """A product that becomes another one's operand, by way of what ``kind`` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        hidden = nn.functional.gelu(up)
        if self.kind == "gate":
            hidden = hidden * self.gate(x).sigmoid()
        elif self.kind == "dropout":
            hidden = nn.functional.dropout(hidden.float(), 0.5).to(x.dtype)
        elif self.kind == "number":
            hidden = hidden * (up.sum().item() + 1)
        elif self.kind == "norm":
            hidden = self.norm(hidden)
        elif self.kind == "softmax":
            hidden = hidden * up.softmax(-1)
        elif self.kind == "rows":
            hidden = hidden - up.mean(-1, keepdim=True)
        elif self.kind == "broadcast":
            hidden = hidden * torch.stack([up, up])
        out = self.down(hidden)
        return out + up.sum() if self.kind == "sum" else out


@pytest.mark.parametrize("has_probes", [False, True])
@pytest.mark.parametrize(
    ("kind", "is_so"),
    [
        *(("", True), ("gate", True), ("dropout", True)),
        *(("norm", False), ("softmax", False), ("rows", False), ("broadcast", False)),
        *(("sum", False), ("number", False)),
    ],
)
def test_what_lies_between_products(kind: str, *, is_so: bool, has_probes: bool) -> None:
    module = Hidden(kind)
    graph = trace(module, X.detach().clone())
    request = measure(module, "rms")
    if has_probes:
        request = replace(request, select_gradient=request.select)
        applied(insert_probes, graph, request)
    applied(insert_reductions, graph, request)
    applied(remove_taps, graph)
    found = {}
    for node in graph.graph.nodes:
        if node.target is summarize and isinstance(tensor := node.args[0], Node):
            found |= {site.module: is_between_products(tensor) for _, site in sites_of(node)}
    assert found["up"] == is_so
    assert ("gate" not in found) or found["gate"]
