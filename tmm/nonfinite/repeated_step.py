"""One training step without an optimizer: forward, loss, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tmm.instrumentation.outputs import tensors_in


class StepError(ValueError):
    """A loss or a step function that does not do what it is to do."""


_WENT_BACK = "the step function called backward(); let it give back the loss instead"
_REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and the tensors in it with their names."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[tuple[str, torch.Tensor], ...]

    @staticmethod
    def of(batch: object) -> Batch:
        """A tensor is one argument, a tuple or list several, a mapping those with names."""
        if isinstance(batch, Mapping):
            batch = {str(name): value for name, value in batch.items()}
        tensors = tuple((f"batch{path}", tensor) for path, tensor in tensors_in(batch))
        if isinstance(batch, dict):
            return Batch((), batch, tensors)
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        return Batch(args, {}, tensors)


@dataclass
class Ran:
    """What a step gave, as far as it got."""

    output: object = None
    loss: torch.Tensor | None = None
    gradients: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    has_loss: bool = False
    went_back: bool = False
    note: str = ""


def run_step(
    ran: Ran,
    callee: Callable[..., Any],
    batch: Batch,
    loss: Callable[[Any], torch.Tensor] | None,
    *,
    backward: bool,
    modules: Sequence[torch.nn.Module],
) -> None:
    """Run the step, and keep in ``ran`` what it gives.

    Gradients go nowhere else: neither ``.grad`` nor the hooks of a parameter's accumulation see
    them. Raises ``StepError`` for a loss that is not one number, and for a ``callee`` that computes
    gradients itself.
    """
    before = _gradients(modules)
    ran.output = callee(*batch.args, **batch.kwargs)
    if _gradients(modules) != before:
        raise StepError(_WENT_BACK)
    ran.loss = loss_in(ran.output) if loss is None else loss(ran.output)
    if loss is not None and not is_number(ran.loss):
        raise StepError(f"loss= returned {_described(ran.loss)}; it must return one number")
    ran.has_loss = ran.loss is not None
    if not backward:
        return
    if ran.loss is None:
        ran.note = "no backward pass: the output is, and has, no loss; give loss= to have one"
    elif not ran.loss.requires_grad:
        ran.note = "no backward pass: the loss does not require a gradient"
    else:
        try:
            ran.gradients = gradients_of(ran.loss, modules)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise StepError(_WENT_BACK) from error  # and set its gradients to None again
            raise
        ran.went_back = True


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return repr(value)


def _gradients(modules: Sequence[torch.nn.Module]) -> list[tuple[int, int]]:
    """Something that differs once gradients were accumulated."""
    gradients = [p.grad for module in modules for p in module.parameters()]
    return [(id(g), 0 if g is None or g.is_inference() else g._version) for g in gradients]


def is_number(value: object) -> bool:
    """Whether a value is a tensor of one number that may have a gradient."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point()


def loss_in(output: object) -> torch.Tensor | None:
    """The loss that an output is or, under that name, has."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    for value in (output, named):
        if is_number(value):
            assert isinstance(value, torch.Tensor)
            return value
    return None


def gradients_of(
    loss: torch.Tensor, modules: Sequence[torch.nn.Module]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradient of every leaf that ``loss`` depends on, with the leaf."""
    leaves, is_reentrant = _leaves(loss)
    if is_reentrant:
        inner = [p for module in modules for p in module.parameters()]
        return _accumulated(loss, list(dict.fromkeys([*leaves, *inner])))
    if not leaves:
        return []
    loss = loss.reshape(()) if loss.dim() else loss
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]


def _leaves(loss: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """The leaves, and whether a part was checkpointed in the way that hides its own."""
    if loss.grad_fn is None:
        return [loss], False
    leaves: list[torch.Tensor] = []
    is_reentrant = False
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        is_reentrant |= node.name() == _REENTRANT
        if (leaf := getattr(node, "variable", None)) is not None and not node.next_functions:
            leaves.append(leaf)
        left += [following for following, _ in node.next_functions]
    return leaves, is_reentrant


def _accumulated(
    loss: torch.Tensor, leaves: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients by ``loss.backward()``, the only way into reentrant checkpoints."""
    with _no_gradients(leaves):
        loss.backward()
        return [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]


@contextmanager
def _no_gradients(leaves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Set gradients, and hooks that run after their accumulation, aside."""
    kept = [(leaf, leaf.grad, leaf._post_accumulate_grad_hooks) for leaf in leaves]
    try:
        for leaf, _, _ in kept:
            leaf.grad = None
            leaf._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for leaf, gradient, hooks in kept:
            leaf.grad = gradient
            leaf._post_accumulate_grad_hooks = hooks


@contextmanager
def autocast_without_cache() -> Iterator[None]:
    """The autocast contexts that are open, without use of the casts that they keep."""
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        devices.add(accelerator.type)
    with ExitStack() as stack:
        for device in sorted(devices):
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield
