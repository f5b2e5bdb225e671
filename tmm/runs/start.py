"""Start a run, or go on with one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmm.runs.catalog import find_run
from tmm.runs.claim import check_is_here, lock_to_resume, make_folder
from tmm.runs.delivery import NamedSink, RunInfo, RunSink, Sink, find_sinks
from tmm.runs.live import LiveRun
from tmm.runs.state import Lock
from tmm.spec.ranks import other_rank
from tmm.steps.earlier import Earlier
from tmm.steps.timeline import checked_step

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def start_run(
    project: str = "default",
    name: str | None = None,
    config: Mapping[str, object] | None = None,
    tags: Iterable[str] = (),
    notes: str = "",
    root: str | os.PathLike[str] = "runs",
    *,
    resume: str | os.PathLike[str] | None = None,
    step: int | None = None,
    system_seconds: float | None = 1.0,
    sinks: Iterable[Sink | RunSink | str] = (),
) -> LiveRun:
    """Start a run: a folder ``root/project/id`` that this process records into.

    Many processes may start runs under one root at once. Of those that train one model together
    (torch.distributed) each is to call this, and that of rank 0 records.

    Args:
        project: what the run belongs to; a folder below ``root``.
        name: what people call it; its id without one.
        config: the hyperparameters, to be compared with those of other runs.
        tags: labels; runs that have some can be kept from ``tmm runs prune``.
        notes: anything to remember.
        root: folder of all runs.
        resume: id, name or path of a run to go on with after its last step; it keeps its project,
            name, configuration, tags and notes.
        step: the first step, as of the checkpoint that the training goes on from: 0 without it, or
            the one after the last of the run to resume. What that run had recorded from there on
            no longer counts, once something is recorded.
        system_seconds: how often processor, memory and GPUs are looked at; None for never.
        sinks: what gets the values of each step as well: those of ``tmm.sinks``, functions
            ``(step, values) -> None``, or names under which packages offer one (entry points of
            the group ``tmm.sinks``; tmm itself offers wandb, tensorboard, mlflow, csv and jsonl).
            One that fails or is slow is warned of, and the training goes on.

    Raises:
        ValueError: for a project that cannot name a folder, a run to resume that is running, a
            negative step, or a sink that nobody offers.
        TypeError: for a configuration, name, notes, tags, step or sinks of another kind.
        LookupError: if there is no run to resume.
        OSError: if the folder cannot be written.
    """
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"config={config!r} is not a dictionary; vars(...) makes one of a namespace"
        )
    for argument, text in (("name", name), ("notes", notes)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{argument}={text!r} is not text")
    if resume is not None and not isinstance(resume, (str, os.PathLike)):
        raise TypeError(f"resume={resume!r} is not the id, name or path of a run")
    step = None if step is None else checked_step(step)
    if step is not None and step < 0:
        raise ValueError(f"step={step} is negative")
    check_is_here(root, "root")
    root = Path(root).absolute()  # the program may go to another folder while it trains
    if (rank := other_rank()) is not None:
        return _silent(root / project / f"rank-{rank}", project, step or 0)
    found = find_sinks(sinks)
    if resume is not None:
        return _resumed(root, resume, step, system_seconds, found)
    folder = root / _checked_project(project) / _new_id()
    tags = _checked_tags(tags)
    if system_seconds is not None and not isinstance(system_seconds, (int, float)):
        raise TypeError(f"system_seconds={system_seconds!r} is not a number of seconds")
    if system_seconds is not None and not system_seconds > 0:
        raise ValueError(f"system_seconds={system_seconds} must be positive, or None for never")
    settings = _plain(config)
    make_folder(folder, "root")
    run = RunInfo(
        path=folder,
        id=folder.name,
        project=project,
        name=name or folder.name,
        config=settings,
        tags=tags,
        notes=notes,
        first_step=step or 0,
    )
    return LiveRun(run, system_seconds=system_seconds, sinks=found, lock=Lock(folder))


def _silent(path: Path, project: str, step: int) -> LiveRun:
    """A run that keeps nothing."""
    run = RunInfo(path, path.name, project, path.name, config={}, first_step=step)
    return LiveRun(run, system_seconds=None, sinks=(), lock=None)


def _plain(config: Mapping[str, object] | None) -> dict[str, Any]:
    """The configuration as JSON keeps it; raises ``ValueError`` where it cannot."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config or {}), default=str))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config= cannot be kept as JSON: {error}") from error
    return plain


def _resumed(
    root: Path,
    query: str | os.PathLike[str],
    step: int | None,
    system_seconds: float | None,
    sinks: tuple[NamedSink, ...],
) -> LiveRun:
    found = find_run(query, root)
    lock = lock_to_resume(found.path, f"resume={str(query)!r}")
    try:
        earlier = Earlier.of(found.path, step)
    except BaseException:
        lock.release()
        raise
    last = earlier.last
    info = RunInfo(
        path=found.path,
        id=found.path.name,
        project=found.project,
        name=found.name,
        config=found.config or {},
        tags=found.tags,
        notes=found.notes,
        first_step=step if step is not None else 0 if last is None else last + 1,
        resumed=True,
        last_step=last,
    )
    return LiveRun(info, system_seconds=system_seconds, sinks=sinks, lock=lock, earlier=earlier)


def _new_id() -> str:
    """A name that no other run has, and that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _checked_project(project: str) -> str:
    """``project``, if it can be the name of a folder; raises ``ValueError``."""
    if not isinstance(project, str) or not project or set(project) - _NAME or project[0] == ".":
        raise ValueError(
            f"project={project!r} cannot name a folder; use letters, digits, '-', '_' and '.'"
        )
    return project


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags, each once; raises ``TypeError`` for what is no text."""
    if isinstance(tags, str):
        raise TypeError(f"tags={tags!r} is one text; give a list of tags: [{tags!r}]")
    found = tuple(dict.fromkeys(tags))
    for tag in found:
        if not isinstance(tag, str):
            raise TypeError(f"tags: {tag!r} is not text")
    return found
