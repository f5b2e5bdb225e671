"""Differences from a reference and the refined coordinate check, by plain eager forwards.

Written from the documentation alone: two forwards for the differences, and one more of each module
for W_0 x_t. Nothing of tmm is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.eager_hooks import Expected, site_names, walk

Batch = Mapping[str, Any]


@dataclass
class Call:
    """One call of a module: what it was given, what it gave back, and the random state before."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    random_state: torch.Tensor
    output: Any = None


@dataclass
class Forward:
    """All calls of each module in one forward pass, by name."""

    calls: dict[str, list[Call]] = field(default_factory=dict)


def forward(module: nn.Module, batch: Batch, seed: int, call: Callable[..., Any]) -> Forward:
    """Run a copy of ``module`` without gradients and record every call of every module."""
    module = copy.deepcopy(module)
    recorded, running = Forward(), list[Call]()
    handles = []
    for name, child in site_names(module).items():

        def enter(_: nn.Module, arguments: Any, keywords: Any, name: str = name) -> None:
            made = copy.deepcopy((arguments, keywords))
            running.append(Call(*made, torch.get_rng_state()))
            recorded.calls.setdefault(name, []).append(running[-1])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            running.pop().output = copy.deepcopy(output)

        handles.append(child.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(child.register_forward_hook(leave))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        call(module, batch)
    for handle in handles:
        handle.remove()
    return recorded


class Sums:
    """Values that are joined over calls and batches."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.norms: dict[str, list[torch.Tensor]] = {}
        self.scales: dict[str, list[torch.Tensor]] = {}

    def norm(self, key: str, tensor: torch.Tensor, operand: torch.Tensor) -> None:
        self.norms.setdefault(key, []).append(row_norms(tensor))
        self.scales.setdefault(key, []).append(row_norms(operand))


def row_norms(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor.double(), dim=-1).reshape(-1)


def expected(
    module: nn.Module,
    reference: nn.Module,
    batches: Sequence[Batch],
    *,
    seeds: Sequence[int] | None = None,
    call: Callable[..., Any] = lambda module, batch: module(**batch),
    floor: float = 0.0,
) -> dict[str, Expected]:
    """Key to value. Errors are relative to it, or to ``floor`` times what is subtracted."""
    sums = Sums()
    for index, batch in enumerate(batches):
        seed = index if seeds is None else seeds[index]
        live = forward(module, batch, seed, call)
        other = forward(reference, batch, seed, call)
        assert live.calls.keys() == other.calls.keys()
        for name, child in site_names(reference).items():
            for own, counterpart in zip(
                live.calls.get(name, []), other.calls.get(name, []), strict=True
            ):
                compare_outputs(sums, name, own, counterpart)
                if name != "[root module]":
                    check_coordinates(sums, name, site_names(module)[name], child, own, counterpart)
    values: dict[str, Expected] = {}
    for site, pairs in sums.pairs.items():
        a, b = (torch.cat([pair[i].double().reshape(-1) for pair in pairs]) for i in (0, 1))
        difference, size = a - b, float(b.norm())
        norm = float(difference.norm())
        count = math.sqrt(max(1, a.numel()))
        key = f"activation_difference/{site}"
        scale = max(norm, floor * size)
        # Losses are often computed in float32, also in a model of float64.
        rounding = 1.0 if pairs[0][0].dtype == torch.float64 else 1e3
        values[f"{key}/norm"] = Expected(norm, scale)
        values[f"{key}/rms"] = Expected(norm / count, scale / count)
        values[f"{key}/relative_norm"] = Expected(
            norm / size if size else math.nan, scale / size if size else 0.0
        )
        largest = float(difference.abs().max()) if a.numel() else 0.0
        values[f"{key}/absmax"] = Expected(largest, max(largest, floor * float(b.abs().max())))
        cosine = float(a @ b) / (float(a.norm()) * size) if size and a.norm() else math.nan
        values[f"{key}/cosine"] = Expected(cosine, rounding)
        rows = torch.cat([row_norms(x.double() - y.double()) for x, y in pairs])
        operands = torch.cat([row_norms(y) for _, y in pairs])
        values[f"{key}/l2"] = Expected(
            float(rows.mean()), max(float(rows.mean()), floor * float(operands.mean()))
        )
    for key, norms in sums.norms.items():
        value = float(torch.cat(norms).mean())
        size = float(torch.cat(sums.scales[key]).mean())
        values[f"{key}/l2norm"] = Expected(value, max(value, floor * size))
    return values


def compare_outputs(sums: Sums, name: str, own: Call, reference: Call) -> None:
    counterparts = dict(walk(reference.output))
    for path, tensor in walk(own.output):
        if tensor.is_floating_point() and tensor.numel():
            sums.pairs.setdefault(name + path, []).append((tensor, counterparts[path]))


def check_coordinates(
    sums: Sums, name: str, module: nn.Module, reference: nn.Module, own: Call, other: Call
) -> None:
    given = [*own.arguments, *own.keywords.values()]
    given_reference = [*other.arguments, *other.keywords.values()]
    if isinstance(given[0], torch.Tensor) and given[0].is_floating_point():
        x, x0 = given[0].double(), given_reference[0].double()
        sums.norm(f"RCC x_t/{name}", x, x)
        sums.norm(f"RCC (x_t-x_0)/{name}", x - x0, x)
    worker = copy.deepcopy(reference)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.set_rng_state(own.random_state)
        mixed_output = worker(*copy.deepcopy(own.arguments), **copy.deepcopy(own.keywords))
    mixed, references = dict(walk(mixed_output)), dict(walk(other.output))
    only_update = isinstance(reference, nn.Embedding)
    is_norm = isinstance(reference, nn.LayerNorm) or type(reference).__name__.endswith("RMSNorm")
    for path, live in walk(own.output):
        if not live.is_floating_point():
            continue
        live = live.double()  # a difference in half precision would lose its digits
        between, start = mixed[path].double(), references[path].double()
        sums.norm(f"RCC (W_t-W_0)x_t/{name}{path}", live - between, live)
        if only_update:
            continue
        sums.norm(f"RCC W_0(x_t-x_0)/{name}{path}", between - start, live)
        if is_norm or isinstance(reference, nn.Linear):
            bias, bias0 = getattr(module, "bias", None), getattr(reference, "bias", None)
            a = live if bias is None else live - bias
            b = between if bias0 is None else between - bias0
            c = start if bias0 is None else start - bias0
            sums.norm(f"RCC (W_t-W_0)x_t/{name}{path}.weight", (a - b).detach(), a.detach())
            sums.norm(f"RCC W_0(x_t-x_0)/{name}{path}.weight", (b - c).detach(), b.detach())
