"""The least that measuring can cost: the time to read every measured tensor once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils import _pytree as pytree


def outputs_of(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """All floating-point tensors that modules give back in one forward pass."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        found.extend(leaf.detach() for leaf in leaves if leaf.is_floating_point())

    handles = [child.register_forward_hook(keep) for child in module.modules()]
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return found


def parameters_of(module: nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def attention_inputs(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Query and key of each call of ``scaled_dot_product_attention`` in one forward pass."""
    found: list[torch.Tensor] = []
    original = nn.functional.scaled_dot_product_attention

    def keep(query: torch.Tensor, key: torch.Tensor, *rest: object, **named: object) -> object:
        found.extend((query.detach(), key.detach()))
        return original(query, key, *rest, **named)  # type: ignore[arg-type]

    nn.functional.scaled_dot_product_attention = keep  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        nn.functional.scaled_dot_product_attention = original
    return found


def reader(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Read each of the tensors once: one sum over each."""
    kept = list(tensors)

    def read() -> None:
        for tensor in kept:
            tensor.sum()

    return read


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in tensors)
