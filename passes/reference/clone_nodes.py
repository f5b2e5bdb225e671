"""Compute a part of a graph a second time, from other values."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import Argument, map_arg
from torch.nn import functional

from tmm.core.records import Site
from tmm.core.torch_private import tree_leaves, tree_map
from tmm.passes.graph.dropout_functions import FUNCTIONS, SharedMask, draws_by_itself
from tmm.passes.graph.edits import add_body_input, add_body_output, example_like, storages
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import add_site, all_nodes, sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import has_mask
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark
from tmm.passes.graph.values import module_stack, origin_of, set_value, value_of
from tmm.passes.reference.dropout_masks import Masks
from tmm.passes.reference.normalization import mixes_items, without_statistics
from tmm.passes.reference.prefix_branch import Samples, SamplesError

BRANCH = "reference"
"""The family of what copies are made for."""

ORIGIN = "tmm_copied"
"""Node metadata: the node that this one computes again. A copy is never copied itself."""

_OF_THE_SHAPE = (
    *("zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full", "new_tensor"),
)

_UNFOLLOWED = "the items of the batch cannot be told apart in a tensor that it depends on"


@dataclass
class Copier:
    """Copies nodes of ``module`` with some of them substituted.

    ``substitutes`` maps nodes to what stands for them in the copy. What depends on none of them is
    not copied but shared, without its gradient. ``marks`` are the marks, here and in nested
    graphs, whose tensors are wanted; after ``copy``, ``found`` maps each to the counterpart of its
    tensor and ``refused`` those that have none to the reason; ``dependent`` is all that depends on
    what is substituted. ``site`` names what the copies are made for. ``parameters`` are the
    substitutes that are parameters, by graph, and ``outer`` maps placeholders of nested graphs to
    those of the outermost one. With ``samples`` the copy is of those items alone, and what it
    shares is narrowed to them, which is not possible for ``scrambled`` nodes.
    """

    module: GraphModule
    substitutes: Mapping[Node, Node]
    marks: Container[Node]
    masks: Masks
    site: Site
    parameters: dict[GraphModule, dict[Node, Node]] = field(default_factory=dict)
    outer: dict[Node, Node] = field(default_factory=dict)
    samples: Samples | None = None
    scrambled: Container[Node] = frozenset()
    copies: dict[Node, Node] = field(default_factory=dict)
    found: dict[Node, Node] = field(default_factory=dict)
    refused: dict[Node, str] = field(default_factory=dict)
    dependent: set[Node] = field(default_factory=set)
    _lifted: dict[Node, dict[int, int]] = field(default_factory=dict)
    _shared: dict[Node, Argument] = field(default_factory=dict)
    _reasons: dict[Node, str] = field(default_factory=dict)

    def copy(self, outputs: Iterable[Node] = (), among: Iterable[Node] | None = None) -> None:
        """Copy what is needed for the marks, and for ``outputs``, directly after the originals.

        ``among`` limits the copies to these nodes, in order; what comes from outside is shared.
        """
        nodes = list(self.module.graph.nodes if among is None else among)
        nodes = [node for node in nodes if ORIGIN not in node.meta and not sites_of(node)]
        self.copies |= self.substitutes
        outputs = list(outputs)
        depends = self.dependent = self._dependent(nodes)
        needed = self._needed(nodes, depends, outputs)
        self._keep_inputs_apart([node for node in nodes if node in needed])
        for node in nodes:
            if is_mark(node):
                self._find(node)
            elif node in needed and node not in self.substitutes:
                self._copy(node, depends, needed)
        for output in outputs:
            self.copies.setdefault(output, output)
            if output in self._reasons:
                self.refused[output] = self._reasons[output]

    def overwritten(self) -> Iterator[Node]:
        """What the program overwrites, of what depends on the substitutes or comes to."""
        nodes = list(self.module.graph.nodes)
        for node in self._dependent(nodes):
            if (target := overwritten_by(node)) is not None:
                yield target

    def _keep_inputs_apart(self, nodes: Iterable[Node]) -> None:
        """What the copies overwrite, in part or by another name, must not be an input."""
        targets = (overwritten_by(node) for node in nodes)
        memory = storages(target for target in targets if target is not None)
        for node, substitute in self.substitutes.items():
            if storages([node]) & memory:
                with self.module.graph.inserting_after(_last_input(self.module, substitute)):
                    clone = self.module.graph.call_method("clone", (substitute,))
                self._describe(clone, node)
                self.copies[node] = clone

    def _find(self, mark: Node) -> None:
        tensor = mark.args[0]
        assert isinstance(tensor, Node)
        if mark not in self.marks:
            return
        if tensor in self._reasons:
            self.refused[mark] = self._reasons[tensor]
        else:
            self.found[mark] = self.copies.get(tensor, tensor)
            example = value_of(tensor)
            if self.samples is not None and (
                tensor in self.scrambled or not self.samples.can_be_told_apart(example)
            ):
                self.refused[mark] = _UNFOLLOWED

    def _dependent(self, nodes: list[Node]) -> set[Node]:
        depends = set(self.substitutes)
        for node in nodes:
            if is_mark(node) or of_the_shape_only(node.target):
                continue
            if not depends.isdisjoint(node.all_input_nodes):
                depends.add(node)
                if (target := overwritten_by(node)) is not None:
                    depends |= self._names_of(target)  # from here on
        return depends

    def _names_of(self, tensor: Node) -> set[Node]:
        """``tensor`` and all that lies in the same memory."""
        memory = storages([tensor])
        others = (node for node in self.module.graph.nodes if storages([node]) & memory)
        return {tensor} | {n for n in others if ORIGIN not in n.meta and not sites_of(n)}

    def _needed(self, nodes: list[Node], depends: set[Node], outputs: Iterable[Node]) -> set[Node]:
        end = self.module.graph.output_node()
        queue = [(output, end) for output in outputs]
        queue += [(t, mark) for mark in nodes if mark in self.marks for t in mark.all_input_nodes]
        queue += [(c, c) for c, body in nested_calls(self.module) if self._has_marks(body)]
        writers: dict[Node, list[Node]] = {}
        for node in nodes:
            if node in depends and (target := overwritten_by(node)) is not None:
                for name in self._names_of(target):
                    writers.setdefault(name, []).append(node)
        inside, needed = set(nodes), set[Node]()
        while queue:
            node, user = queue.pop()
            if node not in depends or (node not in inside and node not in self.substitutes):
                continue
            written = [w for w in writers.get(node, ()) if w < user and w not in needed]
            queue += [(writer, writer) for writer in written]
            if node not in needed:
                needed.add(node)
                queue += [(source, node) for source in node.all_input_nodes]
        return needed

    def _has_marks(self, body: GraphModule) -> bool:
        return any(node in self.marks for node in all_nodes(body))

    def _copy(self, node: Node, depends: set[Node], needed: set[Node]) -> None:
        if node.target in FUNCTIONS or depends.isdisjoint(node.all_input_nodes):
            return  # the results of the former are copied; the latter is overwritten later
        if (reason := self._why_not(node)) is not None:
            self._reasons[node] = reason
            if (target := overwritten_by(node)) is not None:
                self._reasons |= dict.fromkeys(self._names_of(target), reason)
        elif (mask := self.masks.of(self.module, node)) is not None:
            self._copy_with_mask(node, *mask)
        elif returns_body_outputs(node):
            self._copy_call(node, needed)
        elif node.target is operator.getitem and node.args[0] in self._lifted:
            call, index = node.args
            assert isinstance(call, Node)
            assert isinstance(index, int)
            self._insert(node, operator.getitem, (call, self._lifted[call][index]))
        else:
            if (target := overwritten_by(node)) is not None:
                self._keep_apart(node, target)
            self._copy_operation(node)

    def _why_not(self, node: Node) -> str | None:
        for source in node.all_input_nodes:
            if source in self._reasons:
                return self._reasons[source]
        if (name := draws_by_itself(node)) is not None:
            return f"{name} draws random numbers that a second computation cannot share"
        if any(call is node for call, _ in nested_calls(self.module)):
            return None if returns_body_outputs(node) else f"inside {node.target}"
        if free_unbacked_symbols(example := value_of(node)):
            is_number = not isinstance(example, torch.Tensor)
            return f"{'a number' if is_number else 'a shape'} in it is read from tensors"
        if self.samples is not None and (reason := self._why_not_of_samples(node)) is not None:
            return reason
        target = overwritten_by(node)
        if (
            target is not None
            and self.copies.get(target, target) is target
            and self._has_other_names(target, node)
        ):
            return "it depends on a tensor that is overwritten and has other names"
        return None

    def _why_not_of_samples(self, node: Node) -> str | None:
        """Why ``node`` cannot be computed of some items alone."""
        assert self.samples is not None
        if mixes_items(node):
            raise SamplesError(
                f"{_module_type(node)} mixes the items of a batch here (batch norm in training"
                " mode), so that some of them cannot be compared alone; leave reference_samples="
                " out"
            )
        sources = node.all_input_nodes
        if node.target in ("to", "type_as"):
            sources = sources[:1]
        if any(not self._can_be_narrowed(source) for source in sources):
            return _UNFOLLOWED
        example = value_of(node)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example)) and (
            any(self.samples.has_items(value_of(source)) for source in sources)
            and not self.samples.has_items(example)
        ):
            return "it joins the items of the batch"
        return None

    def _can_be_narrowed(self, node: Node) -> bool:
        """Whether the items can be told apart in what is shared of ``node``."""
        example = value_of(node)
        is_copied = self.copies.get(node, node) is not node
        if self.samples is None or is_copied or not isinstance(example, torch.Tensor):
            return True
        return node not in self.scrambled and self.samples.can_be_told_apart(example)

    def _has_other_names(self, target: Node, writer: Node) -> bool:
        """Whether another name of what ``writer`` overwrites is used later."""
        memory = storages([target])
        for node in self.module.graph.nodes:
            if node is writer:
                return False
            known = node is target or is_mark(node) or ORIGIN in node.meta or sites_of(node)
            if not known and storages([node]) & memory and any(writer < u for u in node.users):
                return True
        return False

    def _keep_apart(self, node: Node, target: Node) -> None:
        """What ``node`` is about to overwrite must not be shared."""
        if self.copies.get(target, target) is not target:
            return
        with self.module.graph.inserting_before(node):
            clone = self.module.graph.call_method("clone", (self._counterpart(target),))
        self._describe(clone, target)
        self.copies[target] = clone

    def _copy_with_mask(self, node: Node, mask: Node, shared: SharedMask) -> None:
        both = node.args[0]
        assert isinstance(both, Node)
        arguments = map_arg(both.kwargs, self._counterpart)
        if self.samples is not None:
            mask = self.masks.narrowed(self.module, mask, self.samples)
            add_site(mask, BRANCH, self.site)
        with self.module.graph.inserting_after(node):
            copied = self.module.graph.call_function(shared.by_mask, (mask,), arguments)
        self._describe(copied, node)
        self.copies[node] = copied
        if (source := overwritten_by(both)) is not None:
            self.copies[source] = copied

    def _copy_operation(self, node: Node) -> None:
        with self.module.graph.inserting_after(node):
            copied = self.module.graph.node_copy(node, self._counterpart)
        for source in node.all_input_nodes:
            counterpart = self.copies.get(source, source)
            if has_mask(value_of(source)) and [*counterpart.users] == [copied]:
                copied.prepend(counterpart)  # the program has read the mask of its own by then
        if node.target is functional.batch_norm or node.target is functional.instance_norm:
            without_statistics(copied)
        self._describe(copied, node)
        self.copies[node] = copied

    def _copy_call(self, node: Node, needed: set[Node]) -> None:
        """Let the body compute further outputs, from further inputs."""
        ((_, body),) = [(call, body) for call, body in nested_calls(self.module) if call is node]
        placeholders = list(body.graph.find_nodes(op="placeholder"))
        substitutes: dict[Node, Node] = {}
        parameters = self.parameters.setdefault(body, {})
        for placeholder, argument in zip(placeholders, node.args[1:], strict=True):
            assert isinstance(argument, Node)
            if self.copies.get(argument, argument) is argument:
                continue
            name = f"{placeholder.name}_reference"
            substitute = add_body_input(node, body, self.copies[argument], name)
            substitute.meta[ORIGIN] = placeholder
            substitutes[placeholder] = substitute
            if argument in self.parameters.get(self.module, {}):
                parameters[placeholder] = substitute
                self.outer[placeholder] = self.outer.get(argument, argument)
        (returned,) = body.graph.output_node().args
        assert isinstance(returned, (tuple, list))
        wanted: dict[int, Node] = {}
        for user in node.users:
            if user in needed and user.target is operator.getitem:
                index = user.args[1]
                assert isinstance(index, int)
                output = returned[index]
                assert isinstance(output, Node)
                wanted[index] = output
        inner = Copier(
            *(body, substitutes, self.marks, self.masks, self.site),
            parameters=self.parameters,
            outer=self.outer,
            samples=self.samples,
            scrambled=self.scrambled,
        )
        inner.copy(wanted.values())
        self.found |= inner.found
        self.refused |= inner.refused
        self._lifted[node] = {}
        for index, output in wanted.items():
            found = inner.copies[output]
            if output in inner.refused:
                self._reasons[node] = inner.refused[output]
            elif not inner._can_be_narrowed(output):
                self._reasons[node] = _UNFOLLOWED
            elif found is output and self.samples is not None:
                found = cast("Node", inner._counterpart(output))
            position = add_body_output(node, body, found)
            self._lifted[node][index] = position
        self.copies[node] = node

    def _insert(self, node: Node, target: object, arguments: tuple[Argument, ...]) -> None:
        with self.module.graph.inserting_after(node):
            copied = self.module.graph.call_function(target, arguments)  # type: ignore[arg-type]
        self._describe(copied, node)
        self.copies[node] = copied

    def _describe(self, copied: Node, original: Node) -> None:
        copied.meta = origin_of(original)
        example = value_of(original)
        if self.samples is not None:
            example = self.samples.example(example)
        set_value(copied, tree_map(example_like, example))
        copied.meta[ORIGIN] = original
        add_site(copied, BRANCH, self.site)

    def _counterpart(self, node: Node) -> Argument:
        counterpart = self.copies.get(node, node)
        if counterpart is not node:
            return counterpart
        if node not in self._shared:
            self._shared[node] = self._share(node)
        return self._shared[node]

    def _share(self, node: Node) -> Argument:
        """What a copy takes of a node that it does not copy: no gradient, and no other items."""
        example = value_of(node)
        if self.samples is not None and self.samples.has_items(example):
            if not isinstance(example, torch.Tensor):
                return cast("Argument", self.samples.example(example))
            at = Rewriter(self.module.graph, _last_input(self.module, node))
            narrowed = self.samples.insert_narrow(at, node)
            narrowed.meta[ORIGIN] = node
            add_site(narrowed, BRANCH, self.site)
            node, example = narrowed, value_of(narrowed)
        if not isinstance(example, torch.Tensor) or not example.requires_grad:
            return node
        with self.module.graph.inserting_after(_last_input(self.module, node)):
            detached = self.module.graph.call_method("detach", (node,))
        self._describe(detached, node)
        return detached


def of_the_shape_only(target: object) -> bool:
    """Whether a function or method gives what depends on the argument's shape only."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _OF_THE_SHAPE


def _module_type(node: Node) -> str:
    path, kind = next(reversed(module_stack(node).values()), ("", type(None)))
    return f"{path} ({getattr(kind, '__name__', kind)})"


def _last_input(module: GraphModule, node: Node) -> Node:
    """Where something can be inserted that takes ``node``."""
    if node.op != "placeholder":
        return node
    *_, last = module.graph.find_nodes(op="placeholder")
    assert isinstance(last, Node)
    return last
