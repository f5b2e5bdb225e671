"""The reference between graphs: what is computed there is computed for it as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_flatten, tree_map

from tmm.passes.copy_nodes import of_the_shape_only
from tmm.preserve import RandomState
from tmm.reference import Reference

Place: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
"""Where in memory the elements of a tensor lie."""

_STATISTICS = ("running_mean", "running_var")  # written to, though older schemas do not say so


class Follower(TorchDispatchMode):
    """Knows the counterpart, in the reference, of each tensor of the forward pass that is running.

    It runs each operation between graphs a second time on the counterparts, with the same random
    numbers. What depends on no parameter is its own counterpart. Tensors are known by the memory
    that they lie in, so that every view and alias of one is known with it.
    """

    supports_higher_order_operators = True  # they run as they are, and are lost sight of

    def __init__(self, reference: Reference) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reference = reference
        self._pairs: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inputs: set[Place] = set()
        self._paused = False
        self.is_lost = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles what runs under this mode as ever."""
        return True

    def begin(self, inputs: object) -> None:
        """Forget the last forward pass; ``inputs`` are what this one is given."""
        self.end()
        self.is_lost = False
        given = [value for value in tree_flatten(inputs)[0] if _is_followed(value)]
        self._inputs = {_place(tensor) for tensor in given}

    def end(self) -> None:
        """Give up what belongs to the forward pass."""
        self._pairs.clear()
        self._storages.clear()
        self._inputs.clear()

    def lose(self) -> None:
        """Know no counterpart in the rest of the forward pass."""
        self.is_lost = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing in the block."""
        if _get_current_dispatch_mode() is self:  # costs nothing inside, then
            with _pop_mode_temporarily():
                yield
            return
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    def pair(self, own: object, counterpart: object) -> None:
        """Remember the counterparts of the tensors in ``own``."""
        counterparts = tree_flatten(counterpart)[0]
        for tensor, other in zip(tree_flatten(own)[0], counterparts, strict=True):
            if _is_followed(tensor) and tensor is not other:
                self._pairs[_place(tensor)] = (tensor, other)  # holds on to the memory

    def counterpart(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The counterpart of a tensor; None for one that was lost sight of."""
        if not _is_followed(tensor):
            return None
        if self.is_lost:
            return self.reference.of(tensor)
        known = self._known(tensor)
        if known is not None:
            return known
        # What a gradient flows to depends on a parameter.
        is_lost = tensor.requires_grad and _place(tensor) not in self._inputs
        return None if is_lost else tensor.detach()

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        reference = self.reference.of(tensor)
        if reference is not None:
            return reference
        if (pair := self._pairs.get(_place(tensor))) is not None:
            return pair[1]
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is None or storage[1].dtype != tensor.dtype:
            return None
        return storage[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _stop_sharing(self, tensor: torch.Tensor) -> None:
        """Give the memory of ``tensor``, and of all its views, a counterpart of its own."""
        storage = tensor.untyped_storage()
        elements = storage.nbytes() // tensor.element_size()
        copy = torch.as_strided(tensor, (elements,), (1,), 0).clone()
        self._storages[storage._cdata] = (tensor, copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and once more on the counterparts if it has any."""
        kwargs = kwargs or {}
        in_backward = torch._C._current_graph_task_id() != -1
        is_operator = isinstance(func, torch._ops.OpOverload)
        if (
            self._paused
            or self.is_lost
            or in_backward
            or torch.compiler.is_compiling()
            or not is_operator
        ):
            return func(*args, **kwargs)
        given = [value for value in tree_flatten((args, kwargs))[0] if _is_followed(value)]
        if of_the_shape_only(func.overloadpacket) or all(self._known(t) is None for t in given):
            return func(*args, **kwargs)
        written = [t for name, t in _written(func, args, kwargs) if name not in _STATISTICS]
        if any(self.reference.of(tensor) is not None for tensor in written):
            return func(*args, **kwargs)  # a parameter or buffer changes, its reference does not
        for tensor in written:
            if self._known(tensor) is None:
                self._stop_sharing(tensor)
        names = [argument.name for argument in func._schema.arguments]
        other_args = [self._argument(n, v) for n, v in zip(names, args, strict=False)]
        other_kwargs = {name: self._argument(name, value) for name, value in kwargs.items()}
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        before = RandomState.capture() if seeded else None
        result = func(*args, **kwargs)
        after = RandomState.capture() if seeded else None
        if before is not None:
            before.restore()
        counterpart = func(*other_args, **other_kwargs)
        if after is not None:
            after.restore()
        if not written or torch.Tag.inplace_view in func.tags:  # it lies elsewhere now
            self.pair(result, counterpart)
        return result

    def _argument(self, name: str, value: object) -> Any:
        """What stands for an argument of an operation."""

        def counterpart(tensor: object) -> object:
            if not _is_followed(tensor):
                return tensor
            assert isinstance(tensor, torch.Tensor)
            known = self._known(tensor)
            known = tensor if known is None else known
            return known.clone() if name in _STATISTICS else known

        return tree_map(counterpart, value)


def _is_followed(value: object) -> bool:
    """Whether a value is an ordinary tensor, whose memory can be looked at."""
    if not isinstance(value, torch.Tensor):
        return False
    plain = type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and value.layout is torch.strided and not (value.is_nested or value.is_meta)


def _place(tensor: torch.Tensor) -> Place:
    storage, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return storage, offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _written(func: Any, args: Sequence[Any], kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that an operation writes to, with the names of the arguments."""
    arguments = func._schema.arguments
    values = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in tree_flatten(values.get(argument.name))[0]:
                if _is_followed(tensor):
                    yield argument.name, tensor
