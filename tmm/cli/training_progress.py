"""Shows a training while it runs, by a bar or a few lines, and what a step of it measured."""

from __future__ import annotations

import statistics
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tmm.cli.demo_training import StepReport, TrainingSettings
from tmm.cli.terminal import clean
from tmm.core.families import ACTIVATION
from tmm.core.keys import metric_of
from tmm.runs.recorded_run import Run

_LINES_WITHOUT_TERMINAL = 10


class TrainingProgress:
    """Give ``report`` to ``tmm.cli.demo_training.train``, inside of a ``with`` block."""

    def __init__(self, console: Console, settings: TrainingSettings) -> None:
        self.first_loss = float("nan")
        self.last_loss = float("nan")
        self._settings = settings
        self._console = console
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "compiling, monitored program", total=settings.steps, numbers=""
        )

    def report(self, report: StepReport) -> None:
        """Take in one finished step."""
        if report.step == 0:
            self.first_loss = report.loss
        self.last_loss = report.loss
        self._seconds[report.monitored].append(report.seconds)
        compiled = all(self._seconds.values()) or self._settings.every == 1
        numbers = f"loss {report.loss:.3f}, {report.seconds * 1000:.0f} ms"
        self._bar.update(
            self._task,
            advance=1,
            description="training" if compiled else "compiling, plain program",
            numbers=numbers,
        )
        interval = max(1, self._settings.steps // _LINES_WITHOUT_TERMINAL)
        if not self._console.is_terminal and (report.step + 1) % interval == 0:
            self._console.print(f"step {report.step + 1}/{self._settings.steps}: {numbers}")

    def cost(self, numbers: int) -> str:
        """What a monitored step, which measured so many ``numbers``, took beside another."""
        # The first step of each kind compiles.
        monitored, plain = (self._seconds[kind][1:] for kind in (True, False))
        if not monitored or not plain:
            return ""
        took, other = statistics.median(monitored), statistics.median(plain)
        return (
            f"A monitored step measures {numbers} numbers and takes {took * 1000:.0f} ms, another"
            f" {other * 1000:.0f} ms: {took / other:.2f} times as long (medians of"
            f" {len(monitored)} and {len(plain)} steps). `tmm demo --every 1` monitors each step,"
            f" `tmm demo --every {self._settings.steps}` the first alone."
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def layer_table(run: Run, step: int) -> Table:
    """What was measured of the outputs of the modules at ``step``, in order of execution.

    Raises:
        KeyError: if ``step`` was not recorded.
    """
    rows: dict[str, dict[str, float]] = {}
    metrics: dict[str, None] = {}  # an ordered set
    for key, value in run.at(step).items():
        info = run.key_info(key)
        if info.kind == ACTIVATION.name and isinstance(value, float):  # a histogram is no cell
            metric = metric_of(info)
            rows.setdefault(info.site, {})[metric] = value
            metrics[metric] = None
    table = Table(title=f"Outputs of the layers at step {step}", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for site, values in rows.items():
        cells = (f"{values[metric]:.4g}" if metric in values else "" for metric in metrics)
        table.add_row(Text(clean(site)), *cells)
    return table
