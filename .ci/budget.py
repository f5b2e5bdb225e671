"""Compares the time of the tests in a JUnit report with their budget, and names the slowest.

python .ci/budget.py REPORT

The budget is the sum over all tests on one core of the machine that it was set on; another machine
gets as much more as it takes longer for a fixed loop. Exits with 1 where it is exceeded.
"""

from __future__ import annotations

import sys
import timeit
from pathlib import Path
from xml.etree import ElementTree

BUDGET = 960.0
"""Seconds: eight minutes on two cores."""

NOISE = 1.1
"""What two runs on one machine may differ by."""

LOOP_SECONDS = 0.0924
"""What the loop of `slowness` takes on the machine that the budget was set on."""

_NAMED = 10


def durations(report: Path) -> dict[str, float]:
    """Seconds by test, the slowest first, of the setup, the call and the teardown together."""
    found: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = found.get(name, 0.0) + float(case.get("time", 0))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def slowness() -> float:
    """How many times as long as there this machine takes, at least 1."""
    program = "for number in range(1_000_000): known[number % 1000] = str(number)"
    seconds = min(timeit.repeat(program, "known = {}", number=1, repeat=7))
    return max(1.0, seconds / LOOP_SECONDS)


def main(report: Path) -> int:
    """Print the comparison; gives the exit code."""
    seconds, slow = durations(report), slowness()
    total, budget = sum(seconds.values()), BUDGET * slow * NOISE
    print(
        f"{len(seconds)} tests took {total:.0f} s of {budget:.0f} s ({BUDGET:.0f} s, {NOISE} for"
        f" noise, {slow:.2f} for this machine); the slowest:"
    )
    for name, taken in list(seconds.items())[:_NAMED]:
        print(f"{taken:8.1f} s  {name}")
    if total > budget:
        print(f"The tests are {total - budget:.0f} s over their budget.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
