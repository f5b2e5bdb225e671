"""Collects what the package raises and warns of, from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("tmm", "passes", "runtime")
WARNING_CALLS = ("_say", "_tell", "_warn", "_warn_once", "tell", "warn", "warn_once")
"""Functions whose first text is shown to a user as a warning."""

_INTERNAL = ("AssertionError", "NotImplementedError", "StopIteration", "Exit", "SystemExit")
_SHORTEST = 12  # characters of a text that says something
_MOST_VARIANTS = 8  # of a part of a message
_SHORTEST_WARNING = 30  # what warnings are told apart by is shorter


@dataclass(frozen=True, order=True)
class Message:
    """What is shown to a user: the text with ``...`` for what is filled in."""

    kind: str
    text: str
    file: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """What the message as it is shown matches."""
        parts = (re.escape(part) for part in self.text.split("..."))
        return re.compile(".*".join(parts), re.DOTALL)


@cache
def collect() -> tuple[Message, ...]:
    """Each message once, by kind and text."""
    found: dict[tuple[str, str], Message] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for message in messages_of(path):
                found.setdefault((message.kind, message.text), message)
    return tuple(sorted(found.values(), key=lambda one: (one.kind, one.text.lower())))


def messages_of(path: Path) -> Iterator[Message]:
    """What one file raises and warns of."""
    tree = ast.parse(path.read_text())
    file = path.relative_to(ROOT).as_posix()
    constants = _texts_by_name(tree) | _returns_by_name(tree)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.Module)):
            continue
        known = constants | _texts_by_name(function)
        for node in _own_nodes(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = _name(node.exc.func)
                arguments = node.exc.args
            elif isinstance(node, ast.Call) and _name(node.func) in WARNING_CALLS:
                kind, arguments = "Warning", node.args
            else:
                continue
            if kind in _INTERNAL or not kind[:1].isupper():
                continue
            texts = [text for argument in arguments for text in _texts(argument, known)]
            least = _SHORTEST_WARNING if kind == "Warning" else _SHORTEST
            yield from (
                Message(kind, text, file) for text in texts if len(text.strip(". ")) > least
            )


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions in it."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef):
            continue
        yield child
        yield from _own_nodes(child)


def _texts_by_name(tree: ast.AST) -> dict[str, ast.expr]:
    """What is assigned to names as a text."""
    return {
        target.id: node.value
        for node in _own_nodes(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
        and isinstance(node.value, (ast.Constant, ast.JoinedStr, ast.BinOp, ast.IfExp))
    }


def _returns_by_name(tree: ast.AST) -> dict[str, ast.expr]:
    """What functions give back that put a message together: a list of texts."""
    return {
        f"{function.name}()": ast.List(
            [
                node.value
                for node in _own_nodes(function)
                if isinstance(node, ast.Return) and node.value is not None
            ]
        )
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }


def _texts(node: ast.expr, known: dict[str, ast.expr], depth: int = 3) -> list[str]:
    """The texts that an expression may give, with ``...`` for what only a run tells."""
    if isinstance(node, ast.List):
        return [text for one in node.elts for text in _texts(one, known, depth)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [
            [str(part.value)] if isinstance(part, ast.Constant) else _inner(part, known, depth)
            for part in node.values
        ]
        return [re.sub(r"(\.\.\.)+", "...", "".join(some)) for some in product(*parts)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, known, depth) + _texts(node.orelse, known, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left = _texts(node.left, known, depth) or ["..."]
        right = _texts(node.right, known, depth) or ["..."]
        return [one + other for one in left for other in right]
    if isinstance(node, ast.Call) and _name(node.func) in ("format", "dedent"):
        inner = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
        return [re.sub(r"\{[^}]*\}", "...", text) for text in _texts(inner, known, depth)]
    if isinstance(node, ast.Name) and node.id in known and depth:
        return _texts(known[node.id], known, depth - 1)
    return []


def _inner(part: ast.expr, known: dict[str, ast.expr], depth: int) -> list[str]:
    """A replacement field: the texts that it stands for, or an ellipsis."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    texts: list[str] = []
    if isinstance(value, ast.Name) and value.id.lstrip("_").isupper():
        texts = _texts(value, known, depth)
    elif isinstance(value, ast.Call) and depth:
        texts = _texts(known.get(f"{_name(value.func)}()", ast.List([])), known, depth - 1)
    return texts if 0 < len(texts) <= _MOST_VARIANTS else ["..."]


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
