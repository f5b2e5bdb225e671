"""Dropout that hands out its mask, so that a copy of a graph can drop the same elements.

Each replacement draws the random numbers that the original draws, in the same order, and gives the
same result bit for bit: eagerly and as AOTAutograd traces it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from tmm.core.torch_private import attention_math
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.random_operators import known_to_draw
from tmm.passes.graph.values import value_of

VERSION = "2"
"""To be changed with what these functions compute: compiled graphs with them are cached."""

Arguments: TypeAlias = Mapping[str, Any]

_BY_CHANNEL: Mapping[Callable[..., Any], int | None] = {
    functional.dropout1d: 3,
    functional.dropout2d: None,
    functional.dropout3d: 5,
}
"""Dropouts of whole channels, and how many dimensions a batch has: without, it is one item."""

_ATTENTION = functional.scaled_dot_product_attention
ATTENTIONS = (_ATTENTION,)
"""The functions that compute an attention as a whole, with the arguments of torch's."""

_MULTI_HEAD = functional.multi_head_attention_forward
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_RANDOM = (
    *(functional.alpha_dropout, functional.feature_alpha_dropout, functional.gumbel_softmax),
    *(functional.rrelu, functional.fractional_max_pool2d, functional.fractional_max_pool3d),
    *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.binomial),
)
_GENERATORS = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")
_RANDOM_METHODS = (
    *("bernoulli", "multinomial", "bernoulli_", "cauchy_", "exponential_", "geometric_"),
    *("log_normal_", "normal_", "random_", "uniform_"),
)


def dropout_with_mask(input: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``dropout(x, p)`` of training, and its mask."""
    if torch.compiler.is_compiling() or input.device.type != "cpu":
        return torch.native_dropout(input, p, True)  # as AOTAutograd makes of it, or a GPU runs
    noise = functional.dropout(torch.ones_like(input), p, True)
    return input * noise, noise


def dropout_by_mask(mask: torch.Tensor, input: torch.Tensor, p: float) -> torch.Tensor:
    """What is left of ``input`` by a mask of any dropout here."""
    if mask.dtype != torch.bool:
        return input * mask
    return input * mask * (1 / (1 - p) if p < 1 else 0.0)


def dropout_in_place_with_mask(input: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``dropout(x, p, inplace=True)`` of training, and its mask."""
    noise = functional.dropout(torch.ones_like(input), p, True, True)
    return input.mul_(noise), noise


def channel_dropout_with_mask(
    input: torch.Tensor, p: float, dimensions: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dropout1d`` and its siblings, of training, and the mask; a batch has ``dimensions``."""
    ones = torch.ones_like(input)
    if dimensions is None or input.dim() == dimensions:
        noise = torch.feature_dropout(ones, p, True)
    else:
        noise = torch.feature_dropout(ones.unsqueeze(0), p, True).squeeze(0)
    return input * noise, noise


def channel_dropout_by_mask(
    mask: torch.Tensor, input: torch.Tensor, p: float, dimensions: int | None
) -> torch.Tensor:
    """The same with a mask that is given."""
    return input * mask


def attention_with_mask(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_dot_product_attention`` with dropout, as a CPU computes it, and the mask."""
    p = arguments.pop("dropout_p")
    weights, value = _attention_weights(**arguments)
    dropped, mask = dropout_with_mask(weights, p)
    return torch.matmul(dropped, value).to(arguments["query"].dtype), mask


def attention_by_mask(mask: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The same attention with a mask that is given."""
    p = arguments.pop("dropout_p")
    weights, value = _attention_weights(**arguments)
    dropped = dropout_by_mask(mask, weights, p)
    return torch.matmul(dropped, value).to(arguments["query"].dtype)


def multi_head_attention_with_mask(**arguments: Any) -> tuple[Any, torch.Tensor]:
    """``multi_head_attention_forward`` with dropout, and the mask."""
    masks: list[torch.Tensor] = []

    def keep(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shared = _shared(function, args, kwargs)
        if shared is None:
            return function(*args, **kwargs)
        result, mask = shared.with_mask(**shared.arguments)
        masks.append(mask)
        return result

    result = multi_head(keep)(**arguments)
    (mask,) = masks
    return result, mask


def multi_head_attention_by_mask(mask: torch.Tensor, **arguments: Any) -> Any:
    """The same with a mask that is given."""

    def use(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shared = _shared(function, args, kwargs)
        if shared is None:
            return function(*args, **kwargs)
        return shared.by_mask(mask, **shared.arguments)

    return multi_head(use)(**arguments)


def multi_head(call: Callable[..., Any]) -> Callable[..., Any]:
    """``multi_head_attention_forward`` that drops elements by way of ``call``."""
    own = {
        "dropout": functools.partial(call, functional.dropout),
        "scaled_dot_product_attention": functools.partial(call, _ATTENTION),
        "has_torch_function": lambda _: False,  # a mode would have the original called
    }
    return types.FunctionType(
        _MULTI_HEAD.__code__,
        _MULTI_HEAD.__globals__ | own,
        argdefs=_MULTI_HEAD.__defaults__,
    )


def _attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights before dropout, and the values for them, in the dtype that torch computes them in."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
        attn_mask = torch.zeros_like(allowed, dtype=wide).masked_fill(~allowed, float("-inf"))
    elif attn_mask is not None:
        attn_mask = attn_mask.to(wide)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    _, weights = attention_math(query, key, value, attn_mask, 0.0, is_causal, None, scale=scale)
    return weights, value


FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    dropout_with_mask: dropout_by_mask,
    dropout_in_place_with_mask: dropout_by_mask,
    channel_dropout_with_mask: channel_dropout_by_mask,
    attention_with_mask: attention_by_mask,
    multi_head_attention_with_mask: multi_head_attention_by_mask,
}
"""What hands out a mask, and what takes it: they stand in rewritten graphs."""


@dataclass(frozen=True)
class SharedMask:
    """A call that drops something at random: what replaces it, and the replacement's arguments."""

    with_mask: Callable[..., tuple[Any, torch.Tensor]]
    arguments: Arguments

    @property
    def by_mask(self) -> Callable[..., Any]:
        """What computes the same with a given mask, its first argument."""
        return FUNCTIONS[self.with_mask]


def shared_mask(node: Node) -> SharedMask | None:
    """What replaces ``node``, if it drops something and can hand out the mask."""
    if node.op != "call_function":
        return None
    return _shared(node.target, node.args, node.kwargs)


def draws_by_itself(node: Node) -> str | None:
    """The name of an operation whose random numbers cannot be shared with a copy of it."""
    if node.op == "call_method":
        return str(node.target) if node.target in _RANDOM_METHODS else None
    if node.op != "call_function" or shared_mask(node) is not None:
        return None
    return random_function(node.target, node.args, node.kwargs)


def draws_random_numbers(module: GraphModule) -> bool:
    """Whether a traced graph, or one nested in it, draws any random numbers."""
    return any(
        shared_mask(node) is not None
        or draws_by_itself(node) is not None
        or str(getattr(node.target, "__name__", node.target)) in _GENERATORS
        for node in all_nodes(module)
    )


def random_function(target: Any, args: Any, kwargs: Any) -> str | None:
    """The name of a function whose result depends on random numbers and on its arguments."""
    name = str(getattr(target, "__name__", target))
    drops = target in (functional.dropout, torch.dropout, *_BY_CHANNEL, *ATTENTIONS, _MULTI_HEAD)
    if not drops and target not in _RANDOM:
        if name in _GENERATORS:
            return None  # what they draw depends on a shape only
        forms = known_to_draw(target, args, kwargs)
        return name if name in _RANDOM_METHODS or any(map(_is_active, forms)) else None
    return name if _is_active(bind(target, args, kwargs)) else None


def _is_active(arguments: Arguments) -> bool:
    active = arguments.get("training", arguments.get("train", True)) is not False
    return active and _probability(arguments) != 0


def _shared(target: Any, args: Any, kwargs: Any) -> SharedMask | None:
    plain = target in (functional.dropout, torch.dropout)
    if not plain and target not in (*_BY_CHANNEL, *ATTENTIONS, _MULTI_HEAD):
        return None
    arguments = dict(bind(target, args, kwargs))
    p = _probability(arguments)
    training = arguments.get("training", arguments.get("train", True))
    if training is not True or not isinstance(p, float) or not p:
        return None
    if target is _MULTI_HEAD:
        return SharedMask(multi_head_attention_with_mask, arguments) if _on_cpu(arguments) else None
    if target in ATTENTIONS:
        return SharedMask(attention_with_mask, arguments) if _on_cpu(arguments) else None
    needed = {"input": arguments["input"], "p": p}
    in_place = arguments.get("inplace") is True
    if not plain:
        dimensions = {"dimensions": _BY_CHANNEL[target]}
        return None if in_place else SharedMask(channel_dropout_with_mask, needed | dimensions)
    return SharedMask(dropout_in_place_with_mask if in_place else dropout_with_mask, needed)


def _probability(arguments: Arguments) -> Any:
    default = 0.0 if "query" in arguments else 0.5
    return arguments.get("p", arguments.get("dropout_p", arguments.get("dropout", default)))


def _on_cpu(arguments: Arguments) -> bool:
    """Whether attention runs on a CPU, which has no fused kernel with dropout."""
    query = arguments["query"]
    example = value_of(query) if isinstance(query, Node) else query
    return isinstance(example, torch.Tensor) and example.device.type == "cpu"


def bind(target: Any, args: Any, kwargs: Any) -> Arguments:
    """The arguments of a call by name; those by position only where the signature is known."""
    if target in ATTENTIONS:
        return dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | dict(kwargs)
    if target is torch.dropout:
        return dict(zip(("input", "p", "train"), args, strict=False)) | dict(kwargs)
    try:
        return inspect.signature(target).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict(kwargs)
