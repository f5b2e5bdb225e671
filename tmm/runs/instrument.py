"""Attach monitoring to a model, find it, take it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Timer
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, get_args

import torch

from tmm.core.dynamo_private import OptimizedModule, innermost_fn
from tmm.core.failures import OnError, UserLine, words
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
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.runs.at_path import PathRun
from tmm.runs.instrumented_again import make_room, take_off
from tmm.runs.live import LiveRun
from tmm.runs.rank_run import RankClock, RankRun, run_of_rank
from tmm.runs.scheduled import Scheduled, called_of, plan_of, registry_of
from tmm.runtime.ranks.gloo import ProcessGroup
from tmm.runtime.ranks.protocol import CrossRank
from tmm.runtime.store.null_writer import SilentWriter
from tmm.spec.program_choice import Programs, check_programs, choose_programs
from tmm.spec.ranks import Ranks, check_distributed, check_placements, is_joined
from tmm.spec.reference import load_reference
from tmm.spec.spec import Spec
from tmm.steps.explanation import Explanation
from tmm.steps.model_steps import ModelSteps
from tmm.steps.monitor import Monitor
from tmm.steps.monitored_model import MonitoredModel, Recording
from tmm.steps.timeline import StepTimeline

_SOON = 5.0
"""Seconds that other ranks have to come before it is said what this one has failed of."""

# To type checkers, torch.compile(module) is any callable, and a schedule of a pipeline is none.
Model = TypeVar("Model")


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
    lowering: Lowering = "auto",
) -> Model:
    """Measure what ``spec`` asks for in the monitored steps of a model.

    Args:
        model: a module, compiled in any way (``torch.compile(module)``, ``module.compile()``,
            parts of it one by one) or not at all; or, with ``module``, a step function that calls
            the module, such as what ``torch.compile(step)`` returned; or a schedule of
            ``torch.distributed.pipelining``, whose stages are measured.
        spec: what to measure, where and when.
        run: folder to record into. Where it holds a run already, or one is being recorded there,
            this one is recorded beside it, as ``path-2``, and a warning names that folder;
            ``tmm.monitor(model).path`` is where it is. Or a run of ``tmm.start_run``, which then
            has the steps of this model. In memory only without it.
        resume: go on with the run in the folder ``run``, if there is one. What it had recorded from
            the first step of this training on no longer counts. A spec or model that differs from
            the recorded one is warned of, and an event of the run.
        module: the module whose parts are measured, when ``model`` is a function; of a schedule,
            the whole model whose modules its stages are made of, where these have other names.
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
        per_rank: do not join them, and record those of each rank beside the others' into the
            ``run`` at this path, under keys that name the rank (``tmm.open_run`` tells more).
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
        lowering: what becomes of a reduction in a program that Inductor compiles. ``"operator"``
            reads the tensor once more. ``"fused"`` gives the compiler partial sums, which it fuses
            into the kernels that write or read the tensor; what cannot be fused stays an operator.
            ``"auto"`` fuses all that can be on a GPU, and small tensors on a CPU. ``tmm.explain``
            says of each site which it got, and why.

    Returns:
        The same object, monitored; for a function, a new one to call in its place.
        ``tmm.monitor(model)`` opens its steps.

    Raises:
        TypeError: if ``model`` is no module, function or schedule, ``spec`` not a ``tmm.Spec``, or
            ``run`` neither a path nor a run.
        ValueError: if the model is instrumented already (in a notebook this call replaces the
            earlier one, and a warning says so) or has nothing to measure, a rule matches nothing,
            the reference does not fit, ``module`` or ``backend`` does not go with ``model``,
            ``programs`` or ``lowering`` is none of these, ``placements`` is not as it should be,
            ``run`` holds something that is not a run, the run to resume is running, or the model is
            distributed in a way that is not supported.
        RuntimeError: if not all processes call this, or another one fails in it.
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
    if lowering not in get_args(Lowering):
        raise ValueError(f"lowering={lowering!r} is neither 'auto', 'fused' nor 'operator'")
    live = run if isinstance(run, LiveRun) else None
    joins = distributed and not per_rank and is_joined()
    scheduled = Scheduled.of(model)
    group_of_all = cache(ProcessGroup)
    group: ProcessGroup | None = None
    if scheduled is not None:
        scheduled.check(spec, module, parts)
        for part in scheduled.parts.values():
            make_room(part, part, live)
        group = group_of_all() if joins else None
        with _closing_on_error(group):
            measured: torch.nn.Module = scheduled.assembled(
                module, None if group is None else group.everything
            )
        root, regions, tops = scheduled.regions(lambda part, inside: _root(part, inside, backend))
    else:
        measured = _measured_module(model, module, parts)
        model = make_room(model, measured, live)  # type: ignore[assignment, arg-type]
        root, regions = _regions(model, measured, module, parts, backend)
        tops = [measured]
    is_compiled = backend is None and any(r.settings is not None for r in (root, *regions))
    trace = trace or os.environ.get("TMM_TRACE")
    with _on_all_ranks(group_of_all if joins else None):
        plan = plan_of(measured, spec)
        reference = load_reference(measured, plan, spec.reference, is_joined=joins)
        trace_folder = None if trace is None else TraceFolder(Path(trace).absolute())
        check_placements(placements, plan.modules)
        if joins:
            check_distributed(measured)
    place, ranks = Ranks(), None
    if joins:
        group = group_of_all()
        with _closing_on_error(group):
            place = Ranks.of(measured, group.everything, placements)
        ranks = CrossRank(group, end_seconds=min(600.0, group.patience))
    shares_tensors = place.tensor_parallel is not None
    choice = choose_programs(
        programs, spec, own_is_compiled=is_compiled, shares_tensors=shares_tensors
    )
    if backend is None and all(region.settings is None for region in (root, *regions)):
        in_parts = parts is not None or scheduled is not None
        root, regions = _traced_if_need_be(root, regions, in_parts, spec, place)
    if per_rank and isinstance(run, LiveRun):
        raise ValueError("per_rank=True: give the path of a folder as run=, not a run")
    own: PathRun | RankRun | None = None
    registry = registry_of(measured, plan, lambda family: spec.notes(family) or place.notes(family))
    siblings: list[Switch] = []
    try:
        with _on_all_ranks(group_of_all if joins else None):
            if live is not None:
                recording = live.recording_of(registry)
            elif per_rank and run is not None:
                own = run_of_rank(Path(run), resume=resume)  # type: ignore[arg-type]
                timeline = StepTimeline(registry, listener=RankClock())
                recording = Recording(timeline, own.writer, own.earlier)
            elif run is not None and place.rank > 0:
                writer = SilentWriter(Path(run).absolute())  # type: ignore[arg-type]
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
                lowering=lowering,
                ranks=ranks,
                take_off=partial(_take_off, siblings, scheduled, is_mark_left=live is not None),
                is_bypassed=lambda: any(map(is_bypassed, siblings)),
                micro_batches=None if scheduled is None else scheduled.micro_batches,
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
            is_top = any(region.callee is top for top in tops)
            attach(switch(region, monitored.steps.recorder, is_root=is_top))
    function = attach(switch(root, monitored.steps.recorder, is_root=True, plain=model))  # type: ignore[arg-type]
    if scheduled is not None:
        scheduled.micro_batches.follow()
        return model
    return model if isinstance(model, torch.nn.Module) else function  # type: ignore[return-value]


def monitor(model: object) -> Monitor:
    """The monitor of an instrumented model, of the module of a function, or of a schedule.

    Raises:
        ValueError: if the model is not instrumented.
    """
    return _monitored(_require(model)).monitor


def steps_of(model: object) -> ModelSteps:
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
    called = called_of(model)
    if root_switch(called) is None and bears_mark(called):
        return model  # its run has ended, and taken the monitoring off
    switch = _require(model)
    take_off(switch.siblings, is_mark_left=False)
    _monitored(switch).steps.close()
    if isinstance(called, torch.nn.Module):
        return model
    return switch.original  # type: ignore[return-value]


def explain(model: object) -> Explanation:
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


def _regions(
    model: object,
    measured: torch.nn.Module,
    module: torch.nn.Module | None,
    parts: Iterable[torch.nn.Module] | None,
    backend: str | CompilerFunction | None,
) -> tuple[Region, list[Region]]:
    """The region that a call of a module or function enters, and those inside."""
    assert callable(model)
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
    return root, regions


@contextmanager
def _closing_on_error(group: ProcessGroup | None) -> Iterator[None]:
    """Close ``group`` if the block is left by an exception."""
    try:
        yield
    except BaseException:
        if group is not None:
            group.close()
        raise


@contextmanager
def _on_all_ranks(group_of_all: Callable[[], ProcessGroup] | None) -> Iterator[None]:
    """Let a fault of one rank in the block, where none waits for another, end it on all of them."""
    if group_of_all is None:
        yield
        return
    try:
        yield
    except Exception as error:
        # Ranks may not come, or have died.
        with suppress(Exception), _told_while_waiting(error), closing(group_of_all()) as group:
            group.everything(words(error))
        raise
    group = group_of_all()
    for rank, fault in enumerate(group.everything("")):
        if fault:
            group.close()
            raise RuntimeError(f"tmm.instrument failed on rank {rank}: {fault}")


@contextmanager
def _told_while_waiting(error: Exception) -> Iterator[None]:
    """Warn of ``error``, which is raised after the block, if that takes long."""
    text = f"tmm.instrument failed, and waits for the other ranks to tell them: {words(error)}"
    timer = Timer(_SOON, UserLine.here().warn, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _take_off(siblings: list[Switch], scheduled: Scheduled | None, *, is_mark_left: bool) -> None:
    """Let a model run its own program again, and its schedule."""
    take_off(siblings, is_mark_left=is_mark_left)
    if scheduled is not None:
        scheduled.micro_batches.leave()


def _traced_if_need_be(
    root: Region, regions: list[Region], in_parts: bool, spec: Spec, place: Ranks
) -> tuple[Region, list[Region]]:
    """The regions of a model that is not compiled, traced if only a graph tells what is asked."""
    reason = why_traced(spec, place)
    if reason is None or isinstance(root.holder, OptimizedModule):
        return root, regions
    settings = replace(settings_for(eager), traced_for=reason)
    if in_parts:
        traced = [replace(region, settings=settings) for region in regions]
        return (traced[0] if root in regions else root), traced
    return replace(root, settings=settings), regions


def _monitored(switch: Switch) -> MonitoredModel:
    assert isinstance(switch.owner, MonitoredModel)
    return switch.owner


def _require(model: object) -> Switch:
    model = called_of(model)
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
