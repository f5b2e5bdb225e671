"""Whether a report's ratios are still those that are expected on this kind of machine.

    python -m benchmarks --quick --save && python -m benchmarks.check
    python -m benchmarks.check REPORT [--update]

A ratio that is off by more than its margin fails, in either direction: what got faster without a
reason is a measurement that broke, or a monitor that measures less. ``--update`` writes what a
report holds into ``expected.json``; read the difference before you commit it. It is not part of the
tests, which run on machines that are busy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import RESULTS
from benchmarks.timing import machine_kind

EXPECTED = Path(__file__).parent / "expected.json"
WATCHED: Mapping[str, tuple[str, ...]] = {
    "everything": (
        "activations, each step",
        "everything, each step",
        "everything, each 10th step",
        "steps that are not monitored",
        "peak memory, activations",
        "peak memory, everything",
    ),
    "compilation": tuple(
        f"GPT: {variant}, {what}, {kind} cache"
        for variant in ("tmm, every=1", "tmm, every=10")
        for what, kind in (("all steps", "cold"), ("all steps", "warm"), ("first step", "warm"))
    ),
}
"""The questions and variants whose ratios are checked: all of tmm, none of another library."""
FLOORS: Mapping[str, float] = {"everything": 0.015, "compilation": 0.15}
"""The least margins: runs differ by so much though nothing changed (two compilations of one
program lay up to 2 % apart)."""


@dataclass(frozen=True)
class Ratio:
    """A ratio, and the noise of its run: half of its 95 % interval, or more where it is skewed."""

    ratio: float
    noise: float


@dataclass(frozen=True)
class Expected:
    """A ratio and how far another run may lie from it, its own noise apart."""

    ratio: float
    margin: float


def ratios(report: Mapping[str, Any]) -> dict[str, Ratio]:
    """The checked ratios of a report of the suite."""
    found = {}
    for question, variants in WATCHED.items():
        lines = report["questions"].get(question, {}).get("report", {}).get("lines", ())
        for line in lines:
            ratio = line["ratio"]
            if line["variant"] in variants and ratio is not None:
                ends = (ratio if end is None else end for end in (line["low"], line["high"]))
                noise = max(abs(ratio - end) for end in ends)
                found[f"{question}: {line['variant']}"] = Ratio(ratio, noise)
    return found


def expect(measured: Mapping[str, Ratio]) -> dict[str, Expected]:
    """What is expected after a run: its ratios, with its noise as the margin."""
    return {
        name: Expected(round(one.ratio, 4), round(max(FLOORS[name.split(":")[0]], one.noise), 4))
        for name, one in measured.items()
    }


def problems(measured: Mapping[str, Ratio], expected: Mapping[str, Expected]) -> list[str]:
    """What differs, in words; empty if all is as expected."""
    found = [f"{name}: not measured" for name in sorted(expected.keys() - measured.keys())]
    for name, one in measured.items():
        known = expected.get(name)
        if known is None:
            found.append(f"{name}: {one.ratio:.4f}, and nothing is expected; see --update")
            continue
        shown = f"{name}: {one.ratio:.4f}, expected {known.ratio:.4f} +- {known.margin:.4f}"
        if one.noise > 2 * known.margin:
            found.append(f"{shown}; +- {one.noise:.4f} is too noisy to tell: is anything running?")
        elif abs(one.ratio - known.ratio) > known.margin + one.noise:
            gain = "; a gain without a reason fails, too" if one.ratio < known.ratio else ""
            found.append(f"{shown}{gain}")
    return found


def newest(machine: str) -> Path:
    """The newest report of the suite on that kind of machine.

    Raises:
        typer.BadParameter: if there is none.
    """
    reports = sorted(RESULTS.glob(f"suite-{machine}-*.json"))
    if not reports:
        raise typer.BadParameter(
            f"no report of {machine} in {RESULTS}; make one: python -m benchmarks --quick --save"
        )
    return reports[-1]


def load(path: Path) -> dict[str, dict[str, Expected]]:
    """What is expected, by the kind of machine."""
    content = json.loads(path.read_text())
    return {
        machine: {name: Expected(**one) for name, one in values.items()}
        for machine, values in content.items()
    }


def main(
    report: Annotated[Path | None, typer.Argument(help="The newest of this machine.")] = None,
    update: Annotated[bool, typer.Option(help="Expect from now on what it holds.")] = False,
    expected: Annotated[Path, typer.Option(help="Where the expected ratios are.")] = EXPECTED,
) -> None:
    """Compare a report with what is expected."""
    path = report or newest(machine_kind())
    content = json.loads(path.read_text())
    measured, known = ratios(content), load(expected)
    machine = content["machine"]
    if update:
        known[machine] = expect(measured)
        text = {name: {k: asdict(v) for k, v in one.items()} for name, one in known.items()}
        expected.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
        return
    if machine not in known:
        print(f"nothing is expected of {machine}; python -m benchmarks.check --update {path}")
        raise typer.Exit(2)
    found = problems(measured, known[machine])
    print("\n".join(found) or f"{len(measured)} ratios are as expected")
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
