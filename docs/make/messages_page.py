"""The page of errors and warnings: what to do, and then each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from docs.make.messages import Message, collect

SECTIONS = (
    ("Specs and models", ("tmm/spec/", "tmm/runs/instrument.py", "tmm/core/")),
    ("Graphs", ("passes/", "tmm/instrumentation/", "tmm/kernels/", "runtime/eager")),
    ("Steps, optimizers, logged values", ("tmm/steps/", "runtime/aggregate.py")),
    ("Runs and their files", ("tmm/runs/", "runtime/store/")),
    ("Several processes", ("runtime/ranks/",)),
    ("Analysis, pictures, reports", ("tmm/analysis/", "tmm/views/")),
    ("Sinks", ("tmm/sinks/",)),
    ("Frameworks", ("tmm/integrations/",)),
    ("Where a NaN comes from", ("tmm/nonfinite/",)),
    ("The coordinate check", ("tmm/coordinate_check/",)),
    ("ModuleMonitor", ("tmm/module_monitor/",)),
    ("Commands, examples, tests", ("tmm/", "")),
)
"""Headings, and where the files lie whose messages stand below them; the first that fits."""

_DOTS = "…"

INTRODUCTION = """\
# Errors and warnings

Look up a message here when it is not clear what to do. Every message names the argument and the fix, so
most need no more than a second look. `…` stands for what a run fills in. The list is made from the source.

## What is raised, and when

| class | means |
|---|---|
| `ValueError`, `TypeError` | An argument cannot be right. The message names it and says what to write instead. |
| `RuntimeError` | A call came at the wrong moment: no step is open, a run has ended. |
| `OSError` | A file could not be read or written. The training raises it rather than lose data in silence. |
| `tmm.AlertError` | A detector found something, and the spec says `on_alert="raise"`. It has `.step` and `.anomalies`. |
| `tmm.MonitoringWarning` | Something is not measured, or a step is not recorded. The training goes on. |
| `tmm.AlertWarning` | A detector found something, and the spec says `on_alert="warn"`. |

A fault of the monitoring itself is raised until the first step has been recorded, so that mistakes show at
once. After that it is a warning, and the training goes on without that step. `on_error="warn"` of
`tmm.instrument` makes it a warning from the start.

To turn warnings into errors, as in a test:

```python
import warnings

import tmm

warnings.simplefilter("error", tmm.MonitoringWarning)
```

## The ones that people meet first

"""

FIRST: tuple[tuple[str, str], ...] = (
    (
        "the model is instrumented already; tmm.remove(model) first, or put all rules into one"
        " tmm.Spec",
        "A model has one spec. Call `tmm.remove(model)` before you instrument it again. In a"
        " notebook the second call replaces the first by itself, and a notice says so.",
    ),
    (
        "...(): no step is open; call begin_step(step) first",
        "Log inside of `with monitor.step(n):`. With `run.watch` a step is always open.",
    ),
    (
        "the model is not instrumented; call tmm.instrument(model, spec) first, and"
        " model.compile() before that, not after it",
        "Instrument the object that you call. After `tmm.remove` or the end of its run a model is"
        " as it was before.",
    ),
    (
        "step=... lies before the current step ...; steps must not decrease, also from epoch to"
        " epoch: step = epoch * len(batches) + batch",
        "Count steps over the whole training. Do not start at 0 in each epoch.",
    ),
    (
        "no forward pass of the instrumented model ran in the monitored step ..., so that nothing"
        " of one was measured. ...",
        "Call the object that `tmm.instrument` gave back. If a compiled function calls the model,"
        " instrument the function: `tmm.instrument(step, spec, module=model)`.",
    ),
    (
        "monitor.step(...) opens no step by itself, and nothing of it is recorded: write"
        " `with monitor.step(...):` around the step",
        "`monitor.step(n)` is a context manager. It needs `with`.",
    ),
    (
        "the metric ... cannot be traced into the graph: ...",
        "See [A metric of your own](../how-to/own-metric.md).",
    ),
    (
        "it gave ..., which is neither a number nor a tensor",
        "Your metric returned something else, such as a tuple. Return a number or a tensor.",
    ),
)
"""How messages begin, as `collect` gives their texts, and what to do."""


def page() -> str:
    """The whole page."""
    messages = collect()
    lines = [INTRODUCTION.rstrip(), ""]
    lines += [f"**{_code(_found(text, messages).text)}**\n\n{advice}\n" for text, advice in FIRST]
    for heading, some in by_section(messages):
        lines += [f"## {heading}", "", "| class | message |", "|---|---|"]
        lines += [f"| `{message.kind}` | {_cell(message.text)} |" for message in some]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def by_section(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """The messages below each heading; each message once."""
    left = list(messages)
    for heading, places in SECTIONS:
        some = [message for message in left if message.file.startswith(places)]
        left = [message for message in left if message not in some]
        yield heading, some


def _found(text: str, messages: Sequence[Message]) -> Message:
    """The message that begins so; raises LookupError where the code has none any more."""
    for message in messages:
        if message.text.startswith(text):
            return message
    raise LookupError(f"the page speaks of a message that the code does not have: {text}")


def _cell(text: str) -> str:
    """A message in a table: one line, with nothing that Markdown reads."""
    return _code(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    shown = " ".join(text.replace("...", _DOTS).split())
    if "`" not in shown:
        return f"`{shown}`"
    return f"`` {shown} ``"
