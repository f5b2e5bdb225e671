"""unit-scaling's ``track_scales``: its own backend of Dynamo, which interprets the graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from benchmarks.alternatives.interface import EAGER, Alternative, Attached


def attach(module: nn.Module) -> Attached:
    """Track a copy of the model; every step measures every operation in both directions."""
    from unit_scaling.transforms import (  # type: ignore[import-not-found,unused-ignore]
        track_scales,
    )

    tracked = track_scales(module)

    def read() -> Mapping[str, float]:
        values = {}
        for node in tracked.scales_graph().nodes:
            metrics = node.meta.get("metrics")
            if metrics is not None:
                for name, data in (("forward", metrics.fwd), ("backward", metrics.bwd)):
                    if data is not None:
                        values |= {f"{node.name}/{name} {k}": v for k, v in vars(data).items()}
        return values

    return Attached(tracked, tracked, read)


ALTERNATIVES = (
    Alternative(
        "unit-scaling track_scales",
        "other five statistics, of every operation, activation and gradient; uncompiled kernels",
        attach,
        EAGER,
        "unit_scaling",
        same_work=False,
    ),
)
