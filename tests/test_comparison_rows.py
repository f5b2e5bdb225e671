"""Which rows compare a module with the reference; graphs and what lies between them agree."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import tmm
from tests.graphs import NOTHING, applied, trace
from tmm.core.metrics import builtin_reductions
from tmm.core.records import Site
from tmm.instrumentation.attribution import checked_module
from tmm.kernels.pairs import Normalization
from tmm.passes.graph.copy import copy_graph
from tmm.passes.insert_reference import insert_reference
from tmm.passes.pack_rows import pack_rows
from tmm.passes.reference.comparison_rows import Operand, Term, comparison_rows, input_rows
from tmm.passes.remove_taps import remove_taps
from tmm.passes.request import CheckedModule, ComparisonRequest
from tmm.runs.instrument import steps_of

DIFFERENCES = builtin_reductions(("norm", "cosine"), is_complex=False)
WAY = Normalization((4,), 1e-5)

CHECKED = [
    CheckedModule(*flags[:2], has_operand_rows=flags[2], normalization=way)
    for *flags, way in product((False, True), (False, True), (False, True), (None, WAY))
]


def changed(module: nn.Module) -> nn.Module:
    """A copy with other parameters."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    return other


def places(terms: tuple[Term, ...]) -> list[tuple[str, str, str]]:
    return [(term.family, term.site.module, term.site.path) for term in terms]


def test_rows_of_a_linear_layer_in_their_order() -> None:
    checked = CheckedModule(has_weight_rows=True, bias=1, has_operand_rows=True)
    update, change = "RCC (W_t-W_0)x_t", "RCC W_0(x_t-x_0)"
    assert places(comparison_rows(Site("fc", "[0]"), DIFFERENCES[:1], checked)) == [
        ("activation_difference", "fc", "[0]"),
        (update, "fc", "[0]"),
        (update, "fc", "[0].weight"),
        (change, "fc", "[0]"),
        (change, "fc", "[0].weight"),
        (update, "fc", "[0].weight/W_t x_t"),
        (change, "fc", "[0].weight/W_0 x_0"),
    ]
    assert places(input_rows("fc", replace(checked, normalization=WAY))) == [
        ("RCC x_t", "fc", ""),
        ("RCC (x_t-x_0)", "fc", ""),
        (update, "fc", ".weight/x_t"),
        (change, "fc", ".weight/x_t-x_0"),
    ]


def test_embeddings_have_the_update_term_alone() -> None:
    checked = CheckedModule(only_update=True)
    assert places(comparison_rows(Site("e"), (), checked)) == [("RCC (W_t-W_0)x_t", "e", "")]
    assert input_rows("e", checked) == ()
    assert comparison_rows(Site("e")) == ()


@pytest.mark.parametrize("known", [(), ("bias",), ("bias", "reference bias")])
def test_biases_that_are_not_known_are_not_left_out(known: tuple[Operand, ...]) -> None:
    checked = CheckedModule(has_weight_rows=True, has_operand_rows=True)
    for term in comparison_rows(Site("fc"), (), checked):
        given = term.given(known)
        assert given.offsets == (term.offsets if {*term.offsets} <= {*known} else ())
        assert given.computation == term.computation


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_graph_computes_the_terms(has_bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=has_bias))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    reference, x = changed(module), torch.randn(5, 3)
    graph = trace(module, x, inputs_marked=True)
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = [node.meta["real"] for node in placeholders]
    keys = {node.name: id(value) for node, value in zip(placeholders, inputs, strict=True)}
    names = {id(child): name for name, child in module.named_modules()}
    with torch.no_grad():
        given = module[0](x), reference[0](x)
        live, mixed, other = module[1](given[0]), reference[1](given[0]), reference[1](given[1])
    at_input: dict[Operand, torch.Tensor] = {"live": given[0], "reference": given[1]}
    at_output: dict[Operand, torch.Tensor] = {"live": live, "mixed": mixed, "reference": other}
    if has_bias:
        at_output |= {"bias": module[1].bias, "reference bias": reference[1].bias}
    for checked in CHECKED:
        checked = replace(checked, bias=id(module[1].bias) if has_bias else None)
        asked = ComparisonRequest(
            lambda site, dtype: DIFFERENCES if site.module == "1" else (),
            lambda name, checked=checked: checked if name == "1" else None,
            lambda node: key if (key := keys[node.name]) in own else None,
        )
        rewritten = copy_graph(graph)
        request = replace(NOTHING, modules=names, comparison=asked)
        ends = applied(insert_reference, rewritten, request).reference
        applied(remove_taps, rewritten)
        layout = applied(pack_rows, rewritten).layout
        rewritten.recompile()
        further = [own[id(inputs[position])] for position in ends.parameters]
        counterparts = [reference.get_parameter(name).detach() for name in further]
        _, packed = rewritten(*inputs, *counterparts)
        found = {row.measurement: packed[list(row.indices)] for row in layout.slots}
        expected = {
            term.measurement: term.given(tensors.keys()).computation(
                *(tensors[operand] for operand in term.given(tensors.keys()).operands)
            )
            for terms, tensors in (
                (input_rows("1", checked), at_input),
                (comparison_rows(Site("1"), DIFFERENCES, checked), at_output),
            )
            for term in terms
        }
        assert found.keys() == expected.keys(), checked
        for measurement, row in expected.items():
            torch.testing.assert_close(found[measurement], row, rtol=1e-5, atol=1e-6)


class Layers(nn.Module):
    """A module of each kind that the refined coordinate check treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.norm = nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.act, self.out = nn.Tanh(), nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.act(self.norm(self.fc(self.embedding(x)))))
        return y


class OutsideOfGraphs(Layers):
    forward = torch._dynamo.disable(Layers.forward)


@pytest.mark.parametrize(
    "rules",
    [
        (tmm.rcc(),),
        (tmm.rcc(operands=True),),
        (tmm.activation_difference("norm", "cosine"),),
        (tmm.rcc(operands=True), tmm.activation_difference("norm", largest=lambda a, b: a - b)),
        (tmm.rcc(), tmm.activation_difference("rms", modules="norm")),
    ],
)
def test_graphs_and_what_lies_between_them_execute_the_same_terms(
    rules: tuple[tmm.Rule, ...],
) -> None:
    torch.manual_seed(0)
    layers, x = Layers(), torch.arange(14).reshape(2, 7) % 7
    reference, found = changed(layers).state_dict(), []
    for kind in (Layers, OutsideOfGraphs):
        module = kind()
        module.load_state_dict(layers.state_dict())
        model = torch.compile(module, backend="aot_eager")
        tmm.instrument(model, tmm.Spec(*rules, reference=reference), on_error="raise")
        monitor = tmm.monitor(model)
        with monitor.step(0):
            model(x)
        plan = steps_of(model).twin.attribution.plan
        want = []
        for name, child in module.named_modules():
            name = name or "[root module]"
            checked = checked_module(plan, name, child)
            terms = () if checked is None else input_rows(name, checked)
            reductions = plan.select(name, torch.float32, "activation_difference")
            terms += comparison_rows(Site(name), reductions, checked)
            want += [
                f"{term.family}/{name}{term.site.path}/{metric}"
                for term in terms
                for metric in term.reduction.metrics
            ]
        found.append(monitor.get_step_metrics())
        assert sorted(found[-1]) == sorted(want)
    inside, outside = found
    for key, value in inside.items():
        assert outside[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_keys_keep_their_order_outside_of_graphs() -> None:
    torch.manual_seed(0)
    module = OutsideOfGraphs()
    model = torch.compile(module, backend="aot_eager")
    tmm.instrument(model, tmm.Spec(tmm.rcc(operands=True), reference="init"))
    with tmm.monitor(model).step(0):
        model(torch.arange(4)[None])
    keys = [key for key in tmm.monitor(model).get_step_metrics() if "/fc" in key]
    update, change = "RCC (W_t-W_0)x_t", "RCC W_0(x_t-x_0)"
    assert [key.removesuffix("/l2norm") for key in keys] == [
        *("RCC x_t/fc", "RCC (x_t-x_0)/fc", f"{update}/fc", f"{change}/fc"),
        *(f"{update}/fc.weight/W_t x_t", f"{change}/fc.weight/W_0 x_0"),
        *(f"{update}/fc.weight", f"{change}/fc.weight"),
    ]
