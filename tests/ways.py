"""All ways of compiling a model, or parts of it, that can be instrumented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import tmm

Backend = str | Callable[..., Any]
Callee = Any
"""What a user calls: a module, or a step function that takes a batch."""


class NoBlocksError(ValueError):
    """The model has no row of blocks that could be compiled one by one."""


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: Backend) -> None:
        self.compile = torch._dynamo.lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return self.compile(graph, inputs)


@dataclass(frozen=True)
class Way:
    """``apply`` compiles a module and gives back what is called in its place."""

    name: str
    apply: Callable[[nn.Module, Backend], Callee]
    compiled: bool = True

    def instrument(
        self, module: nn.Module, backend: Backend, spec: tmm.Spec, **options: Any
    ) -> Callee:
        callee = self.apply(module, backend)
        if not isinstance(callee, nn.Module):
            options["module"] = module
        return tmm.instrument(callee, spec, **options)

    def __str__(self) -> str:
        return self.name


def call(callee: Callee, batch: Mapping[str, Any]) -> object:
    """A forward pass, of a module or of a step function."""
    return callee(**batch) if isinstance(callee, nn.Module) else callee(batch)


def block_lists(module: nn.Module) -> list[nn.Module]:
    """The outermost lists whose elements have a state; those inside of blocks are left out."""
    found: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        is_list = isinstance(parent, (nn.ModuleList, nn.Sequential))
        if is_list and parent.state_dict():
            found.append(parent)
        else:
            for child in parent.children():
                visit(child)

    visit(module)
    return found


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The elements of those lists, each once.

    Raises:
        NoBlocksError: if there is none.
    """
    found = dict.fromkeys(block for blocks in block_lists(module) for block in blocks.children())
    if not found:
        raise NoBlocksError("no ModuleList or Sequential in it")
    return list(found)


def whole(module: nn.Module, backend: Backend) -> Callee:
    return torch.compile(module, backend=backend)


def in_place(module: nn.Module, backend: Backend) -> Callee:
    module.compile(backend=backend)
    return module


def blocks_in_place(module: nn.Module, backend: Backend) -> Callee:
    for block in blocks_of(module):
        block.compile(backend=backend)
    return module


def blocks_wrapped(module: nn.Module, backend: Backend) -> Callee:
    wrapped: dict[nn.Module, Any] = {
        block: torch.compile(block, backend=backend) for block in blocks_of(module)
    }
    for blocks in block_lists(module):
        for name, block in list(blocks.named_children()):
            blocks._modules[name] = wrapped[block]
    return module


def parts_inside_whole(module: nn.Module, backend: Backend) -> Callee:
    return whole(blocks_in_place(module, backend), backend)


def not_compiled(module: nn.Module, backend: Backend) -> Callee:
    return module


def compiled_step(module: nn.Module, backend: Backend) -> Callee:
    def step(batch: Mapping[str, Any]) -> object:
        return module(**batch)

    return torch.compile(step, backend=backend)


WAYS = {
    way.name: way
    for way in (
        Way("whole", whole),
        Way("in place", in_place),
        Way("blocks in place", blocks_in_place),
        Way("blocks wrapped", blocks_wrapped),
        Way("parts inside whole", parts_inside_whole),
        Way("not compiled", not_compiled, compiled=False),
        Way("compiled step", compiled_step),
    )
}


def graph_breaks() -> int:
    """How often Dynamo has left a graph so far, whatever for."""
    return sum(counters["graph_break"].values())
