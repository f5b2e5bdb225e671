"""Runs and explanations as small tables, for notebooks: HTML without scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from tmm.core.keys import is_family, is_loss, is_total_loss

if TYPE_CHECKING:
    from tmm.runs.recorded_run import Run
    from tmm.steps.explanation import Explanation

_MOST_FOLDED = 200  # lines
_BOX = (
    "display:inline-block;max-width:56rem;padding:.5rem .9rem;border:1px solid #8886;"
    "border-radius:8px;font-size:13px;line-height:1.5"
)
_NAME = "padding:.1rem 1.2rem .1rem 0;color:#888;text-align:left;vertical-align:top;font-weight:400"
_VALUE = "padding:.1rem 0;text-align:left;overflow-wrap:anywhere"


def run_card(run: Run) -> str:
    """What a run is, without reading more of it than one loss."""
    info, state, steps = run.info, run.state, run.steps
    status = "recorded by an instrumented model" if state is None else state.status
    rows: list[tuple[str, str]] = [("status", status)]
    if state is not None and state.reason:
        rows.append(("reason", state.reason))
    recorded = f"{len(steps):,}"
    if len(steps):
        recorded += f", from {steps[0]} to {steps[-1]}"
    rows.append(("steps", recorded))
    keys = [run.key_info(key) for key in run.keys()]  # noqa: SIM118
    families = Counter(key.kind if is_family(key.kind) else "logged" for key in keys)
    rows.append(("keys", ", ".join(f"{count:,} {name}" for name, count in families.items()) or "0"))
    losses = [key for key in keys if is_loss(key) and not run.is_histogram(key.key)]
    for loss in sorted(losses, key=lambda key: not is_total_loss(key))[:1]:
        at, values = run.series(loss.key)
        if len(values):
            rows.append((f"last {loss.key}", f"{values[-1]:.6g} at step {at[-1]}"))
    return card(f"tmm run {info.get('name') or run.path.name}", rows, {})


def explanation_card(explanation: Explanation) -> str:
    """What is measured, in counts, and what is not, with the reasons."""
    measured = sum(bool(module.measured) for module in explanation.modules)
    rows = [
        ("modules with rows", f"{measured:,} of {len(explanation.modules):,}"),
        ("rows in a step", f"{explanation.rows:,}"),
        ("graphs", f"{len(explanation.graphs):,}" if explanation.graphs else "none yet"),
    ]
    rows += [
        (
            rule.rule,
            f"{len(rule.matched):,} of {len(rule.matched) + len(rule.others):,} {rule.subject}",
        )
        for rule in explanation.rules
    ]
    if explanation.recorded:
        rows.append(("recorded by the model", ", ".join(explanation.recorded)))
    folded = {
        f"measured eagerly: {len(explanation.eager):,}": lines_of(explanation.eager),
        f"to be known of rows: {len(explanation.notes):,}": lines_of(explanation.notes),
        f"not measured: {len(explanation.unmeasured):,}": lines_of(explanation.unmeasured),
        f"sites: {len(explanation.sites):,}": lines_of(
            {site: ", ".join(metrics) for site, metrics in explanation.sites.items()}
        ),
    }
    return card("tmm.explain", rows, {title: lines for title, lines in folded.items() if lines})


def lines_of(items: Mapping[str, str]) -> list[str]:
    """A line for each item, of which there are not too many."""
    lines = [f"{name}: {text}" for name, text in items.items()]
    more = len(lines) - _MOST_FOLDED
    return lines if more <= 0 else [*lines[:_MOST_FOLDED], f"and {more:,} more"]


def card(title: str, rows: Iterable[tuple[str, str]], folded: Mapping[str, Sequence[str]]) -> str:
    """A box with a title, a row for each name and value, and lists to open."""
    table = "".join(
        f'<tr style="background:none"><th style="{_NAME}">{escape(name)}</th>'
        f'<td style="{_VALUE}">{escape(value)}</td></tr>'
        for name, value in rows
    )
    details = "".join(
        f"<details><summary>{escape(summary)}</summary>"
        f'<div style="padding-left:1rem;overflow-wrap:anywhere">'
        f"{'<br>'.join(map(escape, lines))}</div></details>"
        for summary, lines in folded.items()
    )
    return (
        f'<div style="{_BOX}"><strong>{escape(title)}</strong>'
        f'<table style="border-collapse:collapse;margin:.2rem 0">{table}</table>{details}</div>'
    )
