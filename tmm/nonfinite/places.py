"""Where in the user's code an operation stands."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch.fx import GraphModule, Node

from tmm.core.module_names import display_name, relative_names
from tmm.core.torch_private import current_autograd_node, current_graph_task_id, get_sequence_nr
from tmm.nonfinite.origin import SourceLine

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = str(Path(__file__).parent) + os.sep
_SKIPPED = (_TORCH, _OURS, "<frozen", "<eval_with_key", "<string")
_CHECKPOINT = os.path.join("torch", "utils", "checkpoint.py")
_COPY_SLICES = "CopySlices"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')


@dataclass(frozen=True)
class Place:
    """The module that an operation belongs to, and the lines that led there, innermost last."""

    module: torch.nn.Module | int | None = None
    lines: tuple[tuple[str, int, str], ...] = ()
    is_repeated: bool = False

    @property
    def stack(self) -> tuple[SourceLine, ...]:
        """The lines with their text."""
        return tuple(
            SourceLine(file, line, function, linecache.getline(file, line).strip())
            for file, line, function in self.lines
        )


class ModuleNames:
    """The names of the modules of a step.

    With one root names are those in keys. Several roots have a prefix each. Without any, the
    outermost module that is seen to run is the root.
    """

    def __init__(self, roots: Mapping[str, torch.nn.Module]) -> None:
        self.roots = dict(roots)
        self._names: dict[torch.nn.Module, str] = {}
        for prefix, root in roots.items():
            self._add(root, prefix if len(roots) > 1 else "")

    def see(self, outermost: torch.nn.Module) -> None:
        """Take a module that runs for a root, if none was given."""
        if not self.roots and outermost not in self._names:
            self._add(outermost, "")

    def of(self, module: torch.nn.Module | int | None) -> str:
        """The name of a module, or of that with an ``id``; its type for one of another tree."""
        if module is None:
            return ""
        if isinstance(module, int):
            return next((name for known, name in self._names.items() if id(known) == module), "")
        name = self._names.get(module)
        if name is None:
            for root in self.roots.values():  # one that the forward pass itself added
                if (found := relative_names(root).get(module)) is not None:
                    return display_name(found)
        return type(module).__name__ if name is None else name

    def _add(self, root: torch.nn.Module, prefix: str) -> None:
        for module, name in relative_names(root).items():
            dotted = ".".join(part for part in (prefix, name) if part)
            self._names.setdefault(module, display_name(dotted))


class RunningPlaces:
    """Where code stands that runs eagerly, up to the frame of ``boundary``.

    The forward operation that a part of the backward pass belongs to is found by the number of
    autograd's node, which is made before the operation runs.
    """

    def __init__(self, names: ModuleNames, boundary: CodeType) -> None:
        self._names = names
        self._boundary = boundary
        self._forward: dict[int, tuple[Place, set[str | None]]] = {}

    def meet(self, name: str | None) -> Place:
        """The place of an operation that is about to run; without a name, of a traced graph."""
        place = self.running()
        if torch.is_grad_enabled() or current_graph_task_id() == -1:
            number = get_sequence_nr() - 1
            self._forward.setdefault(number, (place, set()))[1].add(name)
        return place

    def of_forward(self) -> Place:
        """The place of the forward operation whose backward is running."""
        node = current_autograd_node()
        if node is None:
            return Place()
        number, kind = node._sequence_nr(), node.name()
        is_view = kind.endswith(_COPY_SLICES)
        if is_view:
            number -= 1  # it stands for an operation on a view, which was made before it
        place, names = self._forward.get(number, (Place(), set[str | None]()))
        is_own_function = isinstance(node, torch.autograd.function.BackwardCFunction)
        if is_own_function or is_view or None in names:
            return place
        kind = re.sub(r"Backward\d*$", "", kind).lower()
        # Numbers are those of a thread: another one may have counted, too.
        is_same = any(name is not None and name.replace("_", "") == kind for name in names)
        return place if is_same else Place()

    def running(self) -> Place:
        """The place of what is running."""
        lines: list[tuple[str, int, str]] = []
        innermost = outermost = None
        is_repeated = False
        for frame in _frames(self._boundary):
            code = frame.f_code
            file = code.co_filename
            if code.co_name in ("_call_impl", "forward"):
                module = frame.f_locals.get("self")
                if isinstance(module, torch.nn.Module) and not isinstance(module, GraphModule):
                    innermost = module if innermost is None else innermost
                    outermost = module
            is_repeated |= file.endswith(_CHECKPOINT)
            if not file.startswith(_SKIPPED):
                lines.append((file, frame.f_lineno, code.co_name))
        if outermost is not None:
            self._names.see(outermost)
        return Place(innermost, tuple(reversed(lines)), is_repeated)


def place_of_node(node: Node) -> Place:
    """The place that a node of a traced graph was traced from."""
    meta = node.meta
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    module = None
    if stack:
        identity = str(next(reversed(stack))).partition("@")[0]
        module = int(identity) if identity.isdigit() else None
    found = _FRAME.finditer(meta.get("stack_trace") or "")
    lines = [(m["file"], int(m["line"]), m["function"].strip()) for m in found]
    return Place(module, tuple(at for at in lines if not at[0].startswith(_SKIPPED)))


def counterparts(
    first: torch.nn.Module | None, second: torch.nn.Module | None
) -> dict[int, torch.nn.Module]:
    """For the ``id`` of each part of ``first`` the part of ``second`` that has its name."""
    if first is None or second is None:
        return {}
    others = {name: module for module, name in relative_names(second).items()}
    names = relative_names(first)
    return {id(part): others[name] for part, name in names.items() if name in others}


def _frames(boundary: CodeType) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not boundary:
        yield frame
        frame = frame.f_back
