"""Attach monitoring to a compiled model, find it, take it off."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._dynamo.eval_frame import OptimizedModule

from tmm.compile_settings import settings_of
from tmm.explain import Explanation
from tmm.metrics import HISTOGRAM_EDGES
from tmm.monitor import Monitor, OnError
from tmm.naming import display_name, relative_names
from tmm.run_info import describe_environment
from tmm.runtime.binding import KeyRegistry
from tmm.runtime.writer import RunWriter
from tmm.spec import Plan, Spec
from tmm.twin import Twin

# To type checkers, torch.compile(module) is any callable.
Model = TypeVar("Model", bound=Callable[..., Any])


class Dispatch:
    """The forward of an instrumented model: the twin in a monitored step, else the user's own.

    It stands in an attribute that copies and pickles of a compiled model do not carry, so that
    those are clean.
    """

    def __init__(self, plain: Callable[..., Any], monitor: Monitor, twin: Twin) -> None:
        self.plain = plain
        self.monitor = monitor
        self.twin = twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass."""
        if not self.monitor.recording:
            return self.plain(*args, **kwargs)
        return self.monitor.run_forward(self.plain, *args, **kwargs)


def instrument(
    model: Model,
    spec: Spec,
    run: str | os.PathLike[str] | None = None,
    *,
    on_error: OnError = "raise",
) -> Model:
    """Measure what ``spec`` asks for in the monitored steps of a compiled model.

    Args:
        model: what ``torch.compile(module)`` returned, with any backend, mode and options.
        spec: what to measure, where and when.
        run: folder to record into; one that exists is continued. In memory only without it.
        on_error: what a fault of the monitoring does before the first step has been recorded:
            ``"raise"`` it, or ``"warn"``, drop the step and run the plain program. After that
            it warns in either case.

    Returns:
        The same object, monitored. ``tmm.monitor(model)`` opens its steps.

    Raises:
        TypeError: if ``model`` is not a compiled module or ``spec`` not a ``tmm.Spec``.
        ValueError: if the model is instrumented already or has nothing to measure, a rule
            matches none of its modules, or ``run`` holds something that is not a run.
        OSError: if ``run`` cannot be written.
    """
    if not isinstance(model, OptimizedModule):
        raise TypeError(_not_compiled(model))
    if not isinstance(spec, Spec):
        raise TypeError(f"spec={spec!r} is not a tmm.Spec; write tmm.Spec(tmm.activation('rms'))")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'warn'")
    if _dispatch(model) is not None:
        raise ValueError(
            "the model is instrumented already; tmm.remove(model) first, or put all rules into"
            " one tmm.Spec"
        )
    module = model._orig_mod
    names = [display_name(name) for name in relative_names(module).values()]
    plan = Plan(spec, names)
    settings = settings_of(model)
    writer = None
    if run is not None:
        writer = RunWriter(run, info=describe_environment(spec), histogram_edges=HISTOGRAM_EDGES)
    monitor = Monitor(spec, module, KeyRegistry(), writer, on_error)
    twin = Twin(module, plan, settings, monitor)
    monitor.attach(twin, lambda: str(Explanation.of(twin)))
    model.forward = Dispatch(model.forward, monitor, twin)
    return model


def monitor(model: Callable[..., Any]) -> Monitor:
    """The monitor of an instrumented model.

    Raises:
        ValueError: if the model is not instrumented.
    """
    return _require(model).monitor


def remove(model: Model) -> Model:
    """Take the monitoring off ``model``, write what is left of its run, and give ``model`` back.

    Raises:
        ValueError: if the model is not instrumented.
        OSError: if what was measured could not be written.
    """
    dispatch = _require(model)
    setattr(model, "forward", dispatch.plain)  # noqa: B010
    dispatch.monitor.close()
    return model


def explain(model: Callable[..., Any]) -> Explanation:
    """What the spec matched, what the graphs hold, and what is not measured and why.

    Graphs are known once the model has run in a monitored step (or ``monitor.prepare``).

    Raises:
        ValueError: if the model is not instrumented.
    """
    return Explanation.of(_require(model).twin)


def _dispatch(model: Callable[..., Any]) -> Dispatch | None:
    forward = model.__dict__.get("forward") if isinstance(model, torch.nn.Module) else None
    return forward if isinstance(forward, Dispatch) else None


def _require(model: Callable[..., Any]) -> Dispatch:
    dispatch = _dispatch(model)
    if dispatch is None:
        raise ValueError("the model is not instrumented; call tmm.instrument(model, spec) first")
    return dispatch


def _not_compiled(model: object) -> str:
    if isinstance(model, torch.nn.Module):
        return (
            f"model is a {type(model).__name__} that is not compiled; write"
            " tmm.instrument(torch.compile(model), spec)"
        )
    return f"model={model!r} is not what torch.compile(module) returns"
