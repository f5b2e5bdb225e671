"""What goes into a model and what comes out of it, as far as diagnosis asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from tmm.core.families import MODEL_INPUT, MODEL_OUTPUT
from tmm.core.metrics import builtin_reductions, function_reduction
from tmm.core.module_names import Assembly, unwrapped
from tmm.core.records import Measurement, Site
from tmm.instrumentation.apart import why_no_values
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.regions import Region
from tmm.instrumentation.twin import Twin
from tmm.kernels.dense import packed_dtype
from tmm.runtime.eager_functions import reduce_eagerly
from tmm.runtime.key_binding import Binding
from tmm.spec.ranks import is_distributed

_METRICS = ("mean", "rms", "absmax", "zero_fraction")
_OF_INTEGERS = builtin_reductions(_METRICS, is_complex=False)
_OF_NUMBERS = builtin_reductions((*_METRICS, "nan_count", "inf_count"), is_complex=False)
_ROWS = 64  # of an output, evenly spaced, which tell whether items are alike

Add = Callable[[Binding, Sequence[torch.Tensor]], None]


def spread(output: torch.Tensor) -> torch.Tensor:
    """How far the rows of an output (its last dimension) lie apart, as a part of their size.

    The root mean square of the rows minus their mean over that of the rows, of 64 rows at most,
    evenly spaced: 0 where all are equal, about 1 where they have nothing in common.
    """
    rows = output.detach().flatten(0, -2)
    rows = rows[:: -(-len(rows) // _ROWS)].to(packed_dtype(rows.device))
    apart, whole = (torch.linalg.vector_norm(x) for x in (rows - rows.mean(0), rows))
    quotient: torch.Tensor = apart / whole
    return quotient


_SPREAD = function_reduction("spread", spread, "mean")
_ELEMENTS = function_reduction("elements", torch.numel, "sum")


def between_ends(
    run: Callable[[], Any],
    twin: Twin,
    region: Region,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    measure: Callable[..., None],
) -> Any:
    """Run a forward pass, with the inputs and the output of the model if they are asked for.

    ``measure`` calls one of the functions below. Of a pipeline the inputs are those of the first
    stage, and the output that of the last.
    """
    module = region.module
    is_first = is_last = region is twin.root
    if isinstance(twin.module, Assembly) and module is not None:
        is_first, is_last = twin.module.begins(module), twin.module.ends(module)
    is_asked = twin.plan.spec.diagnosis
    if is_asked and is_first:
        forward = region.callee if module is None else unwrapped(module).forward
        measure(measure_inputs, twin.attribution, forward, args, kwargs)
    output = run()
    if is_asked and is_last:
        measure(measure_output, twin.attribution, output)
    return output


def measure_inputs(
    attribution: Attribution,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    add: Add,
) -> None:
    """Hand the rows of all tensors among the arguments of ``forward`` to ``add``.

    They are the built-in ones and ``elements``, the number of elements in all forward passes of the
    step. Integers are measured as numbers, without counts of what is not finite; what holds no
    numbers is left out.
    """
    for name, value in _named(forward, args, kwargs):
        for path, given in tensors_in(value):
            if is_distributed(given) or given.is_complex() or not given.numel():
                continue
            reductions = _OF_NUMBERS if given.is_floating_point() else _OF_INTEGERS
            tensor = given.detach() if given.is_floating_point() else given.float()
            if why_no_values(tensor):
                continue
            rows = [(reduction, reduce_eagerly(tensor, reduction)) for reduction in reductions]
            count = tensor.new_tensor([1, tensor.numel()], dtype=torch.float64, device="cpu")
            for reduction, row in (*rows, (_ELEMENTS, count)):
                measurement = Measurement(MODEL_INPUT.name, Site(f"{name}{path}"), reduction)
                add(attribution.bind_eagerly(measurement), [row])


def measure_output(attribution: Attribution, output: object, add: Add) -> None:
    """Hand the `spread` of the first tensor that has rows to ``add``; none may have."""
    for path, tensor in tensors_in(output):
        if why_no_values(tensor) or is_distributed(tensor) or not tensor.is_floating_point():
            continue
        if tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor[..., 0].numel() > 1:
            measurement = Measurement(MODEL_OUTPUT.name, Site(f"output{path}"), _SPREAD)
            value = spread(tensor)
            add(
                attribution.bind_eagerly(measurement),
                [torch.stack([torch.ones_like(value), value])],
            )
            return


def _named(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The arguments with the names that the function gives them."""
    places = names_of_places(forward)
    for place, value in enumerate(args):
        yield (places[place] if place < len(places) else f"argument_{place}"), value
    yield from kwargs.items()


def names_of_places(forward: Callable[..., Any]) -> Sequence[str]:
    """The names of the parameters that arguments without names go to, in their order."""
    function = getattr(forward, "__func__", forward)
    if isinstance(function, FunctionType) and not vars(function):  # as most are, and much faster
        code, is_bound = function.__code__, function is not forward
        return code.co_varnames[is_bound : code.co_argcount]
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
