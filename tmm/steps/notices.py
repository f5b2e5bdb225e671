"""Warnings of what a rule asks for and has no rows; ``tmm.explain`` has the reasons as well."""

from __future__ import annotations

from tmm.core.families import ATTENTION
from tmm.instrumentation.twin import Twin

_SHOWN = 3  # names in a warning


class Notices:
    """Tells once, at the end of a step, what it found that is not measured.

    That is what had the key of something else, and attentions.
    """

    def __init__(self) -> None:
        self._said: dict[str, None] = {}
        self._known = -1

    def news(self, twin: Twin) -> str | None:
        """What is new since the last call, as a user should know it; None for nothing."""
        refused, lost = twin.recorder.registry.owners.refused, twin.attribution.lost_attention
        if len(refused) + len(lost) == self._known:
            return None
        is_first, self._known = self._known < 0, len(refused) + len(lost)
        found = {**refused, **lost}
        if is_first and not lost and twin.plan.spec.measures(ATTENTION.name):
            found |= _attention_nowhere(twin)
        new = {name: reason for name, reason in found.items() if name not in self._said}
        self._said |= dict.fromkeys(new)
        if not new:
            return None
        listed = "; ".join(f"{name}: {new[name]}" for name in list(new)[:_SHOWN])
        more = f"; and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        return f"not measured: {listed}{more} (tmm.explain(model).unmeasured has all of them)"


def _attention_nowhere(twin: Twin) -> dict[str, str]:
    """The rules of attention, where nothing was found that they could measure."""
    if any(measurement.is_of_attention for measurement in twin.attribution.rows):
        return {}
    return {
        str(rule): f"no attention that is known was found in the {len(names)} modules it matches"
        for rule, names in twin.plan.matched.items()
        if rule.family == ATTENTION.name
    }
