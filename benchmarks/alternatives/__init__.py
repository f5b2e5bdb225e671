"""Ways to see inside of a training step, one file for each; ``__main__`` compares them.

Optional packages are imported when their alternative is attached, and nowhere else.
"""

from benchmarks.alternatives import (
    custom_op,
    hooks,
    leaf_function,
    module_monitor,
    nnsight_trace,
    plain,
    track_scales,
    wandb_watch,
    with_tmm,
)
from benchmarks.alternatives.interface import Alternative

ALL: tuple[Alternative, ...] = (
    *plain.ALTERNATIVES,
    *with_tmm.ALTERNATIVES,
    *hooks.ALTERNATIVES,
    *module_monitor.ALTERNATIVES,
    *custom_op.ALTERNATIVES,
    *leaf_function.ALTERNATIVES,
    *wandb_watch.ALTERNATIVES,
    *nnsight_trace.ALTERNATIVES,
    *track_scales.ALTERNATIVES,
)

__all__ = ["ALL", "Alternative"]
