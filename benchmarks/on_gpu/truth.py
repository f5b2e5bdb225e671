"""Whether what tmm says on a device is true: models by eager hooks, kernels by their definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import tmm
from benchmarks.on_gpu.findings import Finding
from benchmarks.on_gpu.subjects import Subject, ZooModel, zoo
from tmm.core.metrics import COLUMN_SEPARATOR, METRICS, builtin_reductions, finalize
from tmm.kernels.attention.choose import summarize_attention
from tmm.kernels.ops import summarize
from tmm.kernels.summarize.group import summarize_group
from tmm.testing import assert_matches_hooks
from tmm.testing.defined_values import Tolerance, disagreements, expected_values

Compile = Callable[[torch.nn.Module], torch.nn.Module]

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
_OF_HALF = 2e-2
"""A program that is compiled rounds at other places, which half precision shows."""
_OF_KERNELS = 1e-5

(_ALL,) = builtin_reductions(tuple(METRICS), is_complex=False)


def everything() -> tmm.Spec:
    """All that hooks can tell.

    But not how many gradients are zero: in one order of operations some cancel to exactly that.
    """
    of_gradients = [name for name in METRICS if name != "zero_fraction"]
    return tmm.Spec(
        tmm.activation(*METRICS),
        tmm.activation_gradient(*of_gradients),
        tmm.gradient(*of_gradients),
        tmm.parameter(*METRICS),
    )


def models(subject: Subject) -> Iterator[Finding]:
    """Each model of the zoo, compiled, and some of them uncompiled."""
    with exact_products():
        for model in zoo(toy=subject.toy):
            yield compared_with_hooks(model, subject, "compiled", compiler(subject.options))
        for model in zoo(toy=subject.toy)[:3]:
            yield compared_with_hooks(model, subject, "uncompiled", lambda module: module)


def compared_with_hooks(model: ZooModel, subject: Subject, way: str, compiled: Compile) -> Finding:
    """One step of a model that was compiled in some way, against the same with eager hooks."""
    torch._dynamo.reset()
    module, inputs = model.on(subject.device)
    allowed = _TOLERANCES.get(model.dtype, _OF_HALF)

    def check() -> str:
        rows = assert_matches_hooks(compiled(module), (inputs,), everything(), tolerance=allowed)
        return f"{len(rows)} rows agree within {allowed:g}"

    return guarded(f"{model.name}, {way}", check)


def compiler(options: Mapping[str, Any]) -> Compile:
    """What compiles a module with such options of ``torch.compile``."""

    def compiled(module: torch.nn.Module) -> torch.nn.Module:
        result: Any = torch.compile(module, **options)
        assert isinstance(result, torch.nn.Module)
        return result

    return compiled


def guarded(what: str, check: Callable[[], str]) -> Finding:
    """What a check says, good unless it raises; its error else."""
    try:
        return Finding(what, check(), is_good=True)
    except AssertionError as error:
        return Finding(what, str(error)[:1500], is_good=False)
    except Exception as error:
        return Finding(what, f"{type(error).__name__}: {error}"[:1500], is_good=False)


@contextmanager
def exact_products() -> Iterator[None]:
    """Let products and convolutions of float32 be computed in float32, in either program."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def kernels(subject: Subject) -> Iterator[Finding]:
    """Each kernel of the device, on tensors of many sizes, with extremes, infinities and NaN."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):

        def one_by_one(dtype: torch.dtype = dtype) -> str:
            tensors = samples(dtype, toy=subject.toy)
            columns = COLUMN_SEPARATOR.join(_ALL.columns)
            return compared(tensors, [summarize(x.to(subject.device), columns) for x in tensors])

        def together(dtype: torch.dtype = dtype) -> str:
            tensors = samples(dtype, toy=subject.toy)
            rows = summarize_group([x.to(subject.device) for x in tensors], _ALL.columns)
            return compared(tensors, list(rows))

        name = str(dtype).removeprefix("torch.")
        yield guarded(f"one tensor at a time, {name}", one_by_one)
        yield guarded(f"many tensors at once, {name}", together)
        if dtype != torch.float64:
            yield guarded(f"attention, {name}", lambda dtype=dtype: attention(subject, dtype))  # type: ignore[misc]


def samples(dtype: torch.dtype, *, toy: bool) -> list[torch.Tensor]:
    """Tensors of the CPU: of many sizes, far from zero, transposed, with infinities and NaN."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sizes = (1, 7, 256, 4097) if toy else (1, 7, 256, 4095, 4097, 65_537, 1_048_583, 1 << 24)
    zeros = noise(5000).relu()
    infinite, undefined = zeros.clone(), zeros.clone()
    infinite[17], infinite[-1], undefined[4096] = math.inf, -math.inf, math.nan
    far = noise(8192) * 1e-2 + 10
    tensors = [*map(noise, sizes), far, noise(96, 200), zeros, infinite, undefined]
    found = [tensor.to(dtype) for tensor in tensors]
    found[len(sizes) + 1] = found[len(sizes) + 1].t()
    return found


def compared(tensors: list[torch.Tensor], rows: list[torch.Tensor]) -> str:
    """Compare the metrics of rows with their definitions; raises ``AssertionError``."""
    allowed = Tolerance(_OF_KERNELS, _OF_KERNELS)
    lines: list[str] = []
    for tensor, row in zip(tensors, rows, strict=True):
        numbers = finalize(_ALL, row.cpu().double().numpy()[None])[0]
        got = dict(zip(_ALL.metrics, map(float, numbers), strict=True))
        want = expected_values(tensor.double().reshape(-1).numpy())
        found = disagreements(got, {name: want[name] for name in got}, allowed)
        lines += [f"{tuple(tensor.shape)}: {line}" for line in found]
    if lines:
        raise AssertionError("\n".join(lines[:10]))
    return f"{len(tensors)} tensors, {len(_ALL.metrics)} metrics agree within {_OF_KERNELS:g}"


def attention(subject: Subject, dtype: torch.dtype) -> str:
    """Compare the statistics of attentions with those of the same numbers in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    length = 40 if subject.toy else 700
    query, key = (torch.randn(2, 3, length, 64, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(length, length, generator=generator) > 0.3
    worst = 0.0
    for given, is_causal in ((None, True), (mask, False)):
        rows = summarize_attention(
            *(query.to(subject.device), key.to(subject.device)),
            None if given is None else given.to(subject.device),
            is_causal=is_causal,
            scale=None,
        )
        want = summarize_attention(
            *(query.double(), key.double(), given), is_causal=is_causal, scale=None
        )
        error = (rows.cpu().double() - want).abs() / want.abs()
        worst = max(worst, float(error.nan_to_num(math.inf).max()))
    allowed = 10 * _OF_KERNELS  # exponentials of float32
    assert worst <= allowed, f"largest relative error {worst:.1e}, allowed {allowed:g}"
    return f"largest relative error {worst:.1e}, allowed {allowed:g}"
