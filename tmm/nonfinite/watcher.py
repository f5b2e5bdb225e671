"""Checks every operation of a step, and remembers where NaN and infinities came up."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch

from tmm.core.torch_private import TorchDispatchMode, current_graph_task_id, tree_flatten
from tmm.nonfinite.memory_of_step import Memory, Written
from tmm.nonfinite.operation import Operation, packet_name, written_arguments
from tmm.nonfinite.origin import Kind, Origin, Phase
from tmm.nonfinite.places import ModuleNames, Place, RunningPlaces
from tmm.nonfinite.reasons import Call, reason_of
from tmm.nonfinite.statistics import (
    TensorStatistics,
    has_memory,
    is_checked,
    is_subclass,
    nonfinite_elements,
    real_values,
    statistics_of,
)

_UNINITIALIZED = (
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
)
# They hand on what they are given; a reader looks for what that was.
_MOVING = (
    *("_to_copy", "clone", "detach", "alias", "t", "transpose", "permute", "expand", "view"),
    *("_unsafe_view", "reshape", "unsqueeze", "squeeze", "lift_fresh", "lift_fresh_copy"),
)
_CONSTANT = "a tensor that no operation of the step made"


@dataclass
class Found:
    """An origin while the step runs.

    ``is_meant``: an infinity put there on purpose, as far as one can tell: no fault by itself.
    """

    origin: Origin
    is_meant: bool
    reaches: dict[str, None] = field(default_factory=dict)
    becomes_nan: str = ""

    def finished(self) -> Origin:
        """The origin with what is known now."""
        return replace(self.origin, reaches=tuple(self.reaches), becomes_nan=self.becomes_nan)


class Watcher(TorchDispatchMode):
    """Looks at the results of every operation of the forward and backward pass.

    An operation is an *origin* if an element of its output is NaN or infinite, although what it
    was computed from is finite; or NaN, although that was infinite on purpose only. Operations
    that work element by element are compared element by element, others as a whole. What is not
    finite is followed by the memory that it lies in.

    ``graph_place`` is the place of the node of a traced graph that is running, if one is, and
    the phase that it belongs to.
    """

    supports_higher_order_operators = True

    def __init__(self, names: ModuleNames, boundary: CodeType, written: Written) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.found: list[Found] = []
        self.written = written
        self.graph_place: tuple[Place, Phase] | None = None
        self._memory = Memory()
        self._places = RunningPlaces(names, boundary)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles what runs under this mode as ever."""
        return True

    # What is there before the step, and in the end

    def give(self, tensor: torch.Tensor, kind: Kind, name: str, module: str) -> None:
        """Know a parameter, a buffer or a tensor of the batch; look whether it is finite."""
        if not has_memory(tensor):
            return
        self.written.know(tensor)
        source = name if kind == "batch" else f"{kind} {name}"
        known = self._memory.of(tensor)
        origins = frozenset[int]() if known is None else known.origins
        if is_checked(tensor) and (bad := nonfinite_elements(tensor)) is not None:
            origins |= {self._add_given(tensor, bad, kind, source, module)}
        self._memory.remember(tensor, source, origins, is_new=False)

    def reach(self, what: str, tensor: torch.Tensor) -> None:
        """If a tensor holds a NaN or an infinity, credit it to its origins."""
        if is_checked(tensor) and nonfinite_elements(tensor) is not None:
            for index in self._origins(tensor):
                self.found[index].reaches[what] = None

    # The operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and look at what it gives."""
        kwargs = kwargs or {}
        given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if any(is_subclass(tensor) for tensor in given):
            return NotImplemented  # it comes again with the tensors inside
        for tensor in given:
            if has_memory(tensor):
                self._memory.meet(tensor)
        before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for tensor in written_arguments(func, args, kwargs):
            if has_memory(tensor):
                if not self._memory.meet(tensor).is_new:
                    self.written.keep(tensor)
                before[id(tensor)] = tensor, tensor.detach().clone()
        place = self._places.meet(packet_name(func)) if self.graph_place is None else None
        result = func(*args, **kwargs)
        operation = Operation.of(func, (args, kwargs), result, before, place)
        for output in operation.outputs:
            if has_memory(output) and operation.base_name != "set":
                self._check(operation, output, is_written=id(output) in before)
        return result

    @contextmanager
    def at(self, place: Place, phase: Phase) -> Iterator[None]:
        """What runs in the block is a node of a traced graph."""
        outer, self.graph_place = self.graph_place, (place, phase)
        try:
            yield
        finally:
            self.graph_place = outer

    def _check(self, operation: Operation, output: torch.Tensor, *, is_written: bool) -> None:
        known = self._memory.of(output)
        if operation.name in _UNINITIALIZED and known is None:
            origins = frozenset({self._uninitialized(operation)})
            self._memory.remember(output, str(operation), origins, is_new=True)
            return
        if known is not None and known.is_new and not known.origins and not is_written:
            return  # a view of what was found to be finite
        bad = nonfinite_elements(output) if is_checked(output) else None
        origins = frozenset[int]()
        if bad is not None:
            origins = self._origins_of(operation, output, bad)
        if known is None:
            self._memory.remember(output, self._source_of(operation), origins, is_new=True)
            return
        source = self._source_of(operation) if is_written else known.source
        if not (is_written and _is_whole(output)):
            origins |= known.origins
        if origins != known.origins or is_written:
            self._memory.remember(output, source, origins, is_new=known.is_new)

    def _origins_of(
        self, operation: Operation, output: torch.Tensor, bad: torch.Tensor
    ) -> frozenset[int]:
        """The origins of what is not finite in an output; new ones are added."""
        inputs = [tensor for _, tensor in operation.inputs() if is_checked(tensor)]
        masks = [(tensor, *_nan_and_infinite(tensor)) for tensor in inputs]
        masks = [(t, nan, infinite) for t, nan, infinite in masks if bool((nan | infinite).any())]
        nan, infinite = nan_there, infinite_there = _nan_and_infinite(output)
        if not operation.is_pointwise(output):  # each element may depend on all
            masks = [(t, n.any(), i.any()) for t, n, i in masks]
            nan_there, infinite_there = nan.any(), infinite.any()
        nothing = torch.zeros_like(nan_there)
        nan_before = functools.reduce(torch.logical_or, (n for _, n, _ in masks), nothing)
        infinite_before = functools.reduce(torch.logical_or, (i for _, _, i in masks), nothing)
        sources: set[int] = set()
        for tensor, n, i in masks:
            # Infinities do not matter where there is a NaN already.
            made = (n & nan_there) | (i & infinite_there) | (i & nan_there & ~nan_before)
            if bool(made.any()) or bool((n & infinite_there & ~infinite_before).any()):
                sources |= self._origins(operation.originals.get(id(tensor), tensor))
        new_nan = nan & ~nan_before & infinite_before
        fresh = bad & ~(nan_before | infinite_before)
        if bool(new_nan.any()):
            if all(self.found[index].is_meant for index in sources):
                return frozenset({self._new(operation, output, new_nan | fresh)})
            self._turned_to_nan(operation, sources)
        if bool(fresh.any()):
            sources.add(self._new(operation, output, fresh))
        return frozenset(sources)

    # Origins

    def _new(self, operation: Operation, output: torch.Tensor, fresh: torch.Tensor) -> int:
        place, phase = self._place(operation)
        stack, module = place.stack, self.names.of(place.module)
        for index, found in enumerate(self.found):
            known = found.origin
            if (known.operation, known.module, known.stack[-1:], known.phase) == (
                *(str(operation), module, stack[-1:], phase),
            ):
                return index  # as in a loop, or repeated by activation checkpointing
        is_literal = operation.is_literal
        origin = Origin(
            operation=str(operation),
            kind="literal" if is_literal else "operation",
            module=module,
            source=stack[-1] if stack else None,
            stack=stack,
            phase=phase,
            reason="" if is_literal else reason_of(Call(operation, output, fresh)),
            inputs=self._statistics(operation),
            outputs=tuple(statistics_of(t, "output") for t in operation.outputs if is_checked(t)),
        )
        return self._add(origin, is_meant=is_literal)

    def _statistics(self, operation: Operation) -> tuple[TensorStatistics, ...]:
        found = []
        for label, tensor in operation.inputs():
            if has_memory(tensor):
                known = self._memory.of(operation.originals.get(id(tensor), tensor))
                source = "" if known is None else known.source
                found.append(statistics_of(tensor, label, source))
        return tuple(found)

    def _add(self, origin: Origin, *, is_meant: bool) -> int:
        self.found.append(Found(origin, is_meant))
        return len(self.found) - 1

    def _add_given(
        self, tensor: torch.Tensor, bad: torch.Tensor, kind: Kind, source: str, module: str
    ) -> int:
        values = real_values(tensor.detach())
        has_nan, has_positive = bool(values.isnan().any()), bool(values.isposinf().any())
        is_meant = not has_nan and kind in ("buffer", "constant")
        is_meant |= not has_nan and not has_positive and kind == "batch"  # a mask, perhaps
        first = bad.nonzero()[0].tolist()
        reason = f"{int(bad.sum())} of {tensor.numel()} elements, the first one at {first}"
        statistics = (statistics_of(tensor, "output"),)
        origin = Origin(source, kind, module, None, (), "before", reason, (), statistics)
        return self._add(origin, is_meant=is_meant)

    def _uninitialized(self, operation: Operation) -> int:
        place, phase = self._place(operation)
        stack, module = place.stack, self.names.of(place.module)
        source = stack[-1] if stack else None
        for index, found in enumerate(self.found):
            if found.origin.kind == "uninitialized" and found.origin.source == source:
                return index
        reason = "memory that was read before anything was written to it"
        origin = Origin(
            *(str(operation), "uninitialized", module, source, stack, phase, reason, (), ())
        )
        return self._add(origin, is_meant=True)

    def _turned_to_nan(self, operation: Operation, sources: set[int]) -> None:
        for index in sources:
            if not self.found[index].becomes_nan:
                stack = self._place(operation)[0].stack
                where = f", {stack[-1]}" if stack else ""
                self.found[index].becomes_nan = f"{operation}{where}"

    def _origins(self, tensor: torch.Tensor) -> frozenset[int]:
        """Whose NaN and infinities a tensor holds that is not finite."""
        known = self._memory.meet(tensor)
        if not known.origins:
            bad = nonfinite_elements(tensor)
            assert bad is not None
            origins = frozenset({self._add_given(tensor, bad, "constant", _CONSTANT, "")})
            source = known.source or _CONSTANT
            self._memory.remember(tensor, source, origins, is_new=known.is_new)
            return origins
        # Memory that is filled piece by piece held anything before.
        filled = {i for i in known.origins if self.found[i].origin.kind != "uninitialized"}
        return frozenset(filled) or known.origins

    def _source_of(self, operation: Operation) -> str:
        """What to call the output of an operation."""
        if operation.name in _MOVING:
            _, tensor = next(operation.inputs(), ("", None))
            known = None if tensor is None or not has_memory(tensor) else self._memory.of(tensor)
            if known is not None and known.source:
                return known.source
        place, phase = self._place(operation)
        where = f", {place.lines[-1][0]}:{place.lines[-1][1]}" if place.lines else ""
        return f"{operation}{where}{' (backward)' if phase == 'backward' else ''}"

    # Places

    def frame_of_graph(self) -> torch.nn.Module | None:
        """The module whose frame calls the graph that is about to run, or its forward one."""
        in_forward = current_graph_task_id() == -1
        place = self._places.meet(None) if in_forward else self._places.of_forward()
        return place.module if isinstance(place.module, torch.nn.Module) else None

    def frame_of_compilation(self) -> torch.nn.Module | None:
        """The module whose frame is being compiled."""
        module = self._places.running().module
        return module if isinstance(module, torch.nn.Module) else None

    def _place(self, operation: Operation) -> tuple[Place, Phase]:
        if self.graph_place is not None:
            return self.graph_place
        assert operation.place is not None
        running = operation.place
        is_repeated = running.is_repeated and running.lines
        if current_graph_task_id() == -1 or is_repeated:
            return running, "forward"
        forward = self._places.of_forward()
        module = forward.module if running.module is None else running.module
        return Place(module, running.lines or forward.lines), "backward"


def _nan_and_infinite(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = real_values(tensor.detach())
    return values.isnan(), values.isinf()


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
