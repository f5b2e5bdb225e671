"""How long ``import tmm`` takes beside torch's own import, in fresh processes.

``import tmm`` looks up nothing; what a training uses of it is imported when its names are asked
for. That is timed as well, behind what ``torch.compile`` imports itself.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Line, with_goal

ROOT = Path(__file__).parent.parent.parent
GOAL = 0.3
TORCH, COMPILER = "torch", "torch._dynamo, torch._inductor.compile_fx"
PROGRAM = f"""
import json, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import tmm
times.append(time.perf_counter())
import {COMPILER}
times.append(time.perf_counter())
tmm.instrument, tmm.monitor, tmm.Spec, tmm.activation
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def as_installed(**more: str) -> dict[str, str]:
    """The environment of a process that keeps byte code, as one of an installed package finds it.

    Without, Python compiles all of tmm anew in each process: 0.2 s.
    """
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | more


def time_imports() -> list[float]:
    """Seconds of torch, tmm, torch's compiler, and the names of tmm, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=as_installed(), cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: list[float] = json.loads(done.stdout)
    return found


def import_lines(times: list[list[float]]) -> list[Line]:
    """Lines of what ``time_imports`` found; ratios are to the goal, 0.3 s."""
    torch, tmm, compiler, names = zip(*times, strict=True)
    base = f"import torch {statistics.median(torch):.2f} s"
    rest = f"what torch.compile imports {statistics.median(compiler):.2f} s"
    return [
        _line("import tmm", tmm, f"ratio to {GOAL} s; {base}"),
        _line("the names of tmm that a training uses", names, f"ratio to {GOAL} s; {rest}"),
    ]


def _line(variant: str, seconds: tuple[float, ...], note: str) -> Line:
    middle = statistics.median(seconds)
    ends = min(seconds) / GOAL, max(seconds) / GOAL
    line = Line(variant, middle * 1e3, middle / GOAL, *ends, note=note)
    return with_goal(line, at_most=1.0)
