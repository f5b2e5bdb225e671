"""The measured program of a model, where it is the only one that the training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tmm.core.failures import Gaps, words
from tmm.core.rng import PassStates
from tmm.instrumentation.apart import apart_from_the_program
from tmm.instrumentation.foreign import foreign_inputs
from tmm.instrumentation.regions import Region
from tmm.instrumentation.twin import Twin
from tmm.spec.program_choice import ProgramChoice
from tmm.steps.timeline import StepTimeline

NOT_SHARED = (
    "the measured program failed in a step that is not monitored; such steps run the model's own"
    " program from now on, as with tmm.instrument(..., programs=2). {fault}"
)


class SharedProgram:
    """Runs passes of the training that are not monitored in the measured program, if it is to.

    Attributes:
        choice: whether it is to, and why.
        states: what lets a pass that has failed be run once more.
    """

    def __init__(
        self, module: torch.nn.Module, timeline: StepTimeline, gaps: Gaps, choice: ProgramChoice
    ) -> None:
        self.choice = choice
        self.states = PassStates(module)
        self._timeline = timeline
        self._gaps = gaps

    @property
    def is_used(self) -> bool:
        """Whether passes of the training that are not monitored may run the measured program.

        None does before a first step has begun.
        """
        return self.choice.count == 1 and self._timeline.begun is not None

    def is_that_of(self, twin: Twin) -> bool:
        """Whether they do, now that the graphs of ``twin`` tell what it costs."""
        if self.choice.is_open and twin.graphs:
            readings = [size for graph in twin.graphs for size in graph.report.readings]
            self.choice = self.choice.settled(readings)
        return self.is_used and twin.untraced is None

    def run(
        self, twin: Twin, region: Region, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run such a pass, and drop its rows.

        Where that fails and the user's own program does not, all of them run that from now on.
        """
        with apart_from_the_program():
            is_foreign = foreign_inputs(args, kwargs) is not None
        if is_foreign or self._gaps.are_certain:
            return plain(*args, **kwargs)
        is_function = region.module is None
        before = self.states.capture(trains=is_function, of_torch_only=twin.is_whole, looks=False)
        try:
            return twin.run_unrecorded(region, *args, **kwargs)
        except Exception as error:
            if before.is_written_to():
                raise
            before.random.restore()
            output = plain(*args, **kwargs)  # an error of the model itself is raised here
            self.choice = ProgramChoice(2, "as the measured one failed")
            fault = NOT_SHARED.format(fault=words(error))
            self._gaps.warn_once("one program", self._timeline.current, fault)
            return output
