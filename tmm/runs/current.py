"""One run at a time, for those who like one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from tmm.core.failures import warn
from tmm.core.interactive import is_interactive
from tmm.runs.live import LiveRun
from tmm.runs.start import start_run

Model = TypeVar("Model", bound=Callable[..., Any])

_current: ContextVar[LiveRun | None] = ContextVar("tmm_current_run", default=None)


def init(project: str = "default", **options: Any) -> LiveRun:
    """Start a run and make it the current one; arguments and errors as of ``tmm.start_run``.

    In a notebook a current run that is not finished ends, and a warning says so.

    Raises:
        RuntimeError: if there is a current run that is not finished, and no notebook.
    """
    run = _current.get()
    if run is not None and not run.is_finished:
        if not is_interactive():
            raise RuntimeError(f"the run {run.id} is not finished; call tmm.finish() first")
        run.finish()
        warn(f"the run {run.id} was not finished: a new one begins, and it ends, in {run.path}")
    run = start_run(project, **options)
    _current.set(run)
    return run


def current_run() -> LiveRun:
    """The run that ``tmm.init`` started.

    Raises:
        RuntimeError: if there is none, or it is finished.
    """
    run = _current.get()
    if run is None or run.is_finished:
        raise RuntimeError("there is no current run; call tmm.init(project=...) first")
    return run


def log(values: Mapping[str, object], step: int | None = None) -> None:
    """``LiveRun.log`` of the current run."""
    current_run().log(values, step)


def step(*, samples: int | None = None, tokens: int | None = None) -> int:
    """``LiveRun.step`` of the current run."""
    return current_run().step(samples=samples, tokens=tokens)


def watch(model: Model, *arguments: Any, **options: Any) -> Model:
    """``LiveRun.watch`` of the current run."""
    return current_run().watch(model, *arguments, **options)


def finish() -> None:
    """``LiveRun.finish`` of the current run; nothing if there is none."""
    run = _current.get()
    if run is not None:
        run.finish()
    _current.set(None)
