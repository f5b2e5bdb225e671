"""One training of a coordinate check: a few steps on batches of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from tmm.core.torch_private import tree_map

Batch: TypeAlias = tuple[Any, Any]
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def copied(batches: list[Batch]) -> list[Batch]:
    """Batches that a model and a loss may write to, as no other training sees that."""
    copies: list[Batch] = tree_map(_copy, batches)
    return copies


def _copy(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def train(
    model: Callable[..., Any], optimizer: Optimizer, batches: Iterable[Batch], loss: Loss
) -> None:
    """Take a step for each batch, by a closure where the optimizer asks for one.

    Raises TypeError if ``loss`` gives anything but one number.
    """
    for batch in batches:
        backward = partial(_go_backward, model, optimizer, batch, loss)
        if _needs_closure(optimizer):
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()


def _go_backward(
    model: Callable[..., Any], optimizer: Optimizer, batch: Batch, loss: Loss
) -> float:
    inputs, targets = batch
    optimizer.zero_grad()
    value: object = loss(forward(model, inputs), targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError("loss= must return a tensor with one element, such as a mean")
    value.backward()
    return float(value.detach())


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer computes gradients itself, as ``LBFGS`` does."""
    parameters = list(signature(optimizer.step).parameters.values())
    return bool(parameters) and (
        parameters[0].default is Parameter.empty
        and parameters[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    )


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output; a mapping has its arguments by name."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
