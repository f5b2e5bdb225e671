"""A reference that runs on the first items of each batch: which they are, and whether it may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.functional import batch_norm, instance_norm

from tmm.core.dynamo_private import maybe_mark_dynamic
from tmm.core.records import ROOT_NAME, Site
from tmm.core.replacement import Replacement
from tmm.core.rng import RandomState
from tmm.core.torch_private import tree_leaves
from tmm.kernels.dense import packed_dtype
from tmm.passes.graph.edits import storages
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import all_nodes, sites_of
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.pipeline import Rewritten
from tmm.passes.reference.insert_comparisons import PAIR
from tmm.passes.reference.prefix_branch import Samples, SamplesError
from tmm.spec.reference import Reference

LOST_ITEMS = "after a graph break, where the first items of a batch are lost"
"""Why nothing is compared there with ``reference_samples``."""

_MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")

# What items that are computed alone may differ by, relative to their norm.
_ROUNDING, _COARSE_ROUNDING = 1e-2, 1e-1


@dataclass(frozen=True, eq=False)
class Batch:
    """The tensors of one call of a model that hold a batch: ``size`` items along dimension 0."""

    size: int
    tensors: tuple[torch.Tensor, ...]

    @staticmethod
    def of(inputs: object) -> Batch | None:
        """The batch in the arguments of a call; the first tensor in them gives its size."""
        tensors = [v for v in tree_leaves(inputs) if isinstance(v, torch.Tensor) and v.ndim]
        if not tensors:
            return None
        size = tensors[0].shape[0]
        return Batch(size, tuple(t for t in tensors if t.shape[0] == size))

    @contextmanager
    def left_open(self) -> Iterator[None]:
        """In the block, Dynamo leaves the size of the batch open in what it traces."""
        with ExitStack() as marks:
            for tensor in self.tensors:
                for name in _MARKS:
                    marks.enter_context(Replacement(tensor, name))
                maybe_mark_dynamic(tensor, 0)
            yield


class Sampling:
    """Chooses the items of each graph of a program, and checks that they can be chosen."""

    def __init__(self, kept: int, *, is_dynamic: bool) -> None:
        self.kept = kept
        self._is_dynamic = is_dynamic
        self._sizes: set[int] = set()

    def samples(self, module: GraphModule, batch: Batch | None) -> Samples | None:
        """The items that the reference is to run on; None for the whole of a small batch.

        Raises ``SamplesError`` where they cannot be followed.
        """
        if batch is None:
            raise self._error("the model is called without a tensor that holds a batch")
        placeholders = _placeholders(module)
        held = {id(tensor) for tensor in batch.tensors}
        sizes = [value_of(node).shape[0] for node, x in placeholders if id(x) in held]
        is_open = [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol]
        guards = list(is_open[0].node.shape_env.guards) if is_open else []
        if all(size <= self.kept for size in (*sizes, batch.size)):  # a guard from now on
            return None
        if not is_open:
            raise self._error(f"the compiled program depends on the batch's size, {batch.size}")
        symbol = is_open[0].node.expr
        for guard in guards:
            if guard.expr.subs(symbol, self.kept) == False:  # noqa: E712 (sympy's false)
                raise self._error(f"the compiled program needs a batch where {guard.expr}")
        samples = Samples(symbol, self.kept)
        for node, x in placeholders:
            example = value_of(node)
            shape = example.shape[id(x) in held :] if isinstance(example, torch.Tensor) else ()
            if any(map(samples.has_items, shape)):
                raise self._error(f"another dimension is as long as the batch, {batch.size}")
        return samples

    def is_followed(
        self, module: GraphModule, batch: Batch, reference: Reference, *, after_others: bool
    ) -> bool:
        """Whether a graph that is a part of the model takes nothing but its inputs.

        Raises ``SamplesError`` for the first graph of the model that does not.
        """
        if batch.size <= self.kept:
            return True
        held = {id(tensor) for tensor in batch.tensors}
        for _, value in _placeholders(module):
            known = id(value) in held or reference.has(value)
            if isinstance(value, torch.Tensor) and not known:
                if after_others:
                    return False
                raise self._error("the model runs as several graphs, between which they are lost")
        return True

    def settle(self, module: GraphModule, samples: Samples, batch: Batch) -> None:
        """Let a graph be of this size of batch alone, as the program that is not monitored is.

        Dynamo leaves a size open from the second one on.
        """
        self._sizes.add(batch.size)
        if self._is_dynamic or len(self._sizes) > 1:
            return
        for node in module.graph.find_nodes(op="placeholder"):
            example = value_of(node)
            if isinstance(example, torch.SymInt) and samples.has_items(example):
                int(example)  # becomes a guard

    def check(self, rewritten: Rewritten, samples: Samples, batch: Batch) -> None:
        """Run a graph once with the model as its own reference, and find nothing that differs.

        Raises ``SamplesError`` where items are other ones without the rest of their batch. Changes
        nothing: not the inputs, not the buffers, and no random state.
        """
        found = self._run(rewritten, change=False)
        # Values that happen to be equal, or weights that happen to be 0, could hide a mixture.
        changed = found or self._run(rewritten, change=True)
        if changed:
            raise self._error(
                f"{changed} gives other values for them than within a batch of {batch.size}, so"
                " that some module mixes the items"
            )

    def _run(self, rewritten: Rewritten, *, change: bool) -> str | None:
        """The first site that differs, if any; with ``change`` from other parameters and inputs."""
        module = rewritten.module
        placeholders = list(module.graph.find_nodes(op="placeholder"))
        traced = [node for node in placeholders if argument_of(node) is not None]
        state = RandomState.capture()
        comparing = _Comparing(module)
        try:
            torch.manual_seed(0)
            written = _overwritten(module)
            own = [_other(node) if change else _real(node) for node in traced]
            same = [own[position].detach() for position in rewritten.reference.parameters]
            inputs = [
                _clone(value) if storages([node]) & written else value
                for node, value in zip(traced, own, strict=True)
            ]
            rows = [
                torch.zeros(row.length, dtype=packed_dtype(row.device), device=row.device)
                for row in rewritten.row_inputs
            ]
            with torch.no_grad():
                comparing.run(*inputs, *same, *rows)
        except Exception as error:
            if change:
                return None  # such values need not make sense to the model
            raise self._error(
                f"they cannot be computed without the rest of a batch ({error})"
            ) from error
        finally:
            state.restore()
        return comparing.differing

    def _error(self, reason: str) -> SamplesError:
        return SamplesError(
            f"reference_samples={self.kept}: the first items of a batch, along dimension 0 of the"
            f" model's inputs, cannot be compared alone: {reason}. Leave reference_samples= out."
        )


class _Comparing(Interpreter):
    """Runs a graph and remembers the first site whose pair of tensors differs."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.differing: str | None = None
        self._pairs: dict[Node, list[tuple[tuple[Node, Node], Site]]] = {}
        for node in module.graph.nodes:
            for member in (pair := node.meta.get(PAIR, ())):
                self._pairs.setdefault(member, []).append((pair, sites_of(node)[0][1]))
        self._bodies = dict(nested_calls(module))

    def run_node(self, n: Node) -> Any:
        """Run one node, and compare the pairs that it completes."""
        if returns_body_outputs(n):
            inner = _Comparing(self._bodies[n])
            result = inner.run(*self.fetch_args_kwargs_from_env(n)[0][1:])
            self.differing = self.differing or inner.differing
            return result
        result = super().run_node(n)
        for pair, site in self._pairs.get(n, ()):
            own, other = (result if node is n else self.env.get(node) for node in pair)
            if self.differing is None and own is not None and other is not None:
                name = repr(site.module + site.path or ROOT_NAME)
                self.differing = name if _differ(own, other) else None
        return result


def _differ(own: torch.Tensor, other: torch.Tensor) -> bool:
    if own.shape != other.shape:
        return True
    is_coarse = torch.finfo(own.dtype).bits < 32 or torch.is_autocast_enabled(own.device.type)
    wide = torch.promote_types(own.dtype, torch.float64)
    own, other = own.to(wide), other.to(wide)
    limit = (_COARSE_ROUNDING if is_coarse else _ROUNDING) * own.norm()
    return bool((own - other).norm() > limit)


def _placeholders(module: GraphModule) -> Sequence[tuple[Node, object]]:
    """The inputs of a graph that Dynamo traced, with the value that each had."""
    nodes = module.graph.find_nodes(op="placeholder")
    return [(node, argument.example) for node in nodes if (argument := argument_of(node))]


def _real(node: Node) -> Any:
    example, argument = value_of(node), argument_of(node)
    if isinstance(example, torch.SymInt):
        return int(example.node.hint)
    assert argument is not None
    return argument.example


def _other(node: Node) -> Any:
    """A floating-point value of the same size that differs a bit in each element."""
    value = _real(node)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    value = value.detach()
    spread = value.float().std(correction=0).nan_to_num() * 0.1 + 0.02
    return value + (torch.randn_like(value) * spread).to(value.dtype)


def _overwritten(module: GraphModule) -> set[int]:
    """The memory that a graph, or one nested in it, writes to."""
    targets = [overwritten_by(node) for node in all_nodes(module)]
    memory = storages(target for target in targets if target is not None)
    for node in all_nodes(module):
        if node.target in (batch_norm, instance_norm):
            memory |= storages(node.all_input_nodes)  # running statistics
    return memory


def _clone(value: object) -> object:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
