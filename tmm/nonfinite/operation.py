"""One operation of a step: what went in, as it was before, and what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tmm.core.torch_private import OpOverload, tree_flatten, tree_map
from tmm.nonfinite.places import Place
from tmm.nonfinite.statistics import is_checked

_STATISTICS = ("running_mean", "running_var")  # written to, though older schemas do not say so
# They write to ``self`` and do not read it.
_OVERWRITING = (
    *("copy", "fill", "zero", "normal", "uniform", "random", "bernoulli"),
    *("exponential", "geometric", "cauchy", "log_normal"),
)
# Element by element, though not marked so.
_POINTWISE = ("_to_copy", "copy", "masked_fill")


@dataclass(frozen=True, eq=False)
class Operation:
    """A call of an operation.

    Attributes:
        function: the operator.
        args: its arguments; tensors that it wrote to are copies from before.
        kwargs: those by name, likewise.
        outputs: the tensors that it returned or wrote to.
        originals: the tensors that it wrote to, by the ``id`` of their copy in ``args``.
        place: where it stands in code that runs eagerly; None for a node of a graph.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Sequence[torch.Tensor]
    originals: Mapping[int, torch.Tensor]
    place: Place | None

    @staticmethod
    def of(
        function: Any,
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
        result: object,
        before: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        place: Place | None,
    ) -> Operation:
        """A call that ran; ``before`` has what it wrote to with its copy, by ``id``."""
        copies = {identity: copy for identity, (_, copy) in before.items()}
        args, kwargs = tree_map(lambda value: copies.get(id(value), value), arguments)
        outputs = [v for v in tree_flatten(result)[0] if isinstance(v, torch.Tensor)]
        known = {id(output) for output in outputs}
        outputs += [tensor for tensor, _ in before.values() if id(tensor) not in known]
        originals = {id(copy): tensor for tensor, copy in before.values()}
        return Operation(function, args, kwargs, outputs, originals, place)

    @property
    def name(self) -> str:
        """The operator's name without overload, such as ``"log_"``."""
        return packet_name(self.function)

    @property
    def base_name(self) -> str:
        """The same for one that works in place as for one that does not: ``"log"``."""
        return self.name.removesuffix("_")

    def __str__(self) -> str:
        """The name that a reader knows, such as ``"aten.log"``."""
        if isinstance(self.function, OpOverload):
            return f"{self.function.namespace}.{self.name}"
        # Some only wrap another one, to keep its random numbers.
        inner = (value for value in self.args if isinstance(value, OpOverload))
        return next((f"{f.namespace}.{packet_name(f)}" for f in inner), self.name)

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that it read, with the names of the arguments."""
        labels = [str(position) for position in range(len(self.args))]
        unread: tuple[str, ...] = ()
        if isinstance(self.function, OpOverload):
            arguments = self.function._schema.arguments
            labels = [argument.name for argument in arguments]
            unread = tuple(argument.name for argument in arguments if argument.is_out)
        if self.base_name in _OVERWRITING:
            unread += ("self",)
        for label, value in (*zip(labels, self.args, strict=False), *self.kwargs.items()):
            if label in unread:
                continue
            tensors = [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]
            for position, tensor in enumerate(tensors):
                yield (label if len(tensors) == 1 else f"{label}[{position}]"), tensor

    def argument(self, name: str) -> Any:
        """The value of an argument by its name in the schema; None if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        for argument, value in zip(self.function._schema.arguments, self.args, strict=False):
            if argument.name == name:
                return value
        return None

    @property
    def is_literal(self) -> bool:
        """Whether an infinity or a NaN stands among the arguments as a number."""
        return any(map(_is_nonfinite_number, tree_flatten((self.args, dict(self.kwargs)))[0]))

    def is_pointwise(self, output: torch.Tensor) -> bool:
        """Whether each element of ``output`` depends on the elements at its place only."""
        function = self.function
        if not isinstance(function, OpOverload):
            return False
        tags = set(function.tags)
        packet = getattr(torch.ops.aten, self.base_name, None)
        if function.namespace == "aten" and packet is not None:  # the one that is not in place
            overload = function._schema.overload_name or "default"
            tags |= set(getattr(getattr(packet, overload, None), "tags", ()))
        if torch.Tag.pointwise not in tags and self.base_name not in _POINTWISE:
            return False
        shapes = [tensor.shape for _, tensor in self.inputs() if is_checked(tensor)]
        try:
            return bool(torch.broadcast_shapes(output.shape, *shapes) == output.shape)
        except RuntimeError:
            return False


def packet_name(function: Any) -> str:
    """The name of an operator without its overload."""
    packet = getattr(function, "overloadpacket", function)
    return str(getattr(packet, "__name__", packet))


def written_arguments(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    if not isinstance(function, OpOverload):
        return []
    arguments = function._schema.arguments
    values = {a.name: value for a, value in zip(arguments, args, strict=False)} | dict(kwargs)
    found = []
    for argument in arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written or argument.name in _STATISTICS:
            tensors = tree_flatten(values.get(argument.name))[0]
            found += [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return found


def _is_nonfinite_number(value: object) -> bool:
    if isinstance(value, complex):
        return not (math.isfinite(value.real) and math.isfinite(value.imag))
    return isinstance(value, float) and not math.isfinite(value)
