"""What plain eager hooks see: the reference that an instrumented model must agree with.

Written from the documentation alone. Nothing of tmm is used, so that an error of tmm's naming,
walking of outputs or arithmetic cannot hide behind the same error here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]
MetricFunction = Callable[[torch.Tensor], object]

EXTREMES = ("absmax", "min", "max")
ORDERED = ("mean", "min", "max")
COUNTS = ("nan_count", "inf_count")
AVERAGES = ("mean", "std", "rms", "norm", "mean_abs", "zero_fraction", "kurtosis")
BUILTIN = (*AVERAGES, *EXTREMES, *COUNTS, "histogram")

_POWERS = [2.0**exponent for exponent in range(-40, 17)]
EDGES = np.array([-math.inf, *(-p for p in reversed(_POWERS)), *_POWERS, math.inf])

_WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Relative errors allowed: of minima and maxima, and of everything else."""

    other: float
    extreme: float

    def of(self, metric: str) -> float:
        if metric in COUNTS:
            return 0.0
        return self.extreme if metric in EXTREMES else self.other


def tolerance(backend: str, dtype: torch.dtype = torch.float32) -> Tolerance:
    """What the project promises for a model that computes in ``dtype`` under ``backend``."""
    if backend == "inductor" and dtype == torch.bfloat16:
        return Tolerance(5e-3, 2e-2)
    if dtype == torch.float64:
        return Tolerance(1e-12, 1e-12)
    return Tolerance(1e-4, 1e-4) if backend == "inductor" else Tolerance(1e-5, 1e-5)


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """A value and what its error is relative to; ``data`` are the numbers behind a histogram."""

    value: float | FloatArray
    scale: float
    data: FloatArray | None = None


class Recording:
    """The outputs of every module, by the name of their site, call after call."""

    def __init__(self) -> None:
        self.sites: dict[str, list[torch.Tensor]] = {}
        self.integers: set[str] = set()

    def add(self, name: str, output: object) -> None:
        for path, tensor in walk(output):
            tensor = tensor.values() if tensor.is_nested else tensor
            if tensor.is_floating_point() or tensor.is_complex():
                self.sites.setdefault(name + path, []).append(tensor.detach().clone())
            else:
                self.integers.add(name + path)

    def data(self, site: str) -> FloatArray:
        """All elements of a site, as real numbers."""
        return np.concatenate([_as_numbers(tensor) for tensor in self.sites[site]])

    def expected(
        self, metrics: tuple[str, ...] = BUILTIN, **functions: MetricFunction
    ) -> dict[str, Expected]:
        """Key to value, of these built-in metrics and of functions whose values are averaged."""
        wanted: dict[str, Expected] = {}
        for site, tensors in self.sites.items():
            data = self.data(site)
            if data.size and metrics:
                known = [m for m in metrics if not (tensors[0].is_complex() and m in ORDERED)]
                for name, expected in _builtin(data).items():
                    if name in known:
                        wanted[f"activation/{site}/{name}"] = expected
            for name, function in functions.items():
                values = np.concatenate([_as_numbers(function(t.clone())) for t in tensors])
                if values.size:
                    expected = Expected(float(values.mean()), float(np.abs(values).mean()))
                    wanted[f"activation/{site}/{name}"] = expected
        return wanted


def _builtin(data: FloatArray) -> dict[str, Expected]:
    expected = {name: Expected(value, abs(value)) for name, value in builtin_values(data).items()}
    # A mean is as exact as the numbers that it is taken of.
    expected["mean"] = Expected(expected["mean"].value, float(expected["mean_abs"].value))
    return expected | {"histogram": Expected(histogram(data), 0.0, data)}


def _as_numbers(values: object) -> FloatArray:
    tensor = torch.as_tensor(values)
    tensor = tensor.abs() if tensor.is_complex() else tensor
    return tensor.to(torch.float64).reshape(-1).numpy()


def walk(output: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in tuples and lists by position, in dicts by key, in dataclasses by field."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, dict):
        for key in output:
            yield from walk(output[key], f"{path}[{key}]")
    elif isinstance(output, (list, tuple)):
        for position in range(len(output)):
            yield from walk(output[position], f"{path}[{position}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from walk(getattr(output, field.name), f"{path}[{field.name}]")


def site_names(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules by the name that users know, without those that merely wrap another one."""
    named = {}
    for name, child in module.named_modules():
        if not any(wrapper in child._modules for wrapper in _WRAPPERS):
            parts = [part for part in name.split(".") if part and part not in _WRAPPERS]
            named[".".join(parts) or "[root module]"] = child
    return named


@contextmanager
def eager_hooks(module: torch.nn.Module, recording: Recording) -> Iterator[None]:
    """Record what each module of an uncompiled model returns while the block runs.

    Leave the block before a backward pass: recomputed activations are no new ones.
    """

    def watch(name: str, child: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        return child.register_forward_hook(lambda _, __, output: recording.add(name, output))

    handles = [watch(name, child) for name, child in site_names(module).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def builtin_values(data: FloatArray) -> dict[str, float]:
    """Every scalar built-in metric, by its definition, in float64."""
    with np.errstate(all="ignore"):
        deviation = data - data.mean()
        second = np.mean(deviation**2)
        constant = math.isfinite(data.min()) and data.min() == data.max()
        values = {
            "mean": data.mean(),
            "std": np.sqrt(np.sum(deviation**2) / np.float64(data.size - 1)),
            "rms": np.sqrt(np.mean(data**2)),
            "norm": np.sqrt(np.sum(data**2)),
            "mean_abs": np.abs(data).mean(),
            "absmax": np.abs(data).max(),
            "min": data.min(),
            "max": data.max(),
            "zero_fraction": np.mean(data == 0),
            "kurtosis": math.nan if constant else np.mean(deviation**4) / second**2,
        }
    if constant and data.size > 1:
        values["std"] = 0.0
    if np.isnan(data).any():
        values = dict.fromkeys(values, math.nan)
    values["nan_count"] = np.isnan(data).sum()
    values["inf_count"] = np.isinf(data).sum()
    return {name: float(value) for name, value in values.items()}


def histogram(data: FloatArray) -> FloatArray:
    """Counts per bin: ``[edge, next edge)``, the last one with +inf; NaN is in none."""
    numbers = data[~np.isnan(data)]
    bins = np.searchsorted(EDGES, numbers, side="right") - 1
    return np.bincount(np.minimum(bins, len(EDGES) - 2), minlength=len(EDGES) - 1).astype(float)


def disagreements(
    got: Mapping[str, float | FloatArray], want: Mapping[str, Expected], allowed: Tolerance
) -> list[str]:
    """A line for each key that is missing, superfluous or wrong; the worst first."""
    missing = [f"missing: {key}" for key in want if key not in got]
    extra = [f"superfluous: {key} = {got[key]}" for key in got if key not in want]
    wrong: list[tuple[float, str]] = []
    for key, expected in want.items():
        if key not in got:
            continue
        limit = allowed.of(key.rpartition("/")[2])
        if expected.data is None:
            error = _relative_error(float(got[key]), float(expected.value), expected.scale)
            description = f"{key}: got {got[key]!r}, want {expected.value!r}"
        else:
            error = _misplaced(np.asarray(got[key]), expected.data, limit)
            description = f"{key}: {error:.0f} elements in the wrong bins"
            error /= max(1, expected.data.size)
        if not error <= limit:
            wrong.append((error, f"{description} (error {error:.1e}, allowed {limit:.0e})"))
    return missing + extra + [line for _, line in sorted(wrong, reverse=True)]


def assert_agrees(
    got: Mapping[str, float | FloatArray],
    want: Mapping[str, Expected],
    allowed: Tolerance,
    *,
    shown: int = 12,
) -> None:
    """Fail with the keys at fault, unless each key is there and within its tolerance."""
    assert want, "nothing to compare with"
    lines = disagreements(got, want, allowed)
    assert not lines, f"{len(lines)} of {len(want)} keys disagree:\n" + "\n".join(lines[:shown])


def _relative_error(got: float, want: float, scale: float) -> float:
    if got == want or (math.isnan(got) and math.isnan(want)):
        return 0.0
    error = abs(got - want) / scale if scale else math.inf
    return math.inf if math.isnan(error) else error


def _misplaced(got: FloatArray, data: FloatArray, limit: float) -> float:
    """How many elements lie in bins that no change of each by ``limit`` could bring them to.

    The change is relative to the element or to the site's root mean square, as rounding is.
    """
    numbers = np.sort(data[~np.isnan(data)])
    if got.shape != (len(EDGES) - 1,) or got.sum() != numbers.size:
        return math.inf
    finite = numbers[np.isfinite(numbers)]
    size = math.sqrt(np.mean(finite**2)) if finite.size else 0.0
    inner = EDGES[1:-1]
    below = np.cumsum(got)[:-1]
    margin = limit * np.maximum(np.abs(inner), size)
    fewest = np.searchsorted(numbers, inner - margin, side="left")
    most = np.searchsorted(numbers, inner + margin, side="left")
    return float(np.maximum(fewest - below, below - most).clip(min=0).max())


Call = Callable[[torch.nn.Module], object]


def run_calls(model: torch.nn.Module, calls: list[Call], *, seed: int = 0) -> None:
    """Micro-batches of one step: forward and backward of each, from the same random numbers."""
    for index, call in enumerate(calls):
        torch.manual_seed(seed + index)
        backward(call(model))


def record_calls(module: torch.nn.Module, calls: list[Call], *, seed: int = 0) -> Recording:
    """What hooks see in ``run_calls`` of an uncompiled module."""
    recording = Recording()
    with torch.compiler.set_stance("force_eager"):
        for index, call in enumerate(calls):
            torch.manual_seed(seed + index)
            with eager_hooks(module, recording):
                output = call(module)
            backward(output)
    return recording


def backward(output: object) -> None:
    """A backward pass from all that a model returned."""
    tensors = [tensor for _, tensor in walk(output) if tensor.requires_grad]
    if tensors:
        torch.stack([tensor.abs().double().sum() for tensor in tensors]).sum().backward()
