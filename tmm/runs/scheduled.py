"""A schedule of ``torch.distributed.pipelining``, whose stages are instrumented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tmm.core.families import BRANCH_FAMILIES
from tmm.core.module_names import display_name, parameter_names, relative_names
from tmm.core.torch_private import (
    is_pipeline_schedule,
    losses_of_schedule,
    stages_of_schedule,
)
from tmm.instrumentation.micro_batches import MicroBatches
from tmm.instrumentation.regions import Region, regions_in
from tmm.runtime.key_binding import KeyRegistry
from tmm.spec.ranks import Exchange
from tmm.spec.spec import Plan, Spec
from tmm.spec.stages import Stages


@dataclass(frozen=True, eq=False)
class Scheduled:
    """The stages of a schedule that this process has, by their index, of ``count``."""

    parts: Mapping[int, torch.nn.Module]
    count: int
    micro_batches: MicroBatches

    @classmethod
    def of(cls, model: object) -> Scheduled | None:
        """What ``model`` runs, if it is a schedule."""
        if not is_pipeline_schedule(model):
            return None
        stages: list[Any] = stages_of_schedule(model)
        parts = {stage.stage_index: stage.submod for stage in stages}
        followed = MicroBatches(stages, losses_of_schedule(model))
        return cls(parts, stages[0].num_stages, followed)

    def check(self, spec: Spec, module: object, parts: object) -> None:
        """Raise for what does not go with a schedule.

        Raises:
            ValueError: for parts, and for comparisons of outputs with a reference.
            TypeError: if ``module`` is no module.
        """
        if parts is not None:
            raise ValueError("parts= goes with a step function; the parts of a schedule are known")
        if module is not None and not isinstance(module, torch.nn.Module):
            raise TypeError(f"module={module!r} is not a torch.nn.Module")
        for rule in spec.rules:
            if rule.family in BRANCH_FAMILIES:
                raise ValueError(
                    f"{rule}: a stage of a pipeline has no inputs of the reference, which the"
                    " stages before it would have to compute; tmm.parameter_difference needs none"
                )

    def assembled(self, whole: torch.nn.Module | None, exchange: Exchange | None) -> Stages:
        """The stages under the names of the model; without an ``exchange`` of this process alone.

        All ranks call this together.

        Raises:
            ValueError: if ``whole`` does not hold what a stage does.
        """
        return Stages(self.parts, self.count, whole, exchange or _alone)

    def regions(
        self, head: Callable[[torch.nn.Module, list[Region]], Region]
    ) -> tuple[Region, list[Region], list[Callable[..., Any]]]:
        """The region of the first stage here, those of all and inside, and what each stage calls.

        ``head`` gives that of a module, which the regions in it are told of.
        """
        heads: list[Region] = []
        inside: list[Region] = []
        for part in self.parts.values():
            found = regions_in(part)
            heads.append(head(part, found))
            inside += [region for region in found if region.holder is not heads[-1].holder]
        return heads[0], [*heads, *inside], [region.callee for region in heads]


def plan_of(measured: torch.nn.Module, spec: Spec) -> Plan:
    """The spec for a model; of a pipeline for all of it, of which this process has stages.

    Raises:
        ValueError: as ``Plan``.
    """
    if isinstance(measured, Stages):
        return Plan(
            *(spec, measured.modules_of_all(), measured.parameters_of_all()),
            unnamed=measured.unnamed(),
            is_whole=measured.is_known,
        )
    names = [display_name(name) for name in relative_names(measured).values()]
    return Plan(spec, names, dict(parameter_names(measured).values()))


def registry_of(measured: torch.nn.Module, plan: Plan, notes: Callable[[str], str]) -> KeyRegistry:
    """What names the keys of a model; ``notes`` are those of families."""
    if not isinstance(measured, Stages):
        return KeyRegistry(notes, plan.spec.site_name)
    registry = KeyRegistry(notes, plan.spec.site_name, measured.stage_of)
    registry.collected = plan.collected
    return registry


def called_of(model: object) -> object:
    """What is called of a model: of a schedule its first stage here."""
    scheduled = Scheduled.of(model)
    return model if scheduled is None else next(iter(scheduled.parts.values()))


def _alone(value: object) -> list[Any]:
    return [value]
