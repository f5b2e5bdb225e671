"""What the graphs of a tensor parallel model say about placements, without other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.fx import GraphModule
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from tests.graphs import measure, text, trace
from tmm.core.metrics import builtin_reductions
from tmm.core.records import AttentionRequest, Share
from tmm.passes.find_gradient_placements import gradient_shares
from tmm.passes.find_placements import placements_of
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.sharding import Placements
from tmm.passes.graph.slots import slots_of
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.pipeline import rewrite
from tmm.passes.request import PlacementRequest


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """That of the second of two ranks, which holds copies."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class Applied(nn.Module):
    """Gives the output of a function, as a module of its own."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


class Block(nn.Module):
    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.activation = nn.ReLU()
        self.down = nn.Linear(6, 4)
        self.then = nn.ModuleList(Applied(function) for function in functions)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(self.norm(x))))
        for module in self.then:
            y = module(y)
        return y


def parallel(mesh: DeviceMesh, *functions: Callable[..., Tensor]) -> Block:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    block = parallelize_module(Block(*functions), mesh, plan)
    assert isinstance(block, Block)
    return block


def options(model: nn.Module, mesh: DeviceMesh) -> PlacementRequest:
    equal = frozenset(id(p) for p in model.parameters() if not isinstance(p, DTensor))
    return PlacementRequest(frozenset({0, 1}), is_first=False, equal=equal)


def analysed(
    model: nn.Module, mesh: DeviceMesh, *inputs: Tensor
) -> tuple[GraphModule, Placements, dict[str, Share]]:
    """The graph, what was found, and what this rank has of the output of each module."""
    graph = trace(model, *inputs)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta["grapharg"] = SimpleNamespace(example=node.meta["real"])
    before = text(graph)
    found = placements_of(graph, options(model, mesh))
    assert text(graph) == before
    names = {id(module): name for name, module in model.named_modules()}
    shares = {}
    for mark in filter(is_mark, all_nodes(graph)):
        site = site_of(mark, names)
        assert site is not None
        shares[site.module] = found.share(mark)
    return graph, found, shares


X = torch.arange(8.0).reshape(2, 4)


def test_boundaries_and_pointwise_operations(mesh: DeviceMesh) -> None:
    model = parallel(
        mesh,
        lambda y: y * 2 + y,
        lambda y: (y * 2).relu_().mul_(y),
        lambda y: functional.dropout(y, 0.5),
    )
    _, _, shares = analysed(model, mesh, X)
    kinds = {name: share.kind for name, share in shares.items()}
    assert kinds == {
        "norm": "copy",  # what becomes a DTensor is declared
        "up": "part",
        "activation": "part",
        "down": "copy",
        "then.0": "copy",
        "then.1": "copy",
        "then.2": "unknown",
        "": "unknown",
    }
    assert "random" in shares[""].reason


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda y: y[:, 1:3], "getitem"),
        (lambda y: y.chunk(2, -1)[1], "getitem"),
        (lambda y: y + torch.rand_like(y), "rand_like"),
        (lambda y: y + torch.ones(4), "ones"),
        (lambda y: y.clone().bernoulli_(), "bernoulli_"),
        (lambda y: y.narrow(1, 0, 2), "narrow"),
    ],
)
def test_what_ranks_may_do_in_different_ways_is_not_known(
    mesh: DeviceMesh, function: Callable[..., Tensor], reason: str
) -> None:
    _, _, shares = analysed(parallel(mesh, function), mesh, X)
    assert shares["then.0"].kind == "unknown"
    assert reason in shares["then.0"].reason


def test_inputs_are_not_known_unless_declared(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = parallel(mesh)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            result: Tensor = self.last(y + self.block(y))
            return result

    _, _, shares = analysed(Model(), mesh, X)
    assert shares["first"].kind == shares["last"].kind == "unknown"
    assert "input of the graph" in shares["first"].reason
    assert shares["block.norm"].kind == "copy"


def test_parameters_that_are_equal_count_as_such_and_others_do_not(mesh: DeviceMesh) -> None:
    model = nn.Sequential(parallel(mesh), nn.Linear(4, 4))
    _, _, shares = analysed(model, mesh, X)
    assert shares["1"].kind == "copy"

    graph = trace(model, X)
    found = placements_of(graph, PlacementRequest(frozenset({0, 1}), is_first=False))
    last = [mark for mark in graph.graph.nodes if is_mark(mark)][-1]
    assert found.share(last).kind == "unknown"


def test_a_tensor_that_is_overwritten_is_another_one(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = parallel(mesh)
            self.part = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(self.block(x))
            y.mul_(0)  # in place of a sum over ranks
            return DTensor.from_local(y, mesh, [Replicate()]).to_local()

    _, _, shares = analysed(Model(), mesh, X)
    assert shares["part"].kind == "unknown"
    assert shares[""].kind == "copy"


def test_a_tensor_that_is_declared_in_two_ways_is_not_known(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = Applied(lambda x: x * 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.twice(x)
            whole, parts = (DTensor.from_local(y, mesh, [p]) for p in (Replicate(), Shard(0)))
            result: Tensor = whole.to_local().sum() + parts.to_local().sum()
            return result

    graph, found, shares = analysed(Model(), mesh, X.clone().requires_grad_())
    assert shares["twice"].kind == "unknown"
    gradients = gradient_shares(graph, found)
    assert {share.kind for share in gradients.values()} == {"unknown"}


def test_sums_that_were_not_made_are_refused(mesh: DeviceMesh) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Partial())}
    model = parallelize_module(Block(), mesh, plan)
    graph, _, shares = analysed(model, mesh, X)
    assert shares["down"].kind == shares[""].kind == "unsummed"
    rewritten = rewrite(graph, replace(measure(model, "rms"), placements=options(model, mesh)))
    refused = {site.module: reason for site, reason in rewritten.layout.unmeasured}
    assert refused.keys() == {"down", ""}


def test_local_parts_of_distributed_tensors_are_measured(mesh: DeviceMesh) -> None:
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    model = parallelize_module(Block(), mesh, plan)
    graph, _, shares = analysed(model, mesh, X)
    assert shares["up"].kind == shares["activation"].kind == "part"
    rewritten = rewrite(graph, replace(measure(model, "rms"), placements=options(model, mesh)))
    (row, *_) = (
        n for n in rewritten.module.graph.nodes if n.target == "to_local" and "tmm_sites" in n.meta
    )
    assert row.meta["example_value"].shape == (2, 3)
    kinds = {r.measurement.site.module: r.measurement.share for r in rewritten.layout.slots}
    assert kinds == shares
    assert not [n for n in rewritten.module.graph.nodes if slots_of(n)]


def test_checkpointed_parts_are_followed(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = parallel(mesh)
            self.inner = parallel(mesh, lambda y: y + 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            result: Tensor = checkpoint(lambda z: z + self.inner(z), y, use_reentrant=False)
            return result

    _, _, shares = analysed(Model(), mesh, X)
    assert {shares[name].kind for name in ("inner.then.0", "")} == {"copy"}


def test_gradients(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = parallel(mesh), parallel(mesh)
            self.cut = Applied(lambda y: y * 2)
            self.used_in_parts = Applied(lambda y: y + 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y + self.second(y)
            z = self.used_in_parts(y * 3)
            return self.cut(y) + z.chunk(2, -1)[dist.get_rank()].sum()

    model = Model()
    graph, found, _ = analysed(model, mesh, X.clone().requires_grad_())
    shares = gradient_shares(graph, found)
    names = {id(module): name for name, module in model.named_modules()}
    kinds = {}
    for mark, share in shares.items():
        site = site_of(mark, names)
        assert site is not None
        kinds[site.module] = share.kind
    assert kinds["first.norm"] == kinds["first.down"] == kinds["second.down"] == "copy"
    assert kinds["first.up"] == kinds["first.activation"] == "part"
    assert kinds["used_in_parts"] == kinds["cut"] == kinds[""] == "unknown"


def test_given_placements_of_gradients(mesh: DeviceMesh) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
            self.out = Applied(lambda y: y.to_local(grad_placements=[Partial()]))
            self.next = Applied(lambda y: y * 2)

        def forward(self, x: Tensor) -> Tensor:
            whole = DTensor.from_local(x, mesh, [Replicate()])
            result: Tensor = self.next(self.out(functional.linear(whole, self.weight)))
            return result

    model = Model()
    graph, found, shares = analysed(model, mesh, X)
    assert shares["out"].kind == "copy"
    marks = [mark for mark in graph.graph.nodes if is_mark(mark)]
    kinds = [gradient_shares(graph, found)[mark].kind for mark in marks]
    assert kinds == ["unsummed", "unknown", "unknown"]


class Attention(nn.Module):
    """Of two tensors, as heads of two elements."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = (x.view(1, 2, -1, 2).transpose(1, 2) for x in (query, key))
        return functional.scaled_dot_product_attention(query, key, key)


@pytest.mark.parametrize(
    ("parts", "kind", "heads"),
    [
        ((Shard(2), Shard(2)), "whole", [2, 3]),
        ((Replicate(), Replicate()), "copy", [0, 1]),
        ((Shard(2), Replicate()), "unknown", [0, 1]),
        ((Shard(1), Shard(1)), "unknown", [0, 1]),
        ((Shard(2), None), "unknown", [0, 1]),
    ],
)
def test_heads_have_the_numbers_of_all_ranks(
    mesh: DeviceMesh, parts: tuple[Placement | None, ...], kind: str, heads: list[int]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, *tensors: Tensor) -> Tensor:
            placed = [
                tensor + 1
                if part is None
                else DTensor.from_local(tensor + 1, mesh, [part]).to_local()
                for tensor, part in zip(tensors, parts, strict=True)
            ]
            result: Tensor = self.attention(*placed)
            return result

    model = Model()
    graph = trace(model, torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    entropy = builtin_reductions(("entropy",), is_complex=False)
    rewritten = rewrite(
        graph,
        replace(
            measure(model),
            select_attention=lambda _: (AttentionRequest(entropy, ()),),
            placements=options(model, mesh),
        ),
    )
    found = [(row.measurement.site.path, row.measurement.share) for row in rewritten.layout.slots]
    assert [path for path, _ in found] == [f".head_{head}" for head in heads]
    assert {share and share.kind for _, share in found} == {kind}


def test_parts_and_whole_tensors_together(mesh: DeviceMesh) -> None:
    scale = nn.Parameter(torch.ones(4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = scale
            self.rows = Applied(lambda x: DTensor.from_local(x, mesh, [Shard(0)]).to_local())
            self.along = Applied(lambda x: x * self.scale)
            self.across = Applied(lambda x: x * self.scale[:, None])
            self.columns = Applied(lambda x: DTensor.from_local(x, mesh, [Shard(1)]).to_local())
            self.scaled = Applied(lambda x: x * self.scale)

        def forward(self, x: Tensor) -> Tensor:
            self.along(self.rows(x))
            return self.scaled(self.columns(x * 2))

    _, _, shares = analysed(Model(), mesh, X)
    assert shares["rows"].kind == shares["along"].kind == shares["columns"].kind == "part"
    assert shares["scaled"].kind == "unknown"
