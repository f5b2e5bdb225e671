"""One part of a GPU plan, in a process that takes itself for a machine with GPUs.

    python -m benchmarks.plan.process variant NAME LAYERS    # or TOY in the place of a number
    python -m benchmarks.plan.process kernels < SOURCES      # JSON: sources by name
    python -m benchmarks.plan.process own CAPABILITY [quick]

Prints JSON as its last line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.mocked_gpu import CHIPS, mock_gpus
from benchmarks.plan.account import Launch, kernels_of, launches_of
from benchmarks.plan.capture import GraphPlan, plans_of
from benchmarks.plan.compare import Kernel
from benchmarks.plan.operators import OperatorLaunches
from benchmarks.plan.own_kernels import own_resources
from benchmarks.plan.resources import assembled
from benchmarks.plan.variants import all_variants, step_of, workload_of

TOY = "toy"


def variant_numbers(name: str, layers: str) -> dict[str, Any]:
    """The plans of a variant's graphs, accounted."""
    toy = layers == TOY
    workload = workload_of(1 if toy else int(layers), toy=toy)
    mock_gpus()
    plans = plans_of(*step_of(all_variants()[name], workload))
    counter = OperatorLaunches()
    return {
        "workload": workload.name,
        "graphs": [graph_numbers(plan, counter) for plan in plans],
    }


def graph_numbers(plan: GraphPlan, counter: OperatorLaunches) -> dict[str, Any]:
    """Launches of a graph, what its kernels compute, and what tmm's operators really launch."""
    launches = launches_of(plan.text, plan.sizes, plan.inputs)
    generated = [launch for launch in launches if launch.kind == "triton"]
    assert len(generated) == len(plan.computed), (len(generated), len(plan.computed))
    kernels = [
        {
            "name": launch.name,
            "origins": sorted(computed.origins),
            "stored": sorted(
                stored for name, stored in computed.stored.items() if name in launch.buffers
            ),
        }
        for launch, computed in zip(generated, plan.computed, strict=True)
    ]
    operators: Counter[str] = Counter()
    real: list[Launch] = []
    uncounted: Counter[str] = Counter()
    for call in plan.operators:
        found = counter.of(call)
        if found is None:
            uncounted[call.name] += 1
        else:
            operators[f"{call.name}: {len(found)} launches"] += 1
            real += found
    return {
        "is_backward": plan.is_backward,
        "launches": [[one.name, one.kind, one.bytes] for one in launches],
        "kernels": kernels,
        "sources": kernels_of(plan.text),
        "operators": dict(operators),
        "uncounted": dict(uncounted),
        "real": [[one.name, one.kind, one.bytes] for one in real],
    }


def kernel_of(numbers: dict[str, Any]) -> Kernel:
    """A launch of ``graph_numbers``, to be compared."""
    return Kernel(numbers["name"], frozenset(numbers["origins"]), frozenset(numbers["stored"]))


def main(arguments: Sequence[str]) -> Any:
    """What the process is to print."""
    what, *rest = arguments
    if what == "variant":
        return variant_numbers(*rest)
    chip = CHIPS[int(rest[0])] if what == "own" else CHIPS[90]
    mock_gpus(chip=chip)
    if what == "own":
        return [one.numbers() for one in own_resources(chip, quick=rest[1:] == ["quick"])]
    found = assembled(json.load(sys.stdin), chip)
    return {name: [one.numbers() for one in tried] for name, tried in found.items()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
