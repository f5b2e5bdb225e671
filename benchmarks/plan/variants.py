"""The programs whose plans are compared, and the training step that they are programs of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tmm
from benchmarks.five import five, measured_modules
from benchmarks.workloads import FIVE_METRICS, GPT_124M, GPT_TOY, Workload

PLAIN, HOOKS = "plain", "hooks before torch.compile"
ACTIVATIONS = tmm.Spec(tmm.activation(*FIVE_METRICS))
WITH_GRADIENTS = tmm.Spec(tmm.activation(*FIVE_METRICS), tmm.activation_gradient(*FIVE_METRICS))

LOWERINGS: Mapping[str, Mapping[str, Any]] = {
    "operators": {"lowering": "operator"},
    "fused": {"lowering": "fused"},
}
"""What ``tmm.instrument`` is told for each lowering; another one is another line."""


@dataclass(frozen=True)
class Variant:
    """A program: the plain one without a spec and without hooks."""

    name: str
    spec: tmm.Spec | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    has_hooks: bool = False


def all_variants() -> dict[str, Variant]:
    """By name, the plain one first."""
    found = [Variant(PLAIN)]
    for title, spec in {
        "activations": ACTIVATIONS,
        "with activation gradients": WITH_GRADIENTS,
    }.items():
        found += [
            Variant(f"tmm, {lowering}: {title}", spec, keywords)
            for lowering, keywords in LOWERINGS.items()
        ]
    found.append(Variant(HOOKS, has_hooks=True))
    return {variant.name: variant for variant in found}


def workload_of(layers: int, *, toy: bool) -> Workload:
    """GPT-2 124M with that many of its layers, or a small GPT, on this machine."""
    if toy:
        return replace(GPT_TOY, dtype=torch.bfloat16)
    config = replace(GPT_124M.config, layers=layers)
    name = GPT_124M.name if layers == 12 else f"{GPT_124M.name}, {layers} of its layers"
    return replace(GPT_124M, name=name, config=config, device="cpu")


def step_of(variant: Variant, workload: Workload) -> tuple[Callable[[], object], dict[int, str]]:
    """The program's training step, forward and backward, and the names of the tensors it reads."""
    model, tokens = workload.model(), workload.tokens()
    targets = tokens.roll(-1, 1)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    names |= {id(tokens): "tokens", id(targets): "targets"}
    if variant.has_hooks:
        _register_hooks(model)

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(tokens)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    program = torch.compile(loss_of)
    if variant.spec is None:
        return lambda: program(tokens, targets), names
    program = tmm.instrument(program, variant.spec, module=model, **variant.keywords)
    monitor = tmm.monitor(program)

    def step() -> None:
        with monitor.step(0):
            program(tokens, targets)

    return step, names


def _register_hooks(model: nn.Module) -> None:
    """On each module, one that writes its five statistics into a row of a buffer."""
    modules = measured_modules(model)
    rows = torch.zeros(len(modules), len(FIVE_METRICS))

    def hook_of(index: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            rows[index] = five(output)

        return measure

    for index, module in enumerate(modules.values()):
        module.register_forward_hook(hook_of(index))
