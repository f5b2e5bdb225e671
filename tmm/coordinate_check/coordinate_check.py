"""The refined coordinate check: train a model at several widths, and see what grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise, product
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tmm.coordinate_check.made_models import MadeModels, MakeModel
from tmm.coordinate_check.one_training import Batch, Loss, copied, forward, train
from tmm.coordinate_check.result import TERMS, CoordinateCheck, Growth, Term
from tmm.core.families import ACTIVATION, RCC
from tmm.core.keys import info_of, key_of, metric_of
from tmm.core.module_names import display_name, relative_names
from tmm.instrumentation.compile_settings import CompilerFunction
from tmm.runs.instrument import explain, instrument, monitor, remove
from tmm.spec.rules import activation, check_pattern, rcc
from tmm.spec.spec import Spec

Batches: TypeAlias = Iterable[Batch] | Callable[[int], Iterable[Batch]]

_LISTED = 5  # differing names in a message
_FUNCTIONS = {
    "make_model": "give one of the width that returns a module and its optimizer",
    "loss": "give one of output and targets, such as torch.nn.functional.cross_entropy",
}


def coord_check(
    make_model: MakeModel,
    widths: Sequence[int],
    batches: Batches,
    loss: Loss,
    *,
    steps: int = 5,
    seeds: int = 3,
    modules: str | None = None,
    backend: str | CompilerFunction | None = None,
    progress: bool = False,
) -> CoordinateCheck:
    """Fit how updates and activations of each layer grow with the width of a model.

    At each width and for each seed a new model is trained for ``steps`` steps. On the batch that
    comes next, the terms of ``tmm.rcc`` are measured against the model as it was made:
    ``(W_t-W_0)x_t``, what a layer's own weights did to its output, and ``W_0(x_t-x_0)``, what its
    changed input did, both without the bias where ``tmm.rcc`` has such rows; and the output itself,
    ``activation``. All are sizes of a coordinate: the 2-norm of the last dimension over the root of
    that dimension, mean over all rows. Where that is to be the same at every width, as under muP,
    exponents are 0.

    Args:
        make_model: from a width to a new module and its optimizer. Random numbers are seeded
            before.
        widths: at least two, rising. The layers have the same names at each.
        batches: pairs of inputs and targets, the same for each width and seed; or a function from
            the seed (0, 1, ...) to such pairs. The first ``steps`` + 1 are taken; fewer are
            repeated. The module is called as ``module(inputs)``, or ``module(**inputs)`` for a
            mapping. What they write to tensors of a batch is seen by no other training.
        loss: from the module's output and the targets to a scalar.
        steps: optimizer steps before the measurement. A layer behind one that is zero at first
            starts to move a step later.
        seeds: number of seeds; all points enter the fit.
        modules: regular expression for the layers to measure, as in ``tmm.activation``. By
            default all modules with parameters of their own.
        backend: compiles the model with ``torch.compile``; it runs uncompiled without.
        progress: show a bar of the trainings on standard error while they run.

    Raises:
        ValueError: for an argument that is out of range, no batch, layers that differ between
            widths, sizes that do not, a model that is returned twice, or a pattern that matches
            nothing.
        TypeError: if ``make_model``, ``batches`` or ``loss`` give something else than said here.
    """
    for name, value in (("make_model", make_model), ("loss", loss)):
        if not callable(value) or (name == "make_model" and isinstance(value, nn.Module)):
            raise TypeError(f"{name}={value!r} is not a function; {_FUNCTIONS[name]}")
    if not isinstance(widths, Iterable):
        raise TypeError(f"widths={widths!r} is not a list of numbers, such as (64, 128, 256)")
    widths = tuple(widths)
    _check_arguments(widths, steps, seeds, modules)
    data = _collect(batches, steps + 1, seeds)
    expected: list[str] | None = None
    unmeasured: dict[str, str] = {}
    points: dict[tuple[str, Term], list[float]] = {}
    models = MadeModels(make_model)
    for width, seed in _shown(list(product(widths, range(seeds))), progress):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module, optimizer = models.make(width)
            layers = _layers(module, modules)
            if expected is None:
                expected = layers
            _check_layers(expected, layers, widths[0], width)
            callee = module if backend is None else torch.compile(module, backend=backend)
            instrument(callee, _spec(layers))
            own = copied(data[seed])
            train(callee, optimizer, own[:steps], loss)
            models.check_sizes(module, width)
            sizes = _measure(callee, own[steps][0], steps)
        if not points:
            unmeasured = _unmeasured(callee, layers, sizes)
            points = {key: [] for key in sizes}
        _check_layers(_names(points), _names(sizes), widths[0], width)
        for key, size in sizes.items():
            points[key].append(size)
        remove(callee)
    growths = [
        Growth.of(layer, term, widths, np.reshape(sizes_of, (len(widths), seeds)))
        for term in TERMS
        for (layer, own), sizes_of in points.items()
        if own == term
    ]
    return CoordinateCheck(widths, seeds, steps, tuple(growths), unmeasured)


def _shown(trainings: list[tuple[int, int]], progress: bool) -> Iterable[tuple[int, int]]:
    """The trainings, one by one; a bar shows how many are done."""
    if not progress:
        return trainings
    from rich.console import Console
    from rich.progress import track

    # A notebook shows what a terminal shows; what rich has for notebooks needs ipywidgets.
    console = Console(stderr=True, force_jupyter=False)
    return track(trainings, "coordinate check", console=console)


def _check_arguments(widths: Sequence[int], steps: int, seeds: int, modules: str | None) -> None:
    if not all(isinstance(width, (int, np.integer)) for width in widths):
        raise TypeError(f"widths={widths!r} must be integers")
    if len(widths) < 2:
        raise ValueError(f"widths={widths!r}: a fit needs at least two, such as (64, 128, 256)")
    if widths[0] < 1 or any(a >= b for a, b in pairwise(widths)):
        raise ValueError(f"widths={widths!r} must be positive and rise; sort them, each once")
    for name, value in (("steps", steps), ("seeds", seeds)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}={value!r} is not a number of {name}")
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if modules is not None:
        check_pattern("tmm.coord_check", "modules", modules)


def _collect(batches: Batches, count: int, seeds: int) -> list[list[Batch]]:
    """``count`` batches for each seed."""
    if callable(batches):
        return [_repeated(batches(seed), count) for seed in range(seeds)]
    return [_repeated(batches, count)] * seeds


def _repeated(batches: Iterable[Batch], count: int) -> list[Batch]:
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches={batches!r} is neither iterable nor a function of the seed")
    found = list(islice(batches, count))
    if not found:
        raise ValueError("batches= has no batch; give pairs of inputs and targets")
    for batch in found:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"batches= must give pairs of inputs and targets, not {type(batch).__name__}"
            )
    return [found[index % len(found)] for index in range(count)]


def _layers(module: nn.Module, pattern: str | None) -> list[str]:
    names = {display_name(name): own for own, name in relative_names(module).items()}
    if pattern is not None:
        found = [name for name in names if re.match(pattern, name)]
        remedy = f"modules={pattern!r} matches none of {', '.join(list(names)[:_LISTED])}, ..."
    else:
        found = [name for name, own in names.items() if list(own.parameters(recurse=False))]
        remedy = "make_model= made a module without parameters"
    if not found:
        raise ValueError(remedy)
    return found


def _check_layers(expected: Sequence[str], found: Sequence[str], first: int, width: int) -> None:
    differing = [name for name in (*expected, *found) if (name in expected) != (name in found)]
    if differing:
        raise ValueError(
            f"make_model= gives other layers at width {width} than at width {first}:"
            f" {', '.join(differing[:_LISTED])}; only sizes may depend on the width, or choose"
            " layers that all have with modules="
        )


def _spec(layers: Sequence[str]) -> Spec:
    exactly = "|".join(rf"{re.escape(name)}\Z" for name in layers)
    outputs = activation(size=_size, dimension=_dimension, modules=exactly)
    return Spec(rcc(modules=exactly), outputs, reference="init")


def _size(output: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(output, dim=-1) / _last_dimension(output) ** 0.5
    return sizes


def _dimension(output: Tensor) -> Tensor:
    return output.new_full((), _last_dimension(output), dtype=torch.float32)


def _last_dimension(output: Tensor) -> int:
    return output.shape[-1] if output.dim() else 1


def _measure(model: Callable[..., Any], inputs: Any, step: int) -> dict[tuple[str, Term], float]:
    """Sizes of a coordinate, layers in order of execution."""
    with torch.no_grad(), monitor(model).step(step):
        forward(model, inputs)
    values = monitor(model).get_step_metrics()
    sizes: dict[tuple[str, Term], float] = {}
    for key, dimension in values.items():
        info = info_of(key)
        if metric_of(info) != "dimension":
            continue
        site = info.site
        root = float(dimension) ** 0.5
        for term in TERMS:
            if term == "activation":
                sizes[site, term] = float(values[key_of(ACTIVATION.name, site, "size")])
                continue
            for name in (f"{site}.weight", site):  # without the bias where that is measured
                norm = values.get(key_of(RCC.of(term), name, "l2norm"))
                if norm is not None:
                    sizes[site, term] = float(norm) / root
                    break
    return sizes


def _names(keys: Iterable[tuple[str, Term]]) -> list[str]:
    return [f"{layer} ({term})" for layer, term in keys]


def _unmeasured(
    model: Callable[..., Any], layers: Sequence[str], sizes: Iterable[tuple[str, Term]]
) -> dict[str, str]:
    sites = {site for site, _ in sizes}
    reasons = explain(model).unmeasured
    return {
        layer: reasons.get(layer, "the forward pass did not call it, or got no tensor from it")
        for layer in layers
        if not any(site == layer or site.startswith(f"{layer}[") for site in sites)
    }
