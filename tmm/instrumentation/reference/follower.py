"""The reference between graphs: what is computed there is computed for it as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tmm.core.rng import RandomState
from tmm.core.torch_private import (
    OpOverload,
    TorchDispatchMode,
    current_graph_task_id,
    get_current_dispatch_mode,
    pop_mode_temporarily,
    tree_flatten,
    tree_leaves,
    tree_map,
)
from tmm.core.wrapped_tensors import innermost, is_wrapper, like_wrapper
from tmm.instrumentation.reference.operations import (
    Place,
    awaited,
    difference,
    followed_in,
    is_followed,
    place_of,
    written_by,
)
from tmm.passes.reference.clone_nodes import of_the_shape_only
from tmm.spec.reference import Reference

_STATISTICS = ("running_mean", "running_var")  # written to, though older schemas do not say so

_READ = "the program read values of a tensor"

UNSEEN = "it was computed on a way that tmm does not see"
"""Why a tensor that depends on parameters, and whose counterpart is not known, is not compared."""


class Follower(TorchDispatchMode):
    """Knows the counterpart, in the reference, of each tensor of the forward pass that is running.

    It runs each operation between graphs a second time on the counterparts, with the same random
    numbers. What depends on no parameter is its own counterpart. Tensors are known by the memory
    that they lie in, so that every view and alias of one is known with it. Where the program reads
    a value from a tensor that is another one in the reference, the reference would go on in
    another way: the rest of the forward pass is ``lost``, for a reason that it tells. ``has_read``
    says that such a value was read, whether it was another one or not.

    What is lost on one rank need not be on another. Where ranks share tensors, operations are
    repeated even so (``is_over`` stays false): each collective of a rank needs those of others.
    """

    supports_higher_order_operators = True  # they run as they are, and are lost sight of

    def __init__(self, reference: Reference) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reference = reference
        self.lost = ""
        self.has_read = False
        self._pairs: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._unknown: dict[int, tuple[torch.Tensor, str]] = {}
        self._independent: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._inputs: set[Place] = set()
        self._paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles what runs under this mode as ever."""
        return True

    def begin(self, inputs: object) -> None:
        """Forget the last forward pass; ``inputs`` are what this one is given."""
        self.end()
        self.lost, self.has_read = "", False
        self._inputs = {place_of(tensor) for tensor in followed_in(inputs)}
        self.reference.look()

    def end(self) -> None:
        """Give up what belongs to the forward pass."""
        self._pairs.clear()
        self._storages.clear()
        self._unknown.clear()
        self._independent.clear()
        self._inputs.clear()

    def lose(self, reason: str) -> None:
        """Know no counterpart in the rest of the forward pass."""
        self.lost = self.lost or reason

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing in the block."""
        if get_current_dispatch_mode() is self:  # costs nothing inside, then
            with pop_mode_temporarily():
                yield
            return
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    def pair(self, own: object, counterpart: object) -> None:
        """Remember the counterparts of the tensors in ``own``."""
        for tensor, other in zip(innermost(own), innermost(counterpart), strict=True):
            if is_followed(tensor) and tensor is not other:
                self._pairs[place_of(tensor)] = (tensor, other)  # holds on to the memory

    def overwritten(self, own: torch.Tensor, counterpart: torch.Tensor) -> None:
        """Remember the counterpart of a tensor that a graph has overwritten."""
        if own.untyped_storage().nbytes() != own.numel() * own.element_size():
            self.forget([own], "a graph overwrote a part of the memory that it lies in")
            return
        self._stop_sharing(own)
        known = self._known(own)
        assert known is not None
        known.copy_(counterpart)

    def forget(self, tensors: object, reason: str) -> None:
        """Know no counterpart of these tensors, nor of what lies in the same memory."""
        for tensor in followed_in(tensors):
            self._unknown[tensor.untyped_storage()._cdata] = (tensor, reason)

    def note_independent(self, tensors: object, *, is_constant: bool) -> None:
        """These tensors, which may come to require a gradient, depend on no parameter."""
        for tensor in followed_in(tensors):
            storage = tensor.untyped_storage()
            known = self._independent.get(storage._cdata, (None, True))[1]
            self._independent[storage._cdata] = StorageWeakRef(storage), is_constant and known

    def counterpart(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The counterpart of a tensor; None where ``why_unknown`` gives a reason."""
        if self.is_over or self.why_unfollowed(tensor):
            return None
        known = self._within(tensor) if is_wrapper(tensor) else self._known(tensor)
        return tensor.detach() if known is None else known

    def _within(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The counterpart of a tensor that holds others; None where those are their own."""
        if all(self._known(inner) is None for inner in followed_in(tensor)):
            return None

        def counterpart(inner: torch.Tensor) -> torch.Tensor:
            known = self._within(inner) if is_wrapper(inner) else self._known(inner)
            return inner.detach() if known is None else known

        return like_wrapper(tensor, counterpart)

    def why_unknown(self, tensor: torch.Tensor) -> str:
        """Why a tensor is not compared with its counterpart; empty if it is."""
        return self.lost or self.why_unfollowed(tensor)

    @property
    def is_over(self) -> bool:
        """Whether nothing is followed in the rest of the forward pass."""
        return bool(self.lost) and not self.reference.is_shared

    def why_unfollowed(self, tensor: torch.Tensor) -> str:
        """Why the counterpart of a tensor is not known; empty if it is."""
        if is_wrapper(tensor):
            return self._why_unknown_within(tensor)
        if not is_followed(tensor):
            return f"a {type(tensor).__name__} of layout {tensor.layout} is not followed"
        return self._why_unknown(tensor)

    def read(self, tensor: torch.Tensor) -> None:
        """Python reads all values of a tensor."""
        if is_wrapper(tensor):
            for inner in followed_in(tensor):
                self.read(inner)
            return
        if self._paused or self.lost or not is_followed(tensor):
            return
        with self.paused(), torch.no_grad():
            if reason := self._why_unknown(tensor):
                self.lose(f"{_READ} that has no counterpart: {reason}")
            elif (known := self._known(tensor)) is not None:
                self.has_read = True
                if not torch.equal(tensor, known):
                    self.lose(f"{_READ} that has others in the reference")

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made in this forward pass, of no other tensor."""
        if self.is_over or not is_followed(tensor):
            return False
        storage = tensor.untyped_storage()._cdata
        is_other = storage in self._storages or storage in self._unknown
        _, is_constant = self._independent.get(storage, (None, False))
        return is_constant and not is_other and place_of(tensor) not in self._pairs

    def depends(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on a parameter, or may."""
        return bool(self.why_unknown(tensor)) or self._known(tensor) is not None

    def _why_unknown_within(self, wrapper: torch.Tensor) -> str:
        """The same of a tensor that holds others: which need no gradient where it needs one."""
        held = list(innermost(wrapper))
        if not all(map(is_followed, held)):
            return f"a {type(wrapper).__name__} of other tensors is not followed"
        needs_gradient = wrapper.requires_grad
        reasons = (self._why_unknown(t, needs_gradient=needs_gradient) for t in held)
        return next(filter(None, reasons), "")

    def _why_unknown(self, tensor: torch.Tensor, *, needs_gradient: bool = False) -> str:
        storage = tensor.untyped_storage()._cdata
        if storage in self._unknown:
            return self._unknown[storage][1]
        if storage in self._storages and self._storages[storage][1].dtype != tensor.dtype:
            return "memory that was overwritten is read in another dtype"
        if self._known(tensor) is not None:
            return ""
        if (reason := self.reference.why_not(tensor)) is not None:
            return reason
        # What a gradient flows to depends on a parameter.
        needs_gradient = needs_gradient or tensor.requires_grad
        is_seen = not needs_gradient or place_of(tensor) in self._inputs
        return "" if is_seen or storage in self._independent else UNSEEN

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage[1].dtype == tensor.dtype:
            return storage[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if (pair := self._pairs.get(place_of(tensor))) is not None:
            return pair[1]
        return self.reference.of(tensor)

    def _make_writable(self, tensor: torch.Tensor) -> None:
        """Let the counterpart of ``tensor`` be one that may be written to."""
        storage = tensor.untyped_storage()._cdata
        if storage in self._storages:
            return
        known = self._known(tensor)
        if (
            known is None
            or known.untyped_storage()._cdata == storage
            or self.reference.keeps(known)
        ):
            self._stop_sharing(tensor)

    def _stop_sharing(self, tensor: torch.Tensor) -> None:
        """Give the memory of ``tensor``, and of all its views, a counterpart of its own."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        elements = storage.nbytes() // tensor.element_size()
        copy = torch.as_strided(tensor.detach(), (elements,), (1,), 0).clone()
        others = [pair for place, pair in self._pairs.items() if place[0] == storage._cdata]
        held = self.reference.lying_in(storage._cdata)
        for own, counterpart in (*held, *others):
            if own.dtype == copy.dtype:
                geometry = own.shape, own.stride(), own.storage_offset()
                copy.as_strided(*geometry).copy_(counterpart)
        self._storages[storage._cdata] = (tensor, copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and once more on the counterparts if it has any."""
        kwargs = kwargs or {}
        in_backward = current_graph_task_id() != -1
        if self._paused or self.is_over or in_backward or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        is_operator = isinstance(func, OpOverload)
        if is_operator and (wrappers := [*filter(is_wrapper, tree_leaves((args, kwargs)))]):
            reasons = (self._why_unknown_within(wrapper) for wrapper in wrappers)
            if UNSEEN in reasons:
                self.lose(UNSEEN)
            return NotImplemented  # what it does with the tensors inside is seen
        given = list(followed_in((args, kwargs)))
        if reason := self._why_not(func, given):
            result = func(*args, **kwargs)
            self._give_up(func, args, kwargs, result, reason)
            return result
        follows = any(self._known(tensor) is not None for tensor in given)
        if not follows or not is_operator or of_the_shape_only(func.overloadpacket):
            result = func(*args, **kwargs)
            of = [self._independent.get(t.untyped_storage()._cdata, (None, False)) for t in given]
            is_constant = all(constant for _, constant in of)
            overwritten = [] if is_constant else [t for _, t in written_by(func, args, kwargs)]
            self.note_independent((result, overwritten), is_constant=is_constant)
            return result
        written = [t for name, t in written_by(func, args, kwargs) if name not in _STATISTICS]
        for tensor in written:
            self._make_writable(tensor)
        names = [argument.name for argument in func._schema.arguments]
        other_args = [self._argument(n, v) for n, v in zip(names, args, strict=False)]
        other_kwargs = {name: self._argument(name, value) for name, value in kwargs.items()}
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        before = RandomState.capture() if seeded else None
        result = func(*args, **kwargs)
        after = RandomState.capture() if seeded else None
        if before is not None:
            before.restore()
        try:
            counterpart = func(*other_args, **other_kwargs)
            awaited(func, counterpart)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            # The program would fail, or would not have come here.
            self.lose(f"{func} fails for the reference: {str(error).partition(chr(10))[0]}")
            counterpart = _as_own(result)
        finally:
            if after is not None:
                after.restore()
        if not isinstance(result, torch.Tensor):
            leaves = tree_flatten(result)[0]
            self.has_read = self.has_read or not all(map(is_followed, leaves))
        if reason := difference(func, result, counterpart):
            self.lose(reason)
            counterpart = _as_own(result)
        if not self.is_over and (
            not written or torch.Tag.inplace_view in func.tags
        ):  # it lies elsewhere now
            self.pair(result, counterpart)
        return result

    def _why_not(self, func: Any, given: Sequence[torch.Tensor]) -> str:
        """Why an operation cannot be followed; empty if it can."""
        for tensor in given:
            if reason := self._why_unknown(tensor):
                return reason
        if not isinstance(func, OpOverload) and any(map(self.depends, given)):
            return f"it was computed inside of {func}, which is not followed"
        return ""

    def _give_up(self, func: Any, args: Any, kwargs: Any, result: Any, reason: str) -> None:
        """What an operation gave and wrote to has no counterpart."""
        leaves = tree_flatten(result)[0]
        if any(isinstance(leaf, (bool, int, float, complex)) for leaf in leaves):
            self.has_read = True
            self.lose(f"{_READ} that has no counterpart: {reason}")
        self.forget(result, reason)
        self.forget([tensor for _, tensor in written_by(func, args, kwargs)], reason)

    def _argument(self, name: str, value: object) -> Any:
        """What stands for an argument of an operation."""

        def counterpart(tensor: object) -> object:
            if not is_followed(tensor):
                return tensor
            assert isinstance(tensor, torch.Tensor)
            known = self._known(tensor)
            known = tensor if known is None else known
            return known.clone() if name in _STATISTICS else known

        return tree_map(counterpart, value)


def _as_own(result: object) -> Any:
    """What goes on as the counterpart of a result where there is none, and nothing is compared."""
    return tree_map(lambda one: one.detach() if isinstance(one, torch.Tensor) else one, result)
