"""The activations of one step as a table: layers down, metrics across."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from tmm.cli.terminal import clean
from tmm.core.families import ACTIVATION
from tmm.core.keys import metric_of
from tmm.runs.recorded_run import Run


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
