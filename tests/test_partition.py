"""What Inductor keeps for the backward pass: the same as if nothing were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tmm
from tests.graphs import check_golden, text
from tmm.kernels.ops import summarize
from tmm.passes.hide_from_partitioner import hide_measuring, show_measuring

FIVE = ("mean", "rms", "absmax", "zero_fraction", "nan_count")


class Block(nn.Module):
    """A part of a transformer, with what its backward pass may compute once more."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.activation = nn.Linear(width, 4 * width), nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.down(self.activation(self.up(self.norm(x))))
        return output


class Attending(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        output: torch.Tensor = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return output


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = checkpoint(self.first, x, use_reentrant=False)
        output: torch.Tensor = self.second(inside)
        return output


class Gated(nn.Module):
    """SwiGLU, of pieces that all have modules of their own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        output: torch.Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return output


class Unused(nn.Module):
    """Gives what one of its modules computes, and drops what another one does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.aside, self.act = Block(), nn.Linear(16, 16), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        self.act(self.aside(x))
        output: torch.Tensor = self.act(x)
        return output


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(-1, (4, 4)), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        *(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish()),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(Block(), Block()),
    "attention": lambda: nn.Sequential(Attending(), Block(), Attending()),
    "checkpointed": Checkpointed,
    "gated": lambda: nn.Sequential(Gated(), Gated()),
    "convolutions": convolutions,
    "dropout": lambda: nn.Sequential(Block(), nn.Dropout(0.1), nn.Softplus(), nn.Dropout(0.1)),
    "unused": lambda: Unused(),
    "long chain": lambda: nn.Sequential(*(nn.Softplus() for _ in range(40))),
}
SPECS = {
    "activations": tmm.Spec(tmm.activation(*FIVE)),
    "and gradients": tmm.Spec(tmm.activation(*FIVE), tmm.activation_gradient("rms")),
    "histograms, own functions": tmm.Spec(
        tmm.activation("histogram", l1=lambda x: x.abs().sum(-1))
    ),
}


class PartedError(Exception):
    """Nothing need be compiled."""


@dataclass(eq=False)
class Keeping(CustomPartitionerFn):
    """The user's partitioner, which is Inductor's, and remembers what was kept."""

    kept: list[list[tuple[str, tuple[str, ...]]]] = field(default_factory=list)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        forward, _ = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        (returned,) = forward.graph.output_node().args
        assert isinstance(returned, (list, tuple))
        saved = [node for node in returned[options["num_fwd_outputs"] :] if isinstance(node, Node)]
        named = ((str(node.target), tuple(map(str, node.meta["val"].shape))) for node in saved)
        self.kept.append(sorted(named))
        raise PartedError

    def uuid(self) -> None:
        return None


def kept_of(
    model: nn.Module, spec: tmm.Spec | None, *, dynamic: bool | None = None, **options: Any
) -> Keeping:
    """What the partitioner of the model's compiled program keeps."""
    torch._dynamo.reset()
    keeping, x = Keeping(), torch.randn(2, 8, 16, requires_grad=True)
    with torch._inductor.config.patch(custom_partitioner_fn=keeping, force_disable_caches=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
        if spec is None:
            with pytest.raises(BackendCompilerFailed):
                compiled(x)
            return keeping
        compiled = tmm.instrument(compiled, spec, **options)
        with pytest.raises(BackendCompilerFailed), tmm.monitor(compiled).step(0):
            compiled(x)
    return keeping


@cache
def kept_unmeasured(model: str, *, dynamic: bool | None = None) -> Keeping:
    """The same of the plain program: names and shapes, which no value of a parameter changes."""
    return kept_of(MODELS[model](), None, dynamic=dynamic)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_kept_is_what_the_plain_program_keeps(model: str, spec: str) -> None:
    plain = kept_unmeasured(model)
    assert plain.kept
    assert kept_of(MODELS[model](), SPECS[spec]).kept == plain.kept


@pytest.mark.parametrize(
    "options",
    [{"lowering": "fused"}, {"reference": "init"}, {"lowering": "fused", "dynamic": True}],
    ids=["fused", "reference", "fused, dynamic"],
)
@pytest.mark.parametrize("model", ["blocks", "gated", "checkpointed"])
def test_what_is_kept_with_other_measurements(model: str, options: dict[str, Any]) -> None:
    dynamic = options.get("dynamic")
    own = {name: value for name, value in options.items() if name == "lowering"}
    spec = SPECS["and gradients"]
    if options.get("reference"):
        spec = tmm.Spec(tmm.activation("rms"), tmm.activation_difference("norm"), reference="init")
    plain = kept_unmeasured(model, dynamic=dynamic)
    assert kept_of(MODELS[model](), spec, dynamic=dynamic, **own).kept == plain.kept


def test_what_is_kept_in_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        module = MODELS["blocks"]()
        plain = kept_of(module, None)
        assert kept_of(module, SPECS["activations"]).kept == plain.kept


def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The forward pass gives the exponential; a module's output is read by the backward pass."""
    (x,), (gradient,) = primals, tangents
    shown = x.sigmoid()
    measured = shown.tanh()  # which nothing but a measurement reads
    rows = [summarize(shown, "count,sum"), summarize(measured, "count,sum")]
    return [x.exp(), torch.cat(rows), gradient * shown]


def traced_joint(x: torch.Tensor) -> GraphModule:
    graph: GraphModule = make_fx(joint, tracing_mode="fake")([x], [torch.ones_like(x)])
    return graph


def test_golden() -> None:
    x = torch.tensor([0.5, -1.0, 2.0])
    graph = traced_joint(x)
    before = text(graph)
    hidden = hide_measuring(graph, 2)
    without = text(graph)
    forward, _ = min_cut_rematerialization_partition(graph, [], num_fwd_outputs=2)
    assert not forward.graph.find_nodes(op="call_function", target=torch.ops.aten.sigmoid.default)
    show_measuring(forward, hidden)
    forward.graph.lint()
    check_golden(
        "hide_from_partitioner",
        f"{before}\n# without measurements\n\n{without}\n# forward pass\n\n{text(forward)}",
    )
    output, rows = forward(x)[:2]
    sums = x.sigmoid().sum(), x.sigmoid().tanh().sum()
    assert torch.equal(output, x.exp())
    assert torch.allclose(
        rows, torch.stack([torch.tensor(3.0), sums[0], torch.tensor(3.0), sums[1]]).double()
    )


def test_a_graph_without_measurements_is_left_alone() -> None:
    graph: GraphModule = make_fx(lambda x: [x.exp(), x.sum()])(torch.ones(3))
    before = text(graph)
    hidden = hide_measuring(graph, 1)
    assert (text(graph), hidden.names, dict(hidden.outputs)) == (before, frozenset(), {})
    show_measuring(graph, hidden)
    assert text(graph) == before


def test_what_the_program_reads_stays() -> None:
    """An operator of ours in the way of the program itself: its output comes back as a gradient."""

    def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        row = summarize(primals[0], "count,sum")
        return [primals[0] * 2, tangents[0] * row.sum()]

    graph: GraphModule = make_fx(joint)([torch.ones(3)], [torch.ones(3)])
    before = text(graph)
    assert not hide_measuring(graph, 1).names
    assert text(graph) == before


def test_a_constant_that_only_a_measurement_reads() -> None:
    """The forward pass has no such attribute while nothing is measured."""

    def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        measured = primals[0].sin() * weights
        return [primals[0].exp(), summarize(measured, "sum"), tangents[0] * primals[0]]

    x, weights = torch.randn(8), torch.arange(8.0)
    graph: GraphModule = make_fx(joint)([x], [torch.ones(8)])
    hidden = hide_measuring(graph, 2)
    forward, _ = min_cut_rematerialization_partition(graph, [], num_fwd_outputs=2)
    assert not forward.graph.find_nodes(op="get_attr", target="_tensor_constant0")
    show_measuring(forward, hidden)
    assert forward(x)[1].tolist() == pytest.approx([float((x.sin() * weights).sum())])


def test_what_is_equal_is_computed_once() -> None:
    """Modules that give back what they are given have rows of one tensor, which is read once."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0), nn.Identity(), nn.GELU())
    compiled = tmm.instrument(torch.compile(model), SPECS["histograms, own functions"])
    with fresh_cache(), tmm.monitor(compiled).step(0):
        _, (code, *_) = run_and_get_code(compiled, torch.randn(8, 16, requires_grad=True))
    assert code.count("torch.ops.tmm.histogram.default(") == 2


@pytest.mark.parametrize("lowering", ["operator", "fused"])
def test_a_step_is_that_of_the_plain_program_bit_for_bit(lowering: Any) -> None:
    """Where no fusion is in the way, the same kernels run: a matrix product between each two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
    x, gradients = torch.randn(8, 16), []
    for spec in (None, SPECS["activations"]):
        torch._dynamo.reset()
        compiled = torch.compile(model)
        if spec is not None:
            compiled = tmm.instrument(compiled, spec, lowering=lowering)
        with nullcontext() if spec is None else tmm.monitor(compiled).step(0):
            compiled(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))
