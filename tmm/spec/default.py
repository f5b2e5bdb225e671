"""What a run measures of a model where nobody says what."""

from __future__ import annotations

from tmm.spec import rules
from tmm.spec.spec import Spec


def default_spec(every: int = 10) -> Spec:
    """What ``run.watch`` measures without a spec, on each step that is a multiple of ``every``.

    Of all outputs the mean, root mean square, largest magnitude, share of zeros, NaNs and
    infinities; of gradients norm, NaNs and infinities; of parameters root mean square and NaNs, and
    their updates; and what ``diagnosis=True`` adds: the inputs of the model, say.
    """
    return Spec(
        rules.activation("mean", "rms", "absmax", "zero_fraction", "nan_count", "inf_count"),
        rules.gradient("norm", "nan_count", "inf_count"),
        rules.parameter("rms", "nan_count"),
        rules.update("relative_norm"),
        every=every,
        diagnosis=True,
    )
