"""The attention inside of ``multi_head_attention_forward``, which keeps its tensors to itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg
from torch.nn import functional

from tmm.layout import ATTENTION, Site
from tmm.passes.attention_parts import FoundAttention, Mask, MaskKind
from tmm.passes.origin import add_site
from tmm.passes.shared_masks import bind, multi_head

VERSION = "1"
"""To be changed with what ``parts_of_multi_head`` computes: compiled graphs with it are cached."""


class _ReachedError(Exception):
    """The attention was reached; carries its arguments."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


def parts_of_multi_head(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """Query, key and value, and a mask if there is one, as the attention gets them.

    ``multi_head_attention_forward`` up to there; where a compiler sees both, it joins them.
    """
    given = _arguments_of_attention(arguments)
    tensors = given["query"], given["key"], given["value"], given["attn_mask"]
    return tuple(tensor for tensor in tensors if tensor is not None)


def insert_parts(graph: Graph, node: Node, site: Site) -> FoundAttention:
    """Insert the parts of a call of ``multi_head_attention_forward`` after it."""
    arguments = cast("dict[str, Argument]", dict(bind(node.target, node.args, node.kwargs)))
    examples = map_arg(arguments, lambda value: cast("Argument", value.meta["example_value"]))
    fake_mode = next(v.fake_mode for v in examples.values() if isinstance(v, FakeTensor))
    with fake_mode, torch.no_grad():
        given = _arguments_of_attention(examples)
        parts = parts_of_multi_head(**examples)
    with graph.inserting_after(node):
        call = position = graph.call_function(parts_of_multi_head, (), arguments)
    call.meta["example_value"] = parts
    add_site(call, ATTENTION, site)
    found = []
    for index, part in enumerate(parts):
        with graph.inserting_after(position):
            position = graph.call_function(operator.getitem, (call, index))
        position.meta["example_value"] = part
        add_site(position, ATTENTION, site)
        found.append(position)
    masks: tuple[Mask, ...] = ()
    if len(found) > 3:
        kind: MaskKind = "allowed" if parts[3].dtype == torch.bool else "added"
        masks = (Mask(found[3], kind),)
    query, key, value, *_ = found
    causal = bool(given["is_causal"])
    return FoundAttention(node, position, query, key, value, None, masks, causal)


def _arguments_of_attention(arguments: dict[str, Any]) -> dict[str, Any]:
    def reach(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return args[0]  # dropout of the probabilities
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        raise _ReachedError(**{"attn_mask": None, "is_causal": False, **given})

    try:
        # Without weights, torch's own function is called, with what the weights are computed from.
        multi_head(reach)(**(arguments | {"need_weights": False}))
    except _ReachedError as reached:
        return reached.arguments
    raise AssertionError("no attention was reached")
