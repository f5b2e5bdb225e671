"""Builds the page of a report: template, style, scripts and data in one text."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from tmm.analysis import compare, find_stories, first_divergence
from tmm.analysis.story import anomalies_of
from tmm.core.keys import is_of_system
from tmm.runs.run_record import RunRecord
from tmm.runs.text_values import plain
from tmm.views.plots.groups import group_keys
from tmm.views.plots.style import (
    INFINITY_COLOUR,
    NAN_COLOUR,
    RUN_COLOURS,
    SIGNED,
    depth_colours,
    magnitude_colours,
    require_package,
)
from tmm.views.report.beside import shown_runs
from tmm.views.report.blocks import packed, packed_json, reduced_blocks, scales
from tmm.views.report.facts import anomaly_rows, curves, story_facts
from tmm.views.report.snapshot import Snapshot

SCRIPTS = tuple(
    f"{name}.js"
    for name in (
        *("base", "charts", "heat", "depth", "panels", "layer", "parts", "head", "findings"),
        "stories",
        *("curves", "settings", "search", "sections"),
    )
)
"""The scripts of the page, in the order in which they run."""

_DEPTH_COLOURS = 32
_MOST_COMPARED = 500  # keys in the table of final values


def write_report(records: Sequence[RunRecord], path: str | os.PathLike[str]) -> Path:
    """Write the page of `report_page` to ``path``; OSError where that cannot be done."""
    path = Path(path)
    path.write_text(report_page(records), encoding="utf-8", errors="replace")
    return path


def report_page(records: Sequence[RunRecord]) -> str:
    """The report of one run, or of several beside each other, as HTML that loads nothing.

    Raises:
        ValueError: without runs, for the same run twice, and for one whose files are damaged.
        ImportError: without plotly.
    """
    require_package("plotly", "a report")
    from plotly.offline import get_plotlyjs

    if not records:
        raise ValueError("a report needs a run")
    for record in records:
        if not isinstance(record, RunRecord):
            raise TypeError(
                f"records: {record!r} is not a record of tmm.list_runs(root); give some of these"
            )
    if len({record.path.resolve() for record in records}) < len(records):
        raise ValueError("a report cannot show the same run twice")
    data, values = _data(records)
    title = " and ".join(run["name"] for run in data["runs"])
    parts = {
        "<!-- title -->": html.escape(f"tmm report: {title}"),
        "/* style */": _resource("page.css"),
        # Inside of a script element only "<" can end the element or open a comment.
        "/* data */": json.dumps(data, separators=(",", ":"), allow_nan=False).replace(
            "<", "\\u003c"
        ),
        "<!-- values -->": "\n".join(
            f'<script type="text/plain" id="{name}">{text}</script>'
            for name, text in values.items()
        ),
        "/* plotly */": get_plotlyjs(),
        "/* script */": "".join(map(_resource, SCRIPTS)),
    }
    text = _resource("page.html")
    pieces = []
    for mark, part in parts.items():  # in the order of the template; marks inside of parts stay
        before, _, text = text.partition(mark)
        pieces += [before, part]
    return "".join([*pieces, text])


def _data(records: Sequence[RunRecord]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page knows at once, and the packed values that it unpacks when needed."""
    values: dict[str, str] = {}
    names, shown, snapshots, facts, groups = [], [], [], [], []
    for number, column in enumerate(shown_runs(records)):
        snapshot, fact = column.snapshot, column.facts
        names.append(column.name)
        shown.append(column.record)
        of_layers, others = group_keys(snapshot, snapshot.keys())
        described, arrays = curves(snapshot, others)
        stories = find_stories(snapshot)
        anomalies = anomaly_rows(anomalies_of(stories, snapshot.keys()), snapshot)
        counts: dict[str, int] = {}
        for severity, *_ in anomalies:
            counts[severity] = counts.get(severity, 0) + 1
        first = next((row for row in anomalies if row[:2] == ["critical", "nonfinite"]), None)
        values[f"curves-{number}"] = packed(*arrays)
        values[f"anomalies-{number}"] = packed_json(anomalies)
        fact |= {"stories": story_facts(stories, snapshot), "allStories": len(stories)}
        fact |= {"curves": described, "anomalies": counts, "firstNonfinite": first}
        snapshots.append(snapshot)
        facts.append(fact)
        groups.append(of_layers)
    blocks = reduced_blocks(snapshots, groups)
    described_blocks = []
    for number, block in enumerate(blocks):
        values[f"block-{number}"] = block.data
        described_blocks.append(block.description(f"block-{number}"))
    data = {
        "runs": facts,
        "groups": scales(blocks),
        "blocks": described_blocks,
        "comparison": _comparison(dict(zip(names, snapshots, strict=True)), shown),
        "exact": all(block.is_exact for block in blocks),
        "style": _style(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return data, values


def _comparison(
    snapshots: dict[str, Snapshot], records: Sequence[RunRecord]
) -> dict[str, Any] | None:
    """Differences of settings, final values, and where runs part from the first; None for one."""
    if len(snapshots) < 2:
        return None
    names = list(snapshots)
    configs = {name: record.config or {} for name, record in zip(names, records, strict=True)}
    curves_of = [
        {key for key in group_keys(snapshot, snapshot.keys())[1] if not is_of_system(key)}
        for snapshot in snapshots.values()
    ]
    common = set.intersection(*curves_of)
    keys = [key for key in snapshots[names[0]].keys() if key in common]  # noqa: SIM118
    result = compare(snapshots, keys=keys[:_MOST_COMPARED], configs=configs)
    first = snapshots[names[0]]
    partings = []
    for name in names[1:]:
        found = first_divergence(first, snapshots[name])
        parting = None
        if found is not None:
            parting = {
                "step": found.step,
                "key": found.key,
                "a": found.a,
                "b": found.b,
                "others": len(found.others),
            }
        partings.append({"run": name, "parting": parting})
    comparison: dict[str, Any] = plain(
        {
            "configuration": result.configuration,
            "final": [
                {"key": metric.key, "final": metric.final, "best": metric.best}
                for metric in result.metrics
            ],
            "partings": partings,
        }
    )
    return comparison


def _style() -> dict[str, Any]:
    return {
        "runs": RUN_COLOURS,
        "nan": NAN_COLOUR,
        "infinity": INFINITY_COLOUR,
        "magnitudes": [[place, colour] for place, colour in magnitude_colours()],
        "signed": SIGNED,
        "depth": depth_colours(_DEPTH_COLOURS),
    }


def _resource(name: str) -> str:
    return resources.files("tmm.views.report").joinpath(name).read_text(encoding="utf-8")
