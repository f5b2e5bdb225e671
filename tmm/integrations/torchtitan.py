"""torchtitan: a metrics processor that records the training, and its section of a job config."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor
except ImportError as error:
    raise ImportError(
        "tmm.integrations.torchtitan needs torchtitan, whose components have a Config each, as in"
        " its main branch of August 2026: pip install git+https://github.com/pytorch/torchtitan"
    ) from error

from tmm.core.keys import reserved_start
from tmm.integrations.session import Session
from tmm.runs.live import LiveRun
from tmm.spec.default import default_spec
from tmm.spec.spec import Spec
from tmm.steps.monitor import Monitor

LAST_RUN = "last_run.txt"
"""The file beside the runs that names the one to go on with after a checkpoint was loaded."""


@dataclass(kw_only=True, slots=True)
class TMMConfig:
    """The section of a job config that says what tmm does: ``--metrics.tmm.every 50``, say."""

    enable: bool = True
    """Whether to record the training at all"""

    every: int = 10
    """Steps between two that are measured, where ``spec`` says nothing else"""

    spec: str = ""
    """What to measure: "package.module:name" of a tmm.Spec, or of a function that gives one"""

    project: str = "torchtitan"
    """The project that the run belongs to"""

    name: str = ""
    """What the run is called; its id if empty"""

    folder: str = "tmm"
    """The folder of all runs, in the job's dump folder"""

    to_loggers: bool = False
    """Whether TensorBoard and W&B of torchtitan get what was measured in steps that they log"""

    def __post_init__(self) -> None:
        if self.every <= 0:
            raise ValueError(f"metrics.tmm.every={self.every} must be greater than 0")
        if self.spec and not all(self.spec.partition(":")):
            raise ValueError(
                f"metrics.tmm.spec={self.spec!r} is not 'package.module:name' of a tmm.Spec"
            )


def spec_of(section: TMMConfig) -> Spec:
    """The spec that a section names.

    Raises ``ValueError`` where it names none, and whatever the import of its module raises.
    """
    if not section.spec:
        return default_spec(section.every)
    module, _, name = section.spec.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if callable(found):
        found = found()
    if not isinstance(found, Spec):
        raise ValueError(
            f"metrics.tmm.spec={section.spec!r} names {found!r}, and no tmm.Spec, nor a function"
            " that gives one"
        )
    return found


class TMMMetricsProcessor(MetricsProcessor):  # type: ignore[misc]
    """torchtitan's metrics processor, which also records the training into a run of tmm.

    Use its ``Config`` in the place of ``MetricsProcessor.Config``; nothing else changes. A step is
    torchtitan's, counted from 1. What torchtitan logs is recorded in it, its average loss also as
    ``loss``. After a checkpoint was loaded, the training goes on with the last run of the dump
    folder. The run ends with the trainer's ``close``, as failed if that is after an exception.

    Attributes:
        config: with the section ``tmm``.

    Raises:
        ValueError: when the first step begins, if the job has pipeline parallelism, or captures
            forward and backward in a CUDA graph, or ``spec`` names no ``tmm.Spec``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        """That of torchtitan, with a section for tmm."""

        tmm: TMMConfig = field(default_factory=TMMConfig)

    def __init__(self, config: Any, **options: Any) -> None:
        """``options`` are what torchtitan's trainer gives any metrics processor."""
        self._section: TMMConfig = config.tmm
        self._root = Path(options.get("dump_folder", "./outputs")) / config.tmm.folder
        self._job: Mapping[str, Any] = options.get("config_dict") or {}
        self._session: Session | None = None
        self._step: int | None = None
        self._loggers: Any = None
        super().__init__(config, **options)

    # What torchtitan's trainer calls

    def should_log(self, step: int) -> bool:
        """As torchtitan's; the trainer asks it at the beginning of each step."""
        if self._section.enable and step != self._step:
            self._begin(step)
        should_log: bool = super().should_log(step)
        return should_log

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As torchtitan's; what it writes is recorded, too, and the step has ended."""
        if self._session is not None:
            self._session.end_step()
        if self._section.to_loggers and self.monitor is not None:
            extra_metrics = {**(extra_metrics or {}), **self._measured()}
        self._record({"loss": global_avg_loss})
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)

    def close(self) -> None:
        """As torchtitan's; the run ends."""
        if self._session is not None:
            error = sys.exc_info()[1]  # the trainer closes its parts while it handles one
            end = LiveRun.finish if error is None else lambda run: run.fail(error)
            self._session.end_step()
            self._session.close(end)
        super().close()

    # What users ask

    @property
    def run(self) -> LiveRun | None:
        """The run of the training; None before its first step."""
        return None if self._session is None else self._session.run

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the model; None before its first step."""
        return None if self._session is None else self._session.monitor

    # Steps

    def _begin(self, step: int) -> None:
        if self._session is None:
            self._session = self._start(step)
        self._session.end_step()
        self._step = step
        self._session.begin_step(step)

    def _start(self, step: int) -> Session:
        self._check()
        options = {"project": self._section.project, "root": self._root}
        if self._section.name:
            options["name"] = self._section.name
        session = Session(spec_of(self._section), None, options)
        note = self._root / LAST_RUN
        is_later = step > 1 and note.is_file()
        session.open(
            step=step, resume=note.read_text().strip() if is_later else None, config=self._job
        )
        if session.run is not None and session.run.is_recorded:
            note.write_text(f"{session.run.path.absolute()}\n")
        (model,) = self.model_parts
        session.instrument(model)
        for optimizer in self.optimizers:
            session.watch(optimizer)
        return session

    def _check(self) -> None:
        if self.parallel_dims.pp_enabled or len(self.model_parts or ()) != 1:
            raise ValueError(
                "metrics.tmm: pipeline parallelism is not supported, since a process has stages of"
                " the model; set --parallelism.pipeline_parallel_degree 1, or"
                " --metrics.tmm.enable False"
            )
        training = self._job.get("training") or {}
        device = getattr(getattr(self, "device_memory_monitor", None), "device", None)
        is_captured = training.get("disable_cuda_graphs") is False
        if is_captured and getattr(device, "type", "") == "cuda":
            raise ValueError(
                "metrics.tmm: a CUDA graph of forward and backward runs without the model's Python,"
                " so that nothing is measured; set --training.disable_cuda_graphs"
            )

    # Values

    def _measured(self) -> dict[str, float]:
        """The numbers of the step, which ranks join; empty for one that is not measured."""
        assert self.monitor is not None
        values = self.monitor.get_step_metrics()
        return {key: value for key, value in values.items() if isinstance(value, float)}

    def _record(self, values: Mapping[str, object]) -> None:
        if self._session is not None:
            self._session.log(values)

    def _build_metric_logger(self, **options: Any) -> Any:
        """The loggers of torchtitan, and one that records in the run."""
        loggers = super()._build_metric_logger(**options)
        if not self._section.enable:
            return loggers
        if not isinstance(loggers, LoggerContainer):
            loggers = LoggerContainer()
        loggers.add_logger(_RunLogger(self))
        return loggers


class _RunLogger(BaseLogger):  # type: ignore[misc]
    """Records in the run of a processor what torchtitan logs."""

    def __init__(self, processor: TMMMetricsProcessor) -> None:
        self._processor = processor

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the numbers that are torchtitan's own."""
        own = {key: value for key, value in metrics.items() if reserved_start(key) is None}
        self._processor._record(own)

    def close(self) -> None:
        """The processor ends the run."""
