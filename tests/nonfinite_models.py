"""Models that make a NaN or an infinity, each on a line that carries a marker comment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tmm
from tests.ways import WAYS
from tmm.nonfinite import Origin

FILES = tuple(Path(__file__).parent.glob("*nonfinite*.py"))


def line_of(marker: str) -> tuple[Path, int]:
    """Where the one line stands that ends with ``# <marker>``."""
    (found,) = (
        (path, number)
        for path in FILES
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if text.endswith(f"# <{marker}>")
    )
    return found


def assert_line(origin: Origin, marker: str) -> None:
    """The source of ``origin`` is the line that carries a marker."""
    assert origin.source is not None, origin
    assert (Path(origin.source.file), origin.source.line) == line_of(marker), origin
    assert origin.source.text.endswith(f"# <{marker}>")


def assert_names(
    origin: Origin, marker: str, operation: str, module: str, phase: str = "forward"
) -> None:
    assert_line(origin, marker)
    assert (origin.operation, origin.module, origin.phase) == (operation, module, phase)


class Attention(nn.Module):
    """Attention by hand, whose scores overflow float16."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.query(x) * 300, self.key(x) * 300
        scores = query @ key.transpose(-1, -2)  # <float16 scores>
        return scores.softmax(-1) @ x


class Overflow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), Attention()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()


class LogOfZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.classify = Classify()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.classify(self.blocks[0](x))
        return -p.log().mean()  # <log of zero>


class Classify(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1e4).softmax(-1)


class Normalize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)  # <zero deviation>


class ZeroDeviation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8, bias=False), Normalize())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x * (torch.arange(len(x)) != 1)[:, None]).sum()


class Length(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1).sqrt()  # <root at zero>


class NanInBackward(nn.Module):
    """The root of 0 is 0, its derivative infinite, and 0 * inf NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.length = Length()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks[0](x)
        return self.length(y - y.detach()).sum()


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self.blocks[0](x)).sum()


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = torch.exp(x.detach() * 1e4)  # <hidden infinity>
        return x / (1 + e)


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    marker: str
    operation: str
    module: str
    reason: str
    phase: str = "forward"
    dtype: torch.dtype = torch.float32
    hidden: bool = False

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 5, 8)
        x = x if self.model is not ZeroDeviation else x[0]
        return self.model().to(self.dtype), (x * 3).to(self.dtype)


CASES = {
    "overflow in float16 attention": Case(
        *(Overflow, "float16 scores", "aten.bmm", "blocks.1", "overflow of float16: the largest"),
        dtype=torch.float16,
    ),
    "log of zero": Case(*(LogOfZero, "log of zero", "aten.log", "[root module]", "elements are 0")),
    "zero deviation": Case(
        *(ZeroDeviation, "zero deviation", "aten.div", "blocks.1", "1 of 5 divisors are 0; 8")
    ),
    "first in the backward": Case(
        *(NanInBackward, "root at zero", "aten.div", "length", "division by zero"),
        phase="backward",
    ),
    "hidden infinity": Case(
        *(Hidden, "hidden infinity", "aten.exp", "gate", "overflow"), hidden=True
    ),
}


SPEC = tmm.Spec(tmm.activation("rms"))


def instrumented_whole(module: nn.Module, backend: Any) -> Any:
    return tmm.instrument(torch.compile(module, backend=backend), SPEC)


def instrumented(module: nn.Module, backend: Any) -> Any:
    return tmm.instrument(module, SPEC)


HOW: dict[str, Callable[[nn.Module, Any], Any]] = {
    **{name: WAYS[name].apply for name in ("not compiled", "whole", "in place", "blocks in place")},
    **{name: WAYS[name].apply for name in ("blocks wrapped", "parts inside whole")},
    "instrumented, compiled": instrumented_whole,
    "instrumented, not compiled": instrumented,
}
