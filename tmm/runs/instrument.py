"""Attach monitoring to a model, find it, take it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tmm.core.dynamo_private import OptimizedModule, innermost_fn
from tmm.core.failures import OnError
from tmm.core.module_names import display_name, parameter_names, relative_names
from tmm.instrumentation.compile_settings import CompilerFunction, settings_for, settings_of
from tmm.instrumentation.eager_backend import eager, why_traced
from tmm.instrumentation.pass_trace import TraceFolder
from tmm.instrumentation.regions import COMPILED_CALL, Region, region_of, regions_in
from tmm.instrumentation.switch import (
    Switch,
    attach,
    bears_mark,
    is_bypassed,
    root_switch,
)
from tmm.runs.at_path import PathRun
from tmm.runs.instrumented_again import make_room, take_off
from tmm.runs.live import LiveRun
from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.ranks.gloo import ProcessGroup
from tmm.runtime.ranks.protocol import CrossRank
from tmm.runtime.store.null_writer import SilentWriter
from tmm.spec.program_choice import Programs, check_programs, choose_programs
from tmm.spec.ranks import Ranks, check_distributed, check_placements, is_joined
from tmm.spec.reference import load_reference
from tmm.spec.spec import Plan, Spec
from tmm.steps.explanation import Explanation
from tmm.steps.model_steps import ModelSteps
from tmm.steps.monitor import Monitor
from tmm.steps.monitored_model import MonitoredModel, Recording
from tmm.steps.timeline import StepTimeline

# To type checkers, torch.compile(module) is any callable.
Model = TypeVar("Model", bound=Callable[..., Any])


def instrument(
    model: Model,
    spec: Spec,
    run: str | os.PathLike[str] | LiveRun | None = None,
    *,
    resume: bool = False,
    module: torch.nn.Module | None = None,
    parts: Iterable[torch.nn.Module] | None = None,
    backend: str | CompilerFunction | None = None,
    on_error: OnError = "raise",
    trace: str | os.PathLike[str] | None = None,
    distributed: bool = True,
    per_rank: bool = False,
    placements: Mapping[str, str] | None = None,
    programs: Programs = "auto",
) -> Model:
    """Measure what ``spec`` asks for in the monitored steps of a model.

    Args:
        model: a module, compiled in any way (``torch.compile(module)``, ``module.compile()``,
            parts of it one by one) or not at all; or, with ``module``, a step function that calls
            the module, such as what ``torch.compile(step)`` returned.
        spec: what to measure, where and when.
        run: folder to record into. Where it holds a run already, or one is being recorded there,
            this one is recorded beside it, as ``path-2``, and a warning names that folder;
            ``tmm.monitor(model).path`` is where it is. Or a run of ``tmm.start_run``, which then
            has the steps of this model. In memory only without it.
        resume: go on with the run in the folder ``run``, if there is one. What it had recorded from
            the first step of this training on no longer counts. A spec or model that differs from
            the recorded one is warned of, and an event of the run.
        module: the module whose parts are measured, when ``model`` is a function.
        parts: with a function that is not to be traced itself, where nothing is compiled: the
            modules that are, each on its own, when it calls them.
        backend: the compiler of the monitored steps of a model that is not compiled at all, which
            are traced then. Without it they run the model's own program, as the others do;
            ``tmm.attention``, a reference and tensor parallel models need a trace even so, of
            which the program does not notice anything.
        on_error: what a fault of the monitoring does before the first step has been recorded:
            ``"raise"`` it, or ``"warn"``, drop the step and run the plain program. After that
            it warns in either case.
        trace: folder for the text of each graph before and after each pass, to look for faults.
            The environment variable TMM_TRACE sets it, too.
        distributed: where torch.distributed runs several processes, join their rows, so that they
            are those of the whole model and the whole batch; every process is to call this, with
            the same spec, and rank 0 records. Without it each process is by itself.
        per_rank: do not join them, and record those of rank k into the folder ``rank-k`` of
            ``run``.
        placements: of a tensor parallel model, how ranks hold the outputs of modules of which no
            ``DTensor`` tells it: ``{regular expression: "shard"}`` for those of which each rank has
            a part, ``"replicate"`` for those of which each has all. Matched with ``re.match`` on
            the names of modules and of recorded values. Without it each rank measures them under a
            name of its own; ``tmm.explain`` lists them.
        programs: of a compiled model, what the steps that are not monitored run. With 2, the
            user's own program, untouched: both are compiled. With 1, the measured program, whose
            rows are dropped at once: one is compiled, and each step has the cost of the kernels.
            ``"auto"`` is 1 where these only read tensors that are there, and 2 with a reference,
            attention, histograms, functions of the user, or gradients of activations that ranks
            share (tensor parallel). What has no gradients runs the user's
            own program in either case. ``tmm.explain`` says which it is, and why.

    Returns:
        The same object, monitored; for a function, a new one to call in its place.
        ``tmm.monitor(model)`` opens its steps.

    Raises:
        TypeError: if ``model`` is neither a module nor a function, ``spec`` not a ``tmm.Spec``, or
            ``run`` neither a path nor a run.
        ValueError: if the model is instrumented already (in a notebook this call replaces the
            earlier one, and a warning says so) or has nothing to measure, a rule matches nothing,
            the reference does not fit, ``module`` or ``backend`` does not go with ``model``,
            ``programs`` is none of these, ``placements`` is not as it should be, ``run`` holds
            something that is not a run, the run to resume is running, or the model is distributed
            in a way that is not supported.
        RuntimeError: if not all processes call this.
        OSError: if ``run`` or ``trace`` cannot be written, or ``run`` is a file.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"spec={spec!r} is not a tmm.Spec; write tmm.Spec(tmm.activation('rms'))")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'warn'")
    if run == "" or not (run is None or isinstance(run, (str, os.PathLike, LiveRun))):
        raise TypeError(f"run={run!r} is neither the path of a folder nor a run")
    if resume and (run is None or isinstance(run, LiveRun)):
        raise ValueError("resume=True goes with the path of a run; tmm.start_run(resume=...) else")
    check_programs(programs)
    measured = _measured_module(model, module, parts)
    live = run if isinstance(run, LiveRun) else None
    model = make_room(model, measured, live)  # type: ignore[assignment]
    regions = regions_in(measured if module is None else module)
    if isinstance(model, OptimizedModule):
        regions = regions_in(model)
    if parts is not None and not regions and settings_of(model) is None:
        settings = None if backend is None else settings_for(backend)
        regions = [Region(part, settings, part) for part in parts]
        root = Region(innermost_fn(model), None)
    else:
        root = _root(model, regions, backend)
    if all(region.callee is not measured for region in (root, *regions)):
        regions.append(Region(measured, None, measured))  # it may be called by itself, too
    is_compiled = backend is None and any(r.settings is not None for r in (root, *regions))
    names = [display_name(name) for name in relative_names(measured).values()]
    plan = Plan(spec, names, dict(parameter_names(measured).values()))
    reference = load_reference(measured, plan, spec.reference)
    trace = trace or os.environ.get("TMM_TRACE")
    trace_folder = None if trace is None else TraceFolder(Path(trace))
    check_placements(placements, names)
    place, ranks = Ranks(), None
    if distributed and not per_rank and is_joined():
        check_distributed(measured, reference)
        group = ProcessGroup()
        place = Ranks.of(measured, group.everything, placements)
        ranks = CrossRank(group, end_seconds=min(600.0, group.patience))
    shares_tensors = place.tensor_parallel is not None
    choice = choose_programs(
        programs, spec, own_is_compiled=is_compiled, shares_tensors=shares_tensors
    )
    if backend is None and all(region.settings is None for region in (root, *regions)):
        root, regions = _traced_if_need_be(root, regions, parts is not None, spec, place)
    if per_rank:
        run = _folder_of_rank(run)
    own: PathRun | None = None
    registry = KeyRegistry(lambda family: spec.notes(family) or place.notes(family), spec.site_name)
    siblings: list[Switch] = []
    try:
        if live is not None:
            recording = live.recording_of(registry)
        elif run is not None and place.rank > 0:
            writer = SilentWriter(Path(run))  # type: ignore[arg-type]
            recording = Recording(StepTimeline(registry), writer)
        elif run is not None:
            own = PathRun(Path(run), resume=resume)  # type: ignore[arg-type]
            recording = Recording(StepTimeline(registry), own.writer, own.earlier)
        else:
            recording = Recording(StepTimeline(registry))
        monitored = MonitoredModel.of(
            *(root, regions, measured, plan, recording),
            reference=reference,
            trace=trace_folder,
            on_error=on_error,
            place=place,
            programs=choice,
            ranks=ranks,
            take_off=partial(take_off, siblings, is_mark_left=live is not None),
            is_bypassed=lambda: any(map(is_bypassed, siblings)),
        )
    except BaseException:
        if own is not None:
            own.give_up()
        raise
    if live is not None:
        live.attach(monitored)
    if own is not None:
        # Other ranks may have exited, without a word: nobody waits for them.
        own.close_at_exit(monitored.steps.close if ranks is None else own.writer.close)
        if own.notice:
            monitored.steps.gaps.warn_once("path", 0, own.notice)
    switch = partial(Switch.of, owner=monitored, twin=monitored.steps.twin, siblings=siblings)
    for region in regions:
        if region.holder is not root.holder:
            attach(switch(region, monitored.steps.recorder, is_root=region.callee is measured))
    function = attach(switch(root, monitored.steps.recorder, is_root=True, plain=model))
    return model if isinstance(model, torch.nn.Module) else function  # type: ignore[return-value]


def monitor(model: Callable[..., Any]) -> Monitor:
    """The monitor of an instrumented model, or of the module of an instrumented function.

    Raises:
        ValueError: if the model is not instrumented.
    """
    return _monitored(_require(model)).monitor


def steps_of(model: Callable[..., Any]) -> ModelSteps:
    """The steps of an instrumented model, for what drives them in the place of its user.

    Raises:
        ValueError: if the model is not instrumented.
    """
    return _monitored(_require(model)).steps


def remove(model: Model) -> Model:
    """Take the monitoring off ``model``, write what is left of its run, and give ``model`` back.

    A run of ``tmm.start_run`` that ends does so by itself, after which this does nothing. Of an
    instrumented function, the function that it was made of is given back.

    Raises:
        ValueError: if the model is not instrumented.
        OSError: if what was measured could not be written.
    """
    switch = root_switch(model)
    if switch is None and bears_mark(model):
        return model  # its run has ended, and taken the monitoring off
    switch = _require(model)
    take_off(switch.siblings, is_mark_left=False)
    _monitored(switch).steps.close()
    if isinstance(model, torch.nn.Module):
        return model
    return switch.original  # type: ignore[return-value]


def explain(model: Callable[..., Any]) -> Explanation:
    """What the spec matched, what the graphs hold, and what is not measured and why.

    Graphs are known once the model has run in a monitored step (or ``monitor.prepare``).

    Raises:
        ValueError: if the model is not instrumented.
    """
    return steps_of(model).explanation()


def _measured_module(
    model: object, module: torch.nn.Module | None, parts: object
) -> torch.nn.Module:
    """The module whose parts are measured, without the wrapper of ``torch.compile``."""
    if isinstance(model, torch.nn.Module):
        if module is not None:
            raise ValueError(
                "module= goes with a step function; a module is measured itself: write"
                " tmm.instrument(model, spec)"
            )
        if parts is not None:
            raise ValueError("parts= goes with a step function; a module is traced as a whole")
    elif not callable(model):
        if isinstance(model, ModuleType):
            raise TypeError(f"model={model!r} is a module of Python, not a torch.nn.Module")
        raise TypeError(f"model={model!r} is neither a module nor a function")
    elif module is None:
        raise ValueError(f"model={model!r} {_what_instead(model)}")
    elif not isinstance(module, torch.nn.Module):
        raise TypeError(f"module={module!r} is not a torch.nn.Module")
    found = model if module is None else module
    assert isinstance(found, torch.nn.Module)
    inner: torch.nn.Module = found._orig_mod if isinstance(found, OptimizedModule) else found
    return inner


def _what_instead(model: Callable[..., Any]) -> str:
    """What a callable is that comes without ``module=``, and what to give in its place."""
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        return f"is a class; give a module of it: {model.__name__}(...)"
    inner: object = model
    while isinstance(inner, FunctionType):
        inner = vars(inner).get("_torchdynamo_orig_callable") or vars(inner).get("__wrapped__")
    owner = inner.__self__ if isinstance(inner, MethodType) else None
    if not isinstance(owner, torch.nn.Module):
        return (
            "is a function; say whose modules to measure: tmm.instrument(torch.compile(step),"
            " spec, module=model)"
        )
    assert isinstance(inner, MethodType)
    kind, name = type(owner).__name__, inner.__name__
    if name != "forward":
        return f"is a method of a module; say so: tmm.instrument(model.{name}, spec, module=model)"
    if inner is model:
        return f"is the forward of {kind}; give the module itself, or torch.compile of it"
    return (
        f"is the compiled forward of {kind}. torch.compile gives that for a module that is compiled"
        " already: it was applied twice. Give what the first torch.compile(module) gave"
    )


def _folder_of_rank(run: str | os.PathLike[str] | LiveRun | None) -> Path | None:
    """Where this process records by itself."""
    if run is None:
        return None
    if isinstance(run, LiveRun):
        raise ValueError("per_rank=True: give the path of a folder as run=, not a run")
    return Path(run) / f"rank-{dist.get_rank() if is_joined() else 0}"


def _root(
    model: Callable[..., Any], regions: list[Region], backend: str | CompilerFunction | None
) -> Region:
    """The region that a call of ``model`` enters."""
    holder = model if isinstance(model, torch.nn.Module) else None
    settings = region = None
    if holder is None:
        settings = settings_of(model)
    elif (region := region_of(holder)) is not None:
        settings = region.settings
    disabled = isinstance(holder, OptimizedModule) and settings is None
    if settings is None and not regions and not disabled:
        settings = None if backend is None else settings_for(backend)
    elif backend is not None:
        raise ValueError(
            f"backend={backend!r} goes with a model that is not compiled; this one is, or a part"
            " of it, and is measured as it was compiled"
        )
    if region is not None:
        return region
    if isinstance(holder, OptimizedModule):
        return Region(holder._orig_mod, settings, holder, "forward")
    return Region(model if holder is not None else innermost_fn(model), settings, holder)


def _traced_if_need_be(
    root: Region, regions: list[Region], in_parts: bool, spec: Spec, place: Ranks
) -> tuple[Region, list[Region]]:
    """The regions of a model that is not compiled, traced if only a graph tells what is asked."""
    reason = why_traced(spec, place)
    if reason is None or isinstance(root.holder, OptimizedModule):
        return root, regions
    settings = replace(settings_for(eager), traced_for=reason)
    if in_parts:
        return root, [replace(region, settings=settings) for region in regions]
    return replace(root, settings=settings), regions


def _monitored(switch: Switch) -> MonitoredModel:
    assert isinstance(switch.owner, MonitoredModel)
    return switch.owner


def _require(model: Callable[..., Any]) -> Switch:
    switch = root_switch(model)
    if switch is None and bears_mark(model):
        raise ValueError(
            "the model is not instrumented any more: its run has ended. Its folder has explain.txt:"
            " tmm.open_run(run.path).text('explain.txt')"
        )
    if switch is None:
        in_place = isinstance(model, torch.nn.Module) and model.__dict__.get(COMPILED_CALL)
        raise ValueError(
            "the model is not instrumented; call tmm.instrument(model, spec) first"
            + (", and model.compile() before that, not after it" if in_place else "")
        )
    return switch
