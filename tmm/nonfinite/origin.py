"""What ``tmm.find_nonfinite`` gives back, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tmm.nonfinite.statistics import TensorStatistics

Kind: TypeAlias = Literal[
    "operation",
    "literal",
    "parameter",
    "buffer",
    "batch",
    "constant",
    "uninitialized",
    "compiled program",
]

Phase: TypeAlias = Literal["before", "forward", "backward"]

_SHOWN = 4  # names in a line of text


@dataclass(frozen=True)
class SourceLine:
    """A line of source code."""

    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Origin:
    """A place where a NaN or an infinity came up that no input had.

    Attributes:
        operation: the operation, such as ``"aten.log"``; what was given for another kind.
        kind: ``"operation"``; ``"literal"`` for one that was asked for an infinity or a NaN, as
            in ``x.masked_fill(mask, float("-inf"))``; or what held it from the beginning: a
            ``"parameter"``, ``"buffer"``, ``"batch"``, a ``"constant"`` that no operation of the
            step made, or ``"uninitialized"`` memory (``torch.empty``). ``"compiled program"`` if
            only the user's own compiled program gives one.
        module: the dotted name of the module, as in keys; empty outside of modules. In the
            backward pass, that of the forward operation that it belongs to.
        source: the line of code. In the backward pass that of the forward operation, or of a
            custom ``torch.autograd.Function``'s ``backward``. None if it is not known.
        stack: the lines that led there, the innermost (``source``) last; without torch's own.
        phase: ``"forward"`` or ``"backward"``; ``"before"`` for what was given.
        reason: what made it, as far as the inputs prove it; else empty.
        inputs: the statistics of each tensor that went in, before the operation ran.
        outputs: those of each tensor that came out.
        reaches: what it makes non-finite in the end: ``"output"``, ``"loss"``, ``"gradient of
            name"``, ``"buffer name"``. Empty if a later operation hides it.
        becomes_nan: the operation that first made a NaN of these infinities; else empty.
    """

    operation: str
    kind: Kind
    module: str
    source: SourceLine | None
    stack: tuple[SourceLine, ...]
    phase: Phase
    reason: str
    inputs: tuple[TensorStatistics, ...]
    outputs: tuple[TensorStatistics, ...]
    reaches: tuple[str, ...] = ()
    becomes_nan: str = ""

    @property
    def what(self) -> str:
        """What came up: ``"NaN"``, ``"infinity"`` or both."""
        nan = any(found.nans for found in self.outputs)
        infinite = any(f.positive_infinities or f.negative_infinities for f in self.outputs)
        return " and ".join(
            name for name, is_there in (("NaN", nan), ("infinity", infinite)) if is_there
        )

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.source is not None:
            lines.append(f"    {self.source}")
        if self.reason:
            lines.append(f"    {self.reason}")
        if self.becomes_nan:
            lines.append(f"    becomes NaN in {self.becomes_nan}")
        lines.append(f"    {self._reach()}")
        lines += [f"    input {found}" for found in self.inputs]
        lines += [f"    {found}" for found in self.outputs]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.phase == "before":
            return f"{self.what} in {self.operation}, before anything ran"
        if self.kind == "compiled program":
            return "only the compiled program gives a NaN or an infinity"
        where = f" of {self.module}" if self.module else ", outside of modules"
        asked = " (asked for by a literal)" if self.kind == "literal" else ""
        return f"{self.what} made by {self.operation}{asked}, {self.phase}{where}"

    def _reach(self) -> str:
        if not self.reaches:
            return "hidden: it reaches neither loss nor gradients"
        rest = len(self.reaches) - _SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        return f"reaches {', '.join(self.reaches[:_SHOWN])}{more}"


@dataclass(frozen=True)
class Nonfinite:
    """What ``tmm.find_nonfinite`` found; ``str`` of it is a report.

    Attributes:
        first: the first origin, in the order of execution, that reaches the loss or a gradient;
            if none does, the first one.
        others: the further origins, likewise ordered: those that reach something, then those that
            later operations hide.
        checked: what was run: ``"forward"``, or ``"forward and backward"``.
        graphs: how many traced graphs were run node by node; what is not compiled ran eagerly,
            operation by operation.
        own_program: whether the user's own compiled program gives a NaN or an infinity for this
            batch, too. None if nothing is compiled or running it would have compiled something.
        notes: what else is to be known, such as why there was no backward pass.
    """

    first: Origin
    others: tuple[Origin, ...]
    checked: Literal["forward", "forward and backward"]
    graphs: int
    own_program: bool | None
    notes: tuple[str, ...] = ()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """All origins, the first one first."""
        return (self.first, *self.others)

    def __str__(self) -> str:
        lines = [str(self.first)]
        if self.others:
            lines.append("also:")
            lines += [_brief(origin) for origin in self.others[:_SHOWN]]
            if len(self.others) > _SHOWN:
                lines.append(f"    and {len(self.others) - _SHOWN} more, in .others")
        graphs = f", {self.graphs} traced graphs" if self.graphs else ", eagerly"
        lines.append(f"checked: {self.checked}{graphs}")
        if self.own_program is not None:
            lines.append(f"the compiled program itself: {self._verdict}")
        lines += self.notes
        return "\n".join(lines)

    @property
    def _verdict(self) -> str:
        if self.own_program:
            return "not finite either"
        is_affected = any(origin.reaches for origin in (self.first, *self.others))
        return "finite: it rounds differently" if is_affected else "finite, as all that it gives"

    def _repr_html_(self) -> str:
        from tmm.views.report.card import card

        headline, *rest = str(self.first).splitlines()
        rows = [("", line.strip()) for line in rest]
        rows.append(("checked", self.checked))
        rows += [("note", note) for note in self.notes]
        others = [str(origin) for origin in self.others]
        return card(headline, rows, {f"others: {len(others):,}": others} if others else {})


def _brief(origin: Origin) -> str:
    reach = "" if origin.reaches else " (hidden)"
    source = f" at {origin.source}" if origin.source is not None else ""
    return f"    {origin._headline()}{source}{reach}"
