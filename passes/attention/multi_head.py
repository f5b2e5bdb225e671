"""The attention inside of ``multi_head_attention_forward``, which keeps its tensors to itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg
from torch.nn import functional

from tmm.core.families import ATTENTION
from tmm.core.records import Site
from tmm.core.torch_private import FakeTensor
from tmm.passes.attention.found import FoundAttention, Mask
from tmm.passes.graph.dropout_functions import Arguments, bind, multi_head
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import value_of

VERSION = "2"
"""To be changed with what ``parts_of_multi_head`` computes: compiled graphs with it are cached."""


class _ReachedError(Exception):
    """The attention was reached; carries its arguments."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


def parts_of_multi_head(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """Query, key and value, and a mask if there is one, as the attention gets them.

    ``multi_head_attention_forward`` up to there; where a compiler sees both, it joins them.
    """
    return _tensors(_arguments_of_attention(arguments))


def _tensors(given: Arguments) -> tuple[torch.Tensor, ...]:
    tensors = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    return tuple(tensor for tensor in tensors if tensor is not None)


def insert_parts(graph: Graph, node: Node, site: Site) -> FoundAttention:
    """Insert the parts of a call of ``multi_head_attention_forward`` after it."""
    arguments = cast("dict[str, Argument]", dict(bind(node.target, node.args, node.kwargs)))
    examples = map_arg(arguments, lambda value: cast("Argument", value_of(value)))
    fake_mode = next(v.fake_mode for v in examples.values() if isinstance(v, FakeTensor))
    with fake_mode, torch.no_grad():
        given = _arguments_of_attention(examples)
    at, parts = Rewriter(graph, node), _tensors(given)
    call = at.add("call_function", parts_of_multi_head, (), arguments, parts)
    found = [at.call(operator.getitem, call, index) for index in range(len(parts))]
    at.credit(ATTENTION.name, site)
    query, key, value, *masks = found
    causal = bool(given.get("is_causal", False))
    return FoundAttention(
        *(node, at.last, query, key, value, None),
        masks=tuple(map(Mask.of, masks)),
        is_causal=causal,
    )


def _arguments_of_attention(arguments: dict[str, Any]) -> Arguments:
    def reach(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return args[0]  # dropout of the probabilities
        raise _ReachedError(bind(function, args, kwargs))

    settings = arguments | {"need_weights": False}
    if arguments.get("need_weights", True):
        # The weights follow the mask that is given; `is_causal` then only says what it looks like,
        # and does not know of the keys that `bias_k` and `add_zero_attn` append.
        settings["is_causal"] = False
    try:
        # Without weights, torch's own function is called, with what the weights are computed from.
        multi_head(reach)(**settings)
    except _ReachedError as reached:
        return reached.arguments
    raise AssertionError("no attention was reached")
