"""The parts that operations make of parts, put together, against what they make of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.graphs import trace
from tmm.passes.find_placements import placements_of
from tmm.passes.graph.sharding import Placements
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.request import PlacementRequest

Function = Callable[[Tensor], Tensor]
SHAPE = (2, 4, 6, 8)


def frequencies(x: Tensor) -> Tensor:
    angles = torch.arange(12.0).view(-1, 1) * torch.arange(1.0, 5.0)
    return torch.polar(torch.ones_like(angles), angles)[: x.shape[-2]]


def rotated(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * frequencies(x)).flatten(-2).type_as(x)


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * x.cos() + torch.cat((-second, first), dim=-1) * x.sin()


def normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.arange(8.0)


def written_out(x: Tensor) -> Tensor:
    weights = (x @ x.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    return weights.matmul(x)


# The dimensions of a tensor of shape SHAPE in which parts stay parts. In others a result may be
# known, too; whatever is known has to be right.
FUNCTIONS: dict[str, tuple[Function, set[int]]] = {
    "rotated": (rotated, {0, 1}),
    "half turned": (half_turned, {0, 1, 2}),
    "normalized": (normalized, {0, 1, 2}),
    "written out": (written_out, {0, 1}),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), {0, 1}),
    "masked attention": (
        lambda x: functional.scaled_dot_product_attention(
            x, x, x, attn_mask=torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        ),
        {0, 1},
    ),
    "repeated": (
        lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2),
        {0, 1, 2, 3},
    ),
    "interleaved": (lambda x: x.repeat_interleave(2, dim=1), {0, 1, 2, 3}),
    "slices": (lambda x: x[..., :3] + x[..., 3:6], {0, 1, 2}),
    "sliced in the middle": (lambda x: x[:, 1:2], {0, 2, 3}),
    "one of a dimension": (lambda x: x[:, 0], {0, 2, 3}),
    "new dimensions": (lambda x: x[None, ..., None], {0, 1, 2, 3}),
    "last place": (lambda x: x[..., -1, :], {0, 1, 3}),
    "heads to the front": (lambda x: x.transpose(1, 2).contiguous(), {0, 1, 2, 3}),
    "turned around": (lambda x: x.permute(3, 1, 0, 2), {0, 1, 2, 3}),
    "permuted as a list": (lambda x: torch.permute(x, (0, 2, 1, 3)), {0, 1, 2, 3}),
    "joined at the end": (lambda x: x.flatten(2), {0, 1, 2}),
    "joined at the front": (lambda x: x.flatten(0, 1), {0, 2, 3}),
    "cut": (lambda x: x.unflatten(-1, (-1, 2)), {0, 1, 2, 3}),
    "cut by a view": (lambda x: x.view(*x.shape[:3], -1, 2), {0, 1, 2, 3}),
    "cut the other way": (lambda x: x.unflatten(-1, (2, -1)), {0, 1, 2}),
    "a view the other way": (lambda x: x.reshape(*x.shape[:3], 2, -1), {0, 1, 2}),
    "unsqueezed and back": (lambda x: x.unsqueeze(1).squeeze(1), {0, 1, 2, 3}),
    "stacked": (lambda x: torch.stack((x, x * 2), dim=2), {0, 1, 2, 3}),
    "joined with itself": (lambda x: torch.cat([x, x], dim=1), {0, 2, 3}),
    "split": (lambda x: x.split(3, dim=2)[1], {0, 1, 3}),
    "unbound": (lambda x: x.unbind(1)[2], {0, 2, 3}),
    "narrow": (lambda x: x.narrow(2, 1, 3), {0, 1, 3}),
    "select": (lambda x: torch.select(x, 2, 1), {0, 1, 3}),
    "mean": (lambda x: x.mean(dim=(0, 2)), {1, 3}),
    "sum that keeps": (lambda x: x.sum(2, keepdim=True), {0, 1, 3}),
    "softmax": (lambda x: functional.softmax(x, dim=1), {0, 2, 3}),
    "layer norm": (lambda x: functional.layer_norm(x, (8,)), {0, 1, 2}),
    "rms norm of two": (lambda x: functional.rms_norm(x, x.shape[-2:]), {0, 1}),
    "linear": (lambda x: functional.linear(x, torch.ones(5, 8)), {0, 1, 2}),
    "rows": (lambda x: x @ torch.ones(8, 3), {0, 1, 2}),
    "triangle": (lambda x: torch.tril(x), {0, 1}),
    "scaled by a number": (lambda x: x * 3 + 1, {0, 1, 2, 3}),
    "scaled by columns": (lambda x: x * torch.arange(8.0), {0, 1, 2}),
    "normalize": (lambda x: functional.normalize(x, dim=-1), {0, 1, 2}),
    "cumsum": (lambda x: x.cumsum(2), {0, 1, 3}),
}

MIXED: dict[str, Function] = {
    "all of it": lambda x: x.flatten(),
    "sum of all": lambda x: x.sum(),
    "last two joined": lambda x: x.reshape(*x.shape[:2], -1),
    "by an index": lambda x: x[:, torch.tensor([0, 0])],
    "sorted": lambda x: x.sort(dim=1).values,
    "rolled": lambda x: x.roll(1, 1),
    "flipped": lambda x: x.flip(1),
}
"""Whatever is known of these has to be right; nothing need be."""


ALL = {name: function for name, (function, _) in FUNCTIONS.items()} | MIXED


def fits(function: Function, part: Tensor) -> bool:
    """Whether a function takes a part of this shape."""
    try:
        function(part)
    except (RuntimeError, IndexError):
        return False
    return True


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class All(nn.Module):
    """Applies all functions to what a rank has of a tensor."""

    def __init__(self, mesh: DeviceMesh, placement: Placement, part: Tensor) -> None:
        super().__init__()
        self.mesh, self.placement = mesh, placement
        functions = {name: one for name, one in ALL.items() if fits(one, part)}
        self.names = list(functions)
        self.each = nn.ModuleList(map(Applied, functions.values()))

    def forward(self, x: Tensor) -> list[Tensor]:
        part = DTensor.from_local(x, self.mesh, [self.placement]).to_local()
        return [one(part) for one in self.each]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def found_in(mesh: DeviceMesh, placement: Placement, part: Tensor) -> dict[str, int]:
    """The dimension of each result, of those that are known to be split."""
    model = All(mesh, placement, part)
    graph = trace(model, part)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta["grapharg"] = SimpleNamespace(example=node.meta["real"])
    found: Placements = placements_of(graph, PlacementRequest(frozenset({0, 1}), is_first=True))
    names = {id(module): name for name, module in zip(model.names, model.each, strict=True)}
    known = {}
    for mark in filter(is_mark, graph.graph.nodes):
        site = site_of(mark, names)
        if site is not None and (placed := found.known.get(mark)) is not None:
            assert placed.dimension is not None
            known[site.module] = placed.dimension
    return known


@pytest.mark.parametrize("dimension", range(4))
def test_parts_of_results_make_up_the_whole(mesh: DeviceMesh, dimension: int) -> None:
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    parts = whole.chunk(2, dimension)
    known = found_in(mesh, Shard(dimension), parts[0].contiguous())
    for name, (_, dimensions) in FUNCTIONS.items():
        assert name in known or dimension not in dimensions, name
    for name, place in known.items():
        together = torch.cat([ALL[name](part.contiguous()) for part in parts], place)
        torch.testing.assert_close(together, ALL[name](whole), msg=lambda m, n=name: f"{n}: {m}")


def test_of_sums_that_were_not_made_nothing_is_known(mesh: DeviceMesh) -> None:
    model = All(mesh, Partial(), torch.randn(SHAPE))
    graph = trace(model, torch.randn(SHAPE))
    found = placements_of(graph, PlacementRequest(frozenset({0, 1}), is_first=True))
    names = {id(module): name for name, module in zip(model.names, model.each, strict=True)}
    marks = [mark for mark in filter(is_mark, graph.graph.nodes) if site_of(mark, names)]
    assert len(marks) > len(FUNCTIONS)
    assert not [mark for mark in marks if mark in found.known and found.known[mark].is_split]
