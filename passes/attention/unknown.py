"""What looks like an attention and is none that is known, so that it can be named at least.

The rule: weights that were made, by something that is not linear, of a product of two activations,
and that weigh a third one. Layers, whose products are with parameters, routers, which choose by
such a layer, and losses, which weigh nothing by their probabilities, are no attention.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from tmm.core.torch_private import OpOverload
from tmm.passes.attention.found import Unmatched
from tmm.passes.attention.softmax_pattern import is_softmax
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.values import value_of

_PRODUCTS = ("matmul", "__matmul__", "bmm", "mm", "einsum", "baddbmm", "linear", "tensordot")
_OTHERS = ("embedding", "attention", "attn", "lstm", "gru", "_like")
"""Parts of the names of operations behind which something new begins."""

_NORMALIZING = ("softmax", "softmin", "exp", "sparsemax", "entmax")
_BENDING = (
    *("sigmoid", "relu", "elu", "softplus", "square", "pow", "clamp", "maximum", "sort", "topk"),
    *_NORMALIZING,
)
"""Parts of the names of operations that make weights of logits."""

_INDEXING = ("getitem", "index_select", "gather", "take", "index")
_MOVING = ("getattr", "getitem", "view", "reshape", "transpose", "permute", "unsqueeze", "to")
_MOST_NAMES = 6
_LONGEST_TRAIL = 32  # operations that are remembered
_NO_HEADS = "written out by hand; which dimension has the heads is not known"


@dataclass(frozen=True)
class _Trail:
    """How a tensor came from a product: by which operations, in order.

    ``is_direct`` tells that the product is of two activations and that no layer came after it.
    """

    product: Node
    is_direct: bool = True
    operations: tuple[str, ...] = ()
    softmax: Node | None = None
    normalizes: bool = False
    bends: bool = False


class Products:
    """Where the products of two activations of a graph lead to.

    ``made_of_product`` are the tensors that were made of one, by anything but weighing.
    """

    def __init__(self, module: GraphModule) -> None:
        self._trails: dict[Node, _Trail] = {}
        self._weighing: list[tuple[Node, _Trail]] = []
        activations: set[Node] = set()
        for node in module.graph.nodes:
            if sites_of(node) or node.op == "output":
                continue
            if _is_activation(node, activations):
                activations.add(node)
            if node.op not in ("call_function", "call_method"):
                continue
            trail = _weights(node, self._trails, activations)
            if trail is not None:
                self._weighing.append((node, trail))
            elif (trail := _trail(node, self._trails, activations)) is not None:
                self._trails[node] = trail

    @property
    def made_of_product(self) -> Collection[Node]:
        """Tensors that logits or weights of an attention may be."""
        return self._trails.keys()

    def unknown_attention(self, known: Collection[Node]) -> Iterator[Unmatched]:
        """The attentions that are written out in a way that is not known, each once.

        ``known`` are the products and softmaxes of those that are.
        """
        named = set(known)
        for node, trail in self._weighing:
            if trail.product not in named and trail.softmax not in named:
                named.add(trail.product)
                yield Unmatched(trail.product, _reason(node, trail), is_numbered=False)


def _reason(weighing: Node, trail: _Trail) -> str:
    if _dimensions(weighing) < 3:
        return _NO_HEADS
    names = list(dict.fromkeys(name for name in trail.operations if name not in _MOVING))
    more = ", ..." if len(names) > _MOST_NAMES else ""
    return (
        "written out by hand; its weights come from the product of query and key by way of"
        f" {', '.join(names[:_MOST_NAMES])}{more}, which is no softmax of these logits alone"
    )


def _weights(
    node: Node, trails: dict[Node, _Trail], activations: Collection[Node]
) -> _Trail | None:
    """The trail of the weights, where ``node`` weighs another activation by some."""
    factors = _factors(node)
    if factors is None:
        return None
    for place, (weights, values) in enumerate((factors, factors[::-1])):
        trail = trails.get(weights)
        if trail is None or values not in activations or not (trail.bends and trail.is_direct):
            continue
        # Activations that are no weights may stand on the right of a product.
        if place == 0 or trail.normalizes:
            return trail
    return None


def _trail(node: Node, trails: dict[Node, _Trail], activations: Collection[Node]) -> _Trail | None:
    factors = _factors(node)
    if factors is not None and factors[1] in activations:
        return _Trail(node, is_direct=factors[0] in activations)
    name, example = _name(node), value_of(node)
    if isinstance(example, torch.Tensor) and not example.is_floating_point():
        return None  # a mask, say
    found = [trails[source] for source in node.all_input_nodes if source in trails]
    if not found or any(part in name for part in _OTHERS):
        return None
    trail = next((trail for trail in found if trail.bends), found[0])
    is_layer = factors is not None or "conv" in name or "norm" in name
    return replace(
        trail,
        is_direct=trail.is_direct and not is_layer,
        operations=(*trail.operations, name)[:_LONGEST_TRAIL],
        softmax=node if "softmax" in name or is_softmax(node) else trail.softmax,
        normalizes=trail.normalizes or any(part in name for part in _NORMALIZING),
        bends=trail.bends or any(part in name for part in _BENDING),
    )


def _factors(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that ``node`` multiplies and sums over, in order."""
    name = _name(node)
    if name == "sum":
        return _factors_of_sum(node)
    if name.rstrip("_") not in _PRODUCTS:
        return None
    tensors = [node_ for node_ in node.all_input_nodes if _dimensions(node_) > 1]
    if name.startswith("baddbmm"):
        tensors = tensors[-2:]
    return (tensors[0], tensors[1]) if len(tensors) > 1 else None


def _factors_of_sum(node: Node) -> tuple[Node, Node] | None:
    """The same of a product that is summed over, of tensors that are spread over each other."""
    (product, *_) = node.all_input_nodes
    if _name(product) not in ("mul", "__mul__", "multiply") or len(product.all_input_nodes) != 2:
        return None
    left, right = product.all_input_nodes
    if min(_dimensions(left), _dimensions(right)) < 2:
        return None
    shapes = [value_of(factor).shape for factor in (left, right)]
    if len(shapes[0]) != len(shapes[1]) or 1 not in (*shapes[0][-3:], *shapes[1][-3:]):
        return None
    spread = [
        dimension
        for dimension, sizes in enumerate(zip(*shapes, strict=True))
        if sizes[0] != sizes[1] and 1 in sizes
    ]
    return (left, right) if spread else None


def _is_activation(node: Node, activations: Collection[Node]) -> bool:
    """Whether a tensor depends on what the graph computes with, besides parameters and buffers."""
    if node.op == "placeholder":
        name, example = str(node.target), value_of(node)
        held = "_parameters_" in name or "_buffers_" in name
        return not held and not isinstance(example, torch.nn.Parameter)
    if node.op not in ("call_function", "call_method"):
        return False
    sources = node.all_input_nodes
    if sources and _name(node) in _INDEXING and _dimensions(sources[0]) > 2:
        return sources[0] in activations  # the weights of experts that were chosen
    return any(source in activations for source in sources)


def _dimensions(node: Node) -> int:
    example = value_of(node)
    return example.dim() if isinstance(example, torch.Tensor) else 0


def _name(node: Node) -> str:
    target = node.target
    if target in (operator.matmul, operator.imatmul):
        return "matmul"
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))
