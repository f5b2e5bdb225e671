"""Random programs: a monitored step leaves what a plain one does, and its values are true."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import Recording, disagreements, eager_hooks, tolerance
from tests.random_programs import Program, program, step
from tmm.steps.forward_passes import EVALUATIONS
from tmm.testing.eager_hooks import gradient_hooks

METRICS = ("mean", "std", "rms", "absmax", "min", "zero_fraction")
GRADIENTS = ("rms", "absmax")
WAYS = ("uncompiled", "eager", "aot_eager")


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1)


RULES = (
    tmm.activation(*METRICS),
    tmm.activation(largest=largest),
    tmm.activation_gradient(*GRADIENTS),
)

Left = dict[str, torch.Tensor | None]


def compiled(module: nn.Module, way: str) -> Any:
    torch._dynamo.reset()
    return module if way == "uncompiled" else torch.compile(module, backend=way)


def plain(source: Program, way: str) -> Left | None:
    """What is left by a step of the program without tmm; None for one that cannot run."""
    module = source.build()
    try:
        return step(source, module, compiled(module, way))
    except Exception:
        return None  # as where autograd, or Dynamo, forbids an in-place operation


def differences(want: Left, got: Left) -> list[str]:
    assert want.keys() == got.keys()
    return [
        f"{key}: {want[key]} became {got[key]}" for key in want if not same(want[key], got[key])
    ]


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second) or (
        first.shape == second.shape and bool(((first == second) | (first != first)).all())
    )


def alike(first: Left, second: Left) -> bool:
    """Whether both programs have left the same, but for rounding."""
    pairs = [(first[key], second[key]) for key in first]
    return all(
        a is b if a is None or b is None else torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True)
        for a, b in pairs
        if a is None or a.dtype != torch.uint8  # the state of the random numbers
    )


class Eager:
    """What hooks see in a step of the uncompiled program: values, and if wanted, gradients."""

    def __init__(self, source: Program, eager: set[str] | None) -> None:
        self.values, self.gradients, self.recorded = Recording(), Recording(), Recording()
        self._is_forward = False
        module = source.build(self._record)
        with torch.compiler.set_stance("force_eager"):
            self.left = step(source, module, partial(self._forward, module, eager))

    def _record(self, name: str, tensor: torch.Tensor) -> None:
        if self._is_forward:
            self.recorded.add(name, tensor.double() if not tensor.is_complex() else tensor)

    def _forward(self, module: nn.Module, eager: set[str] | None, x: torch.Tensor) -> Any:
        self._is_forward = True
        with eager_hooks(module, self.values):
            if eager is None:
                output = module(x)
            else:
                with gradient_hooks(module, self.gradients, eager):
                    output = module(x)
        self._is_forward = False
        return output

    def expected(self) -> dict[str, Any]:
        wanted = self.values.expected(METRICS, largest=largest)
        recorded = self.recorded.expected(("mean",)).items()
        return wanted | {
            k.removeprefix("activation/").removesuffix("/mean"): v for k, v in recorded
        }

    def expected_gradients(self) -> dict[str, Any]:
        values = self.gradients.expected(GRADIENTS).items()
        return {k.replace("activation/", "activation_gradient/", 1): v for k, v in values}


def faults(source: Program, way: str) -> list[str] | None:
    """What a monitored step gets wrong; None for a program that cannot run without tmm."""
    want = plain(source, way)
    if want is None:
        return None
    module = source.build()
    model = tmm.instrument(compiled(module, way), tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        got = step(source, module, model)
    found = differences(want, got)
    explanation = tmm.explain(model)
    metrics = monitor.get_step_metrics()
    if found:
        again = plain(source, way)  # some read memory that nobody has written
        return found if again is not None and not differences(want, again) else None
    if way == "aot_eager" and source.changes_in_place and "nn.Dropout(0.0)" in source.source:
        return []  # a compiler copies what such a dropout gives back as it is
    try:
        eager = Eager(source, None)
    except RuntimeError:
        return []  # as where the hooks make a checkpoint, which is stricter than a graph, refuse
    if not same(eager.left["random state"], want["random state"]):
        return []  # a compiler that drops a draw gives later ones other numbers
    if EVALUATIONS in explanation.unmeasured:
        return []  # a branch took one of the passes past all parameters
    is_refused = partial(_is_refused, explanation.unmeasured)
    values = {k: v for k, v in metrics.items() if not k.startswith("activation_gradient/")}
    expected = {
        k: v for k, v in eager.expected().items() if k in values or not is_refused(_site(k))
    }
    found += disagreements(values, expected, tolerance(way))
    if source.changes_in_place or not alike(eager.left, want):
        return found  # the hooks' copies, or the compiler, make another program of it
    eager = Eager(source, set(explanation.eager))
    gradients = {k: v for k, v in metrics.items() if k.startswith("activation_gradient/")}
    passed_on = eager.gradients.integers  # whose gradient that is, is a matter of taste
    gradients = {k: v for k, v in gradients.items() if _site(k) not in passed_on}
    expected = {
        k: v
        for k, v in eager.expected_gradients().items()
        if _site(k) not in passed_on and (k in gradients or not is_refused(_site(k)))
    }
    # Outputs of a graph that the loss does not depend on get zeros, as documented.
    gradients = {k: v for k, v in gradients.items() if k in expected or v != 0.0}
    return found + disagreements(gradients, expected, tolerance(way))


def _site(key: str) -> str:
    return key.partition("/")[2].rpartition("/")[0] or key


def _is_refused(unmeasured: dict[str, str], site: str) -> bool:
    return site in unmeasured


def check(seed: int, way: str, skips: Callable[[Program], bool] = lambda source: False) -> bool:
    """Whether the program could run; fails with its text where tmm gets something wrong."""
    source = program(seed)
    found = faults(source, way)
    assert not found, f"seed {seed}, {way}:\n{source.source}\n\n" + "\n".join(found[:8])
    return found is not None


def test_random_programs() -> None:
    ran = [check(seed, WAYS[seed % 3]) for seed in range(12)]
    assert sum(ran) > 5


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_many_random_programs(way: str, start: int) -> None:
    ran = [check(seed, way) for seed in range(start, start + 50)]
    assert sum(ran) > 20
