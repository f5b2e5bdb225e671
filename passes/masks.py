"""The masks of what drops elements at random, handed out by the live program."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from tmm.passes.samples import Samples
from tmm.passes.shared_masks import SharedMask, shared_mask


class Masks:
    """The masks of what drops elements at random, shared by all copies."""

    def __init__(self) -> None:
        self._masks: dict[Node, tuple[Node, SharedMask]] = {}

    def of(self, module: GraphModule, node: Node) -> tuple[Node, SharedMask] | None:
        """The mask that ``node`` drops with; has it handed out first."""
        if node in self._masks:
            return self._masks[node]
        shared = shared_mask(node)
        if shared is None:
            return None
        arguments = cast("dict[str, Argument]", dict(shared.arguments))
        with module.graph.inserting_before(node):
            both = module.graph.call_function(shared.with_mask, (), arguments)
            mask = module.graph.call_function(operator.getitem, (both, 1))
        both.meta = dict(node.meta)
        both.meta.pop("example_value")
        # The node itself stays, so that whoever knows it still does.
        node.target, node.args, node.kwargs = operator.getitem, (both, 0), {}
        self._masks[node] = (mask, shared)
        return self._masks[node]

    def narrowed(self, module: GraphModule, mask: Node, samples: Samples) -> Node:
        """The part of a mask that is of these items."""
        if "example_value" not in mask.meta:
            _describe(mask)
        if not samples.has_items(mask.meta["example_value"]):
            return mask
        with module.graph.inserting_after(mask):
            return samples.insert_narrow(module.graph, mask)


def _describe(mask: Node) -> None:
    (both,) = mask.all_input_nodes
    given = map_arg(both.kwargs, lambda node: cast("Argument", node.meta["example_value"]))
    fake_mode = next(value.fake_mode for value in given.values() if isinstance(value, FakeTensor))
    with fake_mode, torch.no_grad():
        mask.meta["example_value"] = both.target(**given)[1]  # type: ignore[operator]
