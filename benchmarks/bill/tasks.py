"""Models that are trained for 20 steps, and how each is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.workloads import GPT_SMALL, GPT_TOY, Workload, usual_workload
from tmm.examples.gpt import GPT, Block, GPTConfig

Compile = Callable[[nn.Module, str], nn.Module]
"""Compiles a module by a backend; gives what is to be called in its place."""


@dataclass(frozen=True)
class Task:
    """A GPT, what it is trained on, and how it is compiled."""

    workload: Workload
    compile: Compile
    breaks: bool = False

    def model(self) -> GPT:
        """The same model each time."""
        module = self.workload.model()
        if self.breaks:
            for block in module.h:
                block.__class__ = BreakingBlock
        return module


class BreakingBlock(Block):
    """A block with a graph break between its halves, as a ``print`` there would make one."""

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Add what both branches contribute to ``stream``."""
        stream = stream + self.attn(self.ln_1(stream))
        break_graph()
        mixed: torch.Tensor = stream + self.mlp(self.ln_2(stream))
        return mixed


def break_graph() -> None:
    """End the graph that is being traced."""
    torch._dynamo.graph_break()


def whole(module: nn.Module, backend: str) -> nn.Module:
    """Compile a model as one."""
    compiled: nn.Module = torch.compile(module, backend=backend)  # type: ignore[assignment]
    return compiled


def by_blocks(module: nn.Module, backend: str) -> nn.Module:
    """Compile the blocks of a GPT, each by itself; they are equal and share a program."""
    assert isinstance(module, GPT)
    for block in module.h:
        block.compile(backend=backend)
    return module


def tasks(*, toy: bool = False) -> Mapping[str, Task]:
    """What the bill is of, by a short name; toys only show that everything runs."""
    if toy:
        two = replace(GPT_TOY, config=replace(GPT_TOY.config, layers=2))
        return {
            "GPT": Task(two, whole),
            "blocks": Task(two, by_blocks),
            "breaks": Task(two, whole, breaks=True),
        }
    device = usual_workload().device
    narrow = GPTConfig(vocabulary=64, context=64, layers=24, heads=4, width=64)
    middle = GPTConfig(vocabulary=256, context=128, layers=4, heads=4, width=128)
    return {
        "GPT": Task(usual_workload(), whole),
        "blocks": Task(
            replace(
                *(GPT_SMALL,),
                name="GPT, 24 blocks compiled one by one, width 64, batch 4 x 64",
                config=narrow,
                device=device,
            ),
            by_blocks,
        ),
        "breaks": Task(
            replace(
                *(GPT_SMALL,),
                name="GPT, 4 layers with a graph break in each block, width 128, batch 4 x 128",
                config=middle,
                device=device,
            ),
            whole,
            breaks=True,
        ),
    }
