"""How a user's own functions are computed, which is what they cost."""

from __future__ import annotations

from collections.abc import Iterator

from tmm.core.families import VALUE_FAMILY
from tmm.core.metrics import Reduction
from tmm.core.records import Slot
from tmm.instrumentation.twin import Twin

# From the cheapest to the dearest.
_WAYS = (
    "it is one that tmm knows, and costs no reading of a tensor beside built-in metrics",
    "it is operations of the graph, which read each tensor once more than built-in metrics do",
    "it is called for each tensor, outside of graphs",
)


def own_functions(twin: Twin) -> dict[str, str]:
    """By the name of each own metric that has rows, how it is computed, at the worst."""
    ways: dict[Reduction, int] = {}
    for slot in _slots(twin):
        reduction = slot.measurement.reduction
        way = 0 if slot.known else 1 if reduction.trace else 2
        ways[reduction] = max(way, ways.get(reduction, 0))
    for measurement in twin.attribution.rows:
        if measurement.family != VALUE_FAMILY:
            ways.setdefault(measurement.reduction, 2)
    return {
        f"own metric {name}": _WAYS[way]
        for reduction, way in ways.items()
        if reduction.function is not None
        for name in reduction.metrics
    }


def _slots(twin: Twin) -> Iterator[Slot]:
    for graph in twin.graphs:
        for layout in (graph.layout, *(wanted.layout for wanted in graph.row_inputs)):
            yield from (s for s in layout.slots if s.measurement.family != VALUE_FAMILY)
