"""Faults planted at random, and random programs against a run line by line."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.nonfinite_models import (
    HOW,
    assert_line,
)

# Random models


class Plain(nn.Module):
    def __init__(self, kind: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        if self.kind == 0:
            return y + x
        if self.kind == 1:
            return nn.functional.layer_norm(y, (6,))
        return y.softmax(-1) * y.sigmoid()


class Fault(nn.Module):
    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zero = x - x.detach()
        if self.kind == 0:
            return x + (zero.detach() - 1).sqrt()  # <random 0>
        if self.kind == 1:
            return x / zero.detach()  # <random 1>
        if self.kind == 2:
            return x + (zero.detach() + 1e30).square()  # <random 2>
        if self.kind == 3:
            return x + zero.abs().sqrt()  # <random 3>
        return x + torch.where(zero > 1, zero.exp().log(), zero.pow(0.5))  # <random 4>


FAULTS = (("aten.sqrt", "forward"), ("aten.div", "forward"), ("aten.pow", "forward"))


def check_random_model(seed: int, how: str) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = [Plain(rng.randrange(3)) for _ in range(rng.randint(2, 6))]
    kind, place = rng.randrange(5), rng.randrange(len(layers) + 1)
    layers.insert(place, Fault(kind))
    depth = rng.randrange(2)
    module: nn.Module = nn.Sequential(*layers)
    name = str(place)
    for _ in range(depth):
        module = nn.Sequential(nn.Linear(6, 6), module)
        name = f"1.{name}"
    model = HOW[how](module, "aot_eager")
    x = torch.randn(4, 6, requires_grad=True)
    result = tmm.find_nonfinite(model, x, lambda output: output.sum())
    assert result is not None
    origin = result.first
    assert_line(origin, f"random {kind}")
    assert origin.module == name
    if kind < 3:
        assert (origin.operation, origin.phase) == FAULTS[kind]
    else:
        assert origin.phase == "backward"
    assert origin.reaches
    for layer in layers:
        if isinstance(layer, Fault):
            layer.kind = -1
            layer.forward = lambda x: x  # type: ignore[method-assign]
    torch._dynamo.reset()
    assert tmm.find_nonfinite(model, x, lambda output: output.sum()) is None


@pytest.mark.parametrize("how", ["not compiled", "whole"])
@pytest.mark.parametrize("seed", range(4))
def test_a_fault_planted_in_a_random_model(seed: int, how: str) -> None:
    check_random_model(seed, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["not compiled", "whole", "in place", "instrumented, compiled"])
@pytest.mark.parametrize("seed", range(10, 40))
def test_faults_planted_in_many_random_models(seed: int, how: str) -> None:
    check_random_model(seed, how)


OPERATIONS = (
    *("a * b", "a + b", "a - b", "a @ b", "a / b", "a - a", "a * 1e20", "a.exp()", "a.log()"),
    *("torch.tanh(a)", "a.square()", "a.relu()", "torch.where(a > 0, a, b)", "a.softmax(-1)"),
    *("1 / (1 + a)", "a.sqrt()", "a.masked_fill(b > 0, 0.0)", "(a - a.mean()) / a.std()"),
)


def random_program(seed: int) -> list[str]:
    """Lines ``v1 = ...``, each with one operation on what is there."""
    rng = random.Random(seed)
    lines = []
    for number in range(1, 9):
        names = {name: f"v{rng.randrange(number)}" for name in "ab"}
        text = rng.choice(OPERATIONS)
        for name, variable in names.items():
            text = re.sub(rf"\b{name}\b", variable, text)
        lines.append(f"v{number} = {text}")
    return lines


def needed(lines: list[str]) -> set[int]:
    """The numbers of the lines, from 2, that the last one depends on."""
    left, found = [8], set()
    while left:
        number = left.pop()
        if number and number + 1 not in found:
            found.add(number + 1)
            _, _, text = lines[number - 1].partition("=")
            left += [int(name) for name in re.findall(r"v(\d)", text)]
    return found


def check_random_program(seed: int, folder: Path, backend: str | None) -> bool:
    lines = random_program(seed)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    variables: dict[str, Any] = {"torch": torch, "v0": x.clone()}
    # A compiled program leaves out what nothing depends on.
    runs = range(2, 10) if backend is None else needed(lines)
    first_bad = None
    for number, line in enumerate(lines, 2):
        exec(line, variables)
        value = variables[f"v{number - 1}"]
        if first_bad is None and number in runs and not bool(value.isfinite().all()):
            first_bad = number
    path = folder / f"program_{seed}.py"
    body = [*lines, "return v8.sum()"]
    path.write_text("def step(v0):\n" + "".join(f"    {line}\n" for line in body))
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    step = namespace["step"]
    leaf = x.clone().requires_grad_()
    loss = step(leaf)
    is_finite = bool(loss.isfinite()) and bool(torch.autograd.grad(loss, leaf)[0].isfinite().all())
    program = step if backend is None else torch.compile(step, backend=backend)
    result = tmm.find_nonfinite(program, leaf)
    if result is None:
        assert first_bad is None
        assert is_finite
        return False
    assert bool(result.first.reaches) is not is_finite, f"{lines}\n{result}"
    forward = [o.source.line for o in result.origins if o.phase == "forward" and o.source]
    assert min(forward, default=None) == first_bad, f"{lines}\n{result}"
    return True


def test_random_programs_against_a_run_line_by_line(tmp_path: Path) -> None:
    found = sum(check_random_program(seed, tmp_path, None) for seed in range(60))
    assert 10 < found < 60


def test_random_programs_that_are_compiled(tmp_path: Path) -> None:
    assert sum(check_random_program(seed, tmp_path, "aot_eager") for seed in range(4))


@pytest.mark.slow
def test_many_random_programs(tmp_path: Path) -> None:
    for seed in range(1000, 2000):
        check_random_program(seed, tmp_path, None)
    for seed in range(2000, 2060):
        torch._dynamo.reset()
        check_random_program(seed, tmp_path, "aot_eager")
