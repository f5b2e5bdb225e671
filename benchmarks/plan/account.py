"""The launches of a text that Inductor generated, and the bytes of their arguments.

Nothing here needs a device, Triton or torch: the text of ``call`` is read as Python. Bytes are
those of the arguments of each launch. A buffer counts once per launch, by as much of it as the
launch is given, or twice if a kernel overwrites what it reads: two buffers in the place of that one
would move as many. How much else a kernel reads of an argument, and how often, its text does not
tell.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

ITEM_SIZES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of an element."""

Kind: TypeAlias = Literal["triton", "library", "tmm"]


@dataclass(frozen=True)
class Buffer:
    """A tensor: its sizes, and the bytes of an element."""

    shape: tuple[int, ...]
    item_size: int

    @property
    def bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.item_size


@dataclass(frozen=True)
class Launch:
    """A line of a plan that has the device do something: a kernel, or a call of an operator.

    ``bytes`` are those of its arguments, ``buffers`` their names in the text.
    """

    name: str
    kind: Kind
    bytes: int
    buffers: tuple[str, ...] = ()


class UnknownSizeError(ValueError):
    """An argument's size is told neither by the text nor by what was given with it."""


def launches_of(
    text: str, known: Mapping[str, Buffer] | None = None, inputs: Iterable[Buffer | int] = ()
) -> list[Launch]:
    """All launches of the text's ``call``, in their order.

    ``known`` are sizes by name, of what operators return; ``inputs`` those of the arguments in
    order, or numbers where these are sizes.
    Raises ``UnknownSizeError`` for an argument of a launch whose size is not known.
    """
    (function,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    overwritten = {name: _overwritten(source) for name, source in kernels_of(text).items()}
    reader = _Reader(dict(known or {}), list(inputs), overwritten)
    for statement in _statements(function.body):
        reader.read(statement)
    return reader.launches


def kernels_of(text: str) -> dict[str, str]:
    """The source of each Triton kernel that the text defines, by name."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and _dotted(node.func) == "async_compile.triton":
            name, source = (ast.literal_eval(argument) for argument in node.args[:2])
            found[name] = source
    return found


def _overwritten(source: str) -> list[int]:
    """The places of a kernel's parameters that are read and written."""
    parameters = re.search(r"def triton_\w+\(([^)]*)\)", source)
    names = parameters[1].split(",") if parameters else []
    return [place for place, name in enumerate(names) if name.strip().startswith("in_out_ptr")]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, (ast.With, ast.If)):
            yield from _statements(statement.body)
        else:
            yield statement


def _dotted(node: ast.expr) -> str:
    """The text of a chain of attributes; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([node.id, *parts]) if isinstance(node, ast.Name) else ""


_ARITHMETIC = (
    *(ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.Constant),
    *(ast.Name, ast.expr_context),
)
"""What a size may be computed with."""


@dataclass
class _Reader:
    known: dict[str, Buffer]
    inputs: list[Buffer | int]
    overwritten: Mapping[str, Sequence[int]]
    launches: list[Launch] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Names of the sizes of a tensor."""

    def read(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr):
            self._launch(statement.value)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self._assign(statement.targets[0], statement.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Name) and value.id == "args":
            for name, given in zip(target.elts, self.inputs, strict=False):
                assert isinstance(name, ast.Name)
                if isinstance(given, int):
                    self.numbers[name.id] = given
                else:
                    self.known[name.id] = given
            return
        if not isinstance(target, ast.Name):
            return
        if isinstance(value, ast.Name) and value.id in self.known:
            self._name(target.id, self.known[value.id])
        elif isinstance(value, ast.Call) and _dotted(value.func).startswith("empty_strided"):
            self.known[target.id] = self._allocated(value)
        elif isinstance(value, ast.Call) and _dotted(value.func) == "reinterpret_tensor":
            _, view = self._view(value)
            self._name(target.id, view)
        elif isinstance(value, ast.Call) and _dotted(value.func).endswith(".size"):
            self.shapes[target.id] = self._buffer(_dotted(value.func).removesuffix(".size")).shape
        elif not self._launch(value) and not self._joins_pieces(target.id, value):
            number = self._number(value)
            if number is not None:
                self.numbers[target.id] = number

    def _name(self, name: str, buffer: Buffer) -> None:
        """What the compiler says of a buffer goes before what a line of the text tells of it."""
        self.known.setdefault(name, buffer)

    def _allocated(self, call: ast.Call) -> Buffer:
        dtype = _dotted(call.args[2]).removeprefix("torch.")
        return Buffer(self._shape(call.args[0]), ITEM_SIZES[dtype])

    def _shape(self, sizes: ast.expr) -> tuple[int, ...]:
        assert isinstance(sizes, ast.Tuple)
        found = [self._number(size) for size in sizes.elts]
        if None in found:
            raise UnknownSizeError(f"{ast.unparse(sizes)} holds a size that is not known")
        return tuple(number for number in found if number is not None)

    def _number(self, expression: ast.expr) -> int | None:
        if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
            sizes, index = self.shapes.get(_dotted(expression.value)), expression.slice.value
            return None if sizes is None or not isinstance(index, int) else sizes[index]
        if not all(isinstance(node, _ARITHMETIC) for node in ast.walk(expression)):
            return None
        names = [node.id for node in ast.walk(expression) if isinstance(node, ast.Name)]
        if any(name not in self.numbers for name in names):
            return None
        value = eval(ast.unparse(expression), {"__builtins__": {}}, self.numbers)
        return value if isinstance(value, int) else None

    def _view(self, call: ast.Call) -> tuple[str, Buffer]:
        """Of ``reinterpret_tensor(tensor, size, stride, offset)``: whose memory, and how much."""
        inner = call.args[0]
        if isinstance(inner, ast.Call):
            name, base = self._view(inner)
        else:
            assert isinstance(inner, ast.Name)
            name, base = inner.id, self._buffer(inner.id)
        return name, Buffer(self._shape(call.args[1]), base.item_size)

    def _buffer(self, name: str) -> Buffer:
        if name not in self.known:
            raise UnknownSizeError(f"the size of {name} is not known")
        return self.known[name]

    def _launch(self, value: ast.expr) -> bool:
        """Note it if it is one."""
        if not isinstance(value, ast.Call):
            return False
        name = _dotted(value.func)
        kind = kind_of(name)
        if kind is None:
            return False
        arguments = [*value.args, *(one.value for one in value.keywords if one.arg != "stream")]
        method = value.func
        if kind == "library" and isinstance(method, ast.Attribute) and name.count(".") == 1:
            owner = name.split(".")[0]
            if owner in self.known:  # a method of a tensor: zero_, copy_
                arguments.append(method.value)
                name = name.split(".")[1]
        sizes, whole = self._sizes(arguments)
        total = sum(min(sum(views.values()), whole[owner]) for owner, views in sizes.items())
        name = name.removesuffix(".run").removesuffix(".default")
        overwritten = [value.args[place] for place in self.overwritten.get(name, ())]
        total += sum(sum(views.values()) for views in self._sizes(overwritten)[0].values())
        self.launches.append(Launch(name, kind, total, tuple(sizes)))
        return True

    def _joins_pieces(self, name: str, value: ast.expr) -> bool:
        """Note ``workspace[start : end].view(rows, columns).sum(dim=0)`` and what follows it.

        That is how the second half of a reduction is written whose first half rode along with one
        in the other direction.
        """
        calls: list[str] = []
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            calls.append(value.func.attr)
            value = value.func.value
        if not (isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name) and calls):
            return False
        workspace, piece = value.value.id, value.slice
        assert isinstance(piece, ast.Slice)
        assert piece.lower is not None
        assert piece.upper is not None
        ends = self._number(piece.lower), self._number(piece.upper)
        if None in ends:
            raise UnknownSizeError(f"{ast.unparse(piece)} holds a size that is not known")
        start, end = (end for end in ends if end is not None)
        read = Buffer((end - start,), self._buffer(workspace).item_size)
        written = self._buffer(name)
        for call in reversed(calls):
            if call != "view":
                total = read.bytes + written.bytes
                self.launches.append(Launch(call, "library", total, (workspace, name)))
                read = written
        return True

    def _sizes(
        self, arguments: Iterable[ast.expr]
    ) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """By the name of memory: the bytes of each distinct view of it, and of the whole."""
        views: dict[str, dict[str, int]] = {}
        whole: dict[str, int] = {}

        def visit(argument: ast.expr) -> None:
            if isinstance(argument, ast.Name):
                if argument.id in self.numbers:
                    return
                owner, buffer = argument.id, self._buffer(argument.id)
            elif isinstance(argument, ast.Call) and _dotted(argument.func) == "reinterpret_tensor":
                owner, buffer = self._view(argument)
            elif isinstance(argument, (ast.List, ast.Tuple)):
                for element in argument.elts:
                    visit(element)
                return
            else:
                return
            text = ast.unparse(argument)
            views.setdefault(owner, {})[text] = buffer.bytes
            whole[owner] = self._buffer(owner).bytes

        for argument in arguments:
            visit(argument)
        return views, whole


def kind_of(called: str) -> Kind | None:
    """What a call with that dotted name launches; None if nothing."""
    if called.startswith("triton_") and called.endswith(".run"):
        return "triton"
    if called.startswith("torch.ops.tmm."):
        return "tmm"
    if called.startswith(("extern_kernels.", "torch.ops.", "aten.")):
        return "library"
    if called.endswith("_") and "." in called:  # zero_, copy_ and their kind, of a tensor
        return "library"
    return None


@dataclass(frozen=True)
class Total:
    """Launches and bytes, of kernels of Triton and of everything else."""

    triton: int = 0
    other: int = 0
    triton_bytes: int = 0
    other_bytes: int = 0

    @staticmethod
    def of(launches: Iterable[Launch]) -> Total:
        """The sums."""
        found = list(launches)
        generated = [one for one in found if one.kind == "triton"]
        others = [one for one in found if one.kind != "triton"]
        return Total(
            *(len(generated), len(others)),
            *(sum(one.bytes for one in part) for part in (generated, others)),
        )

    def __add__(self, other: Total) -> Total:
        return self._with(other, lambda own, added: own + added)

    def __sub__(self, other: Total) -> Total:
        return self._with(other, lambda own, taken: own - taken)

    @property
    def launches(self) -> int:
        """All of them."""
        return self.triton + self.other

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.triton_bytes + self.other_bytes

    def _with(self, other: Total, join: Callable[[int, int], int]) -> Total:
        names = ("triton", "other", "triton_bytes", "other_bytes")
        return Total(*(join(getattr(self, name), getattr(other, name)) for name in names))
