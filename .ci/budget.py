"""Compares the time of the tests in a JUnit report with their budget, and names the slowest.

python .ci/budget.py REPORT [SECONDS]

The budget is the sum over all tests on one core. Exits with 1 where it is exceeded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

BUDGET = 960.0
"""Seconds: eight minutes on two cores."""

_NAMED = 10


def durations(report: Path) -> dict[str, float]:
    """Seconds by test, the slowest first, of the setup, the call and the teardown together."""
    found: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = found.get(name, 0.0) + float(case.get("time", 0))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main(report: Path, budget: float = BUDGET) -> int:
    """Print the comparison; gives the exit code."""
    seconds = durations(report)
    total = sum(seconds.values())
    print(f"{len(seconds)} tests took {total:.0f} s of {budget:.0f} s; the slowest:")
    for name, taken in list(seconds.items())[:_NAMED]:
        print(f"{taken:8.1f} s  {name}")
    if total > budget:
        print(f"The tests are {total - budget:.0f} s over their budget.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
