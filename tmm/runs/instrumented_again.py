"""What happens to a model that is instrumented once more, as when a cell runs again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tmm.core.failures import warn
from tmm.core.interactive import is_interactive
from tmm.instrumentation.switch import Switch, detach, root_switch
from tmm.runs.live import LiveRun
from tmm.steps.monitored_model import MonitoredModel


def make_room(
    model: Callable[..., Any], measured: torch.nn.Module, run: LiveRun | None
) -> Callable[..., Any]:
    """Take the monitoring off a model that is to be instrumented, where the user sees it happen.

    In a notebook or at a prompt the earlier monitoring ends, with its run unless that is ``run``,
    and a warning says so. Gives ``model``, or of an instrumented function what it was made of.

    Raises:
        ValueError: if the model is instrumented already, and the program is none that is typed.
        OSError: if what was measured could not be written.
    """
    switch = root_switch(model) or root_switch(measured)
    if switch is None:
        return model
    is_module = isinstance(model, torch.nn.Module)
    wrapped = None if is_module else vars(model).get("_torchdynamo_orig_callable")
    if not is_interactive() or root_switch(wrapped) is not None:  # torch.compile of what is one
        raise ValueError(
            "the model is instrumented already; tmm.remove(model) first, or put all rules into"
            " one tmm.Spec"
        )
    while switch is not None:
        _end(switch, run)
        if not is_module and root_switch(model) is switch:
            assert callable(switch.original)
            model = switch.original
        switch = root_switch(model) or root_switch(measured)
    return model


def take_off(siblings: list[Switch], *, is_mark_left: bool) -> None:
    """Let a model run its own program again."""
    for attached in siblings:
        detach(attached, is_mark_left=is_mark_left)


def _end(switch: Switch, run: LiveRun | None) -> None:
    owner = switch.owner
    assert isinstance(owner, MonitoredModel)
    path = owner.monitor.path
    if owner.finish_run is not None and (run is None or owner.finish_run != run.finish):
        owner.finish_run()
    take_off(switch.siblings, is_mark_left=False)
    owner.steps.close()
    kept = "" if path is None else f" What it recorded is in {path}."
    warn(
        "the model was instrumented already, and is now instrumented anew: the earlier monitor"
        f" has ended.{kept} Outside of a notebook this is an error"
    )
