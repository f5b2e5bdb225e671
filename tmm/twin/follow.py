"""The reference between graphs: each eager operation is done for it as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from tmm.passes.copy_nodes import of_the_shape_only
from tmm.passes.mutation import overwrites
from tmm.passes.shared_masks import random_function
from tmm.preserve import RandomState
from tmm.reference import Reference

_NORMALIZATIONS = {functional.batch_norm: "training", functional.instance_norm: "use_input_stats"}
_SKIPPED = ("__get__", "grad", "backward", "register_hook", "requires_grad_", "retain_grad")


class Follower(TorchFunctionMode):
    """Knows the counterpart, in the reference, of each tensor of the forward pass that is running.

    It runs what Python calls between graphs a second time on the counterparts, without gradients
    and with the same random numbers. What depends on no parameter is its own counterpart.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = reference
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._paused = False

    def begin(self, inputs: object) -> None:
        """Forget the last forward pass; ``inputs`` are what this one is given."""
        self._pairs.clear()
        self._inputs = {id(t): t for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor)}

    def end(self) -> None:
        """Give up what belongs to the forward pass."""
        self._pairs.clear()
        self._inputs.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing in the block."""
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    def pair(self, own: object, counterpart: object) -> None:
        """Remember the counterparts of the tensors in ``own``."""
        counterparts = tree_flatten(counterpart)[0]
        for tensor, other in zip(tree_flatten(own)[0], counterparts, strict=True):
            if isinstance(tensor, torch.Tensor) and tensor is not other:
                self._pairs[id(tensor)] = (tensor, other)

    def counterpart(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The counterpart of a tensor, without a gradient; None for one that was lost sight of."""
        known = self._known(tensor)
        if known is not None:
            return known
        # What a gradient flows to depends on a parameter.
        is_lost = tensor.requires_grad and id(tensor) not in self._inputs
        return None if is_lost else tensor.detach()

    def _known(self, value: object) -> torch.Tensor | None:
        if id(value) in self._pairs:
            return self._pairs[id(value)][1]
        return self.reference.of(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and once more on the counterparts if it has any."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or self._paused or _is_skipped(func):
            return func(*args, **kwargs)
        given = [value for value in tree_flatten((args, kwargs))[0] if torch.is_tensor(value)]
        if all(self._known(tensor) is None for tensor in given) or of_the_shape_only(func):
            return func(*args, **kwargs)
        target = _overwritten(func, args, kwargs)
        if target is not None:
            if self.reference.of(target) is not None:
                return func(*args, **kwargs)  # a parameter or buffer changes, its reference not
            if id(target) not in self._pairs:
                self._pairs[id(target)] = (target, target.detach().clone())
        draws = random_function(func, args, kwargs) is not None
        before = RandomState.capture() if draws else None
        with torch.no_grad():
            other_args, other_kwargs = tree_map(self._counterpart_or_self, (args, kwargs))
        result = func(*args, **kwargs)
        if target is None and not any(map(torch.is_tensor, tree_flatten(result)[0])):
            return result
        after = RandomState.capture() if draws else None
        if before is not None:
            before.restore()
        other_args, other_kwargs = _without_statistics(func, other_args, other_kwargs)
        with torch.no_grad():
            counterpart = func(*other_args, **other_kwargs)
        if after is not None:
            after.restore()
        if target is None:
            self.pair(result, counterpart)
        return result

    def _counterpart_or_self(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        known = self._known(value)
        return value.detach() if known is None else known


def _is_skipped(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    if name == "__get__":
        return owner not in ("T", "mT", "H", "mH", "data", "real", "imag")
    return name in _SKIPPED


def _overwritten(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    if isinstance(kwargs.get("out"), torch.Tensor):
        out: torch.Tensor = kwargs["out"]
        return out
    in_place = overwrites(getattr(func, "__name__", "")) or kwargs.get("inplace") is True
    first = args[0] if args else kwargs.get("input")
    return first if in_place and isinstance(first, torch.Tensor) else None


def _without_statistics(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if func not in _NORMALIZATIONS:
        return args, kwargs
    names = ("input", "running_mean", "running_var", "weight", "bias", _NORMALIZATIONS[func])
    arguments = dict(zip((*names, "momentum", "eps"), args, strict=False)) | kwargs
    if arguments.get(_NORMALIZATIONS[func], func is functional.instance_norm):
        arguments |= {"running_mean": None, "running_var": None}
    return (), arguments
