"""Compares the time of the tests in a JUnit report with their budget, and names the slowest.

python .ci/budget.py REPORT

The budget is the sum over all tests, each on one core, of the machine that it was set on, or what
all cores had in the time of the run where that is less; another machine gets as much more as it
takes longer for a fixed loop. Says where it is exceeded, and exits with 1 where it is by more than
what other programs on the machine explain.
"""

from __future__ import annotations

import os
import sys
import timeit
from pathlib import Path
from xml.etree import ElementTree

BUDGET = 960.0
"""Seconds: eight minutes on two cores."""

SLACK = 2.5
"""What other programs on the machine, and a compiler that is slower there than Python is, may make
of it: what is more fails."""

LOOP_SECONDS = 0.0924
"""What the loop of `slowness` takes on the machine that the budget was set on."""

_NAMED = 10
_FILE_SECONDS = 10


def durations(report: Path) -> dict[str, float]:
    """Seconds by test, the slowest first, of the setup, the call and the teardown together."""
    found: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = found.get(name, 0.0) + float(case.get("time", 0))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def time_of_cores(report: Path) -> float:
    """Seconds that all cores had from the beginning to the end of the run."""
    suites = ElementTree.parse(report).iter("testsuite")
    return (os.cpu_count() or 1) * sum(float(suite.get("time", 0)) for suite in suites)


def longest_files(seconds: dict[str, float]) -> list[str]:
    """The files that take more than some seconds, the longest first: `tests/longest_files.py`."""
    files: dict[str, float] = {}
    for name, taken in seconds.items():
        file = name.split("::")[0].removeprefix("tests.").split(".")[0]
        files[file] = files.get(file, 0.0) + taken
    return [file for file in sorted(files, key=lambda f: -files[f]) if files[file] > _FILE_SECONDS]


def slowness() -> float:
    """How many times as long as there this machine takes, at least 1."""
    program = "for number in range(1_000_000): known[number % 1000] = str(number)"
    seconds = min(timeit.repeat(program, "known = {}", number=1, repeat=7))
    return max(1.0, seconds / LOOP_SECONDS)


def main(report: Path) -> int:
    """Print the comparison; gives the exit code."""
    seconds, slow = durations(report), slowness()
    # Where more tests run at once than there are cores, each takes longer, and all of them do not.
    total, budget = min(sum(seconds.values()), time_of_cores(report)), BUDGET * slow
    print(
        f"{len(seconds)} tests took {total:.0f} s of {budget:.0f} s ({BUDGET:.0f} s, times"
        f" {slow:.2f} for this machine); the slowest:"
    )
    for name, taken in list(seconds.items())[:_NAMED]:
        print(f"{taken:8.1f} s  {name}")
    print("The longest files:", *longest_files(seconds))
    if total > budget:
        print(f"The tests are {total - budget:.0f} s over their budget.")
    return int(total > SLACK * budget)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
