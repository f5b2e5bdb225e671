"""Which detectors look at each step of a training, and what is done about what they find.

The detectors themselves are imported where alerts are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from tmm.analysis.anomaly import Anomaly, Severity
    from tmm.analysis.registry import Detector

    Alarms: TypeAlias = bool | Severity | Iterable[str | Detector]
    OnAlert: TypeAlias = Literal["warn", "raise"] | Callable[[tuple[Anomaly, ...]], object]

_LEAST: Severity = "medium"


@dataclass(frozen=True)
class AlertSettings:
    """Which detectors look at each step, the least severity that counts, and what is done."""

    detectors: tuple[tuple[str, Detector], ...]
    least: Severity
    action: OnAlert

    def __str__(self) -> str:
        names = [name for name, _ in self.detectors]
        action = "<function>" if callable(self.action) else repr(self.action)
        return f"alerts={names}, on_alert={action}"

    @classmethod
    def build(cls, alerts: Alarms, on_alert: OnAlert) -> AlertSettings | None:
        """What ``alerts=`` and ``on_alert=`` of a spec mean; None for no alerts.

        Raises:
            ValueError: for a detector or a severity that does not exist, no detectors, or an
                ``on_alert`` without alerts.
            TypeError: for what is none of them, or an ``on_alert`` that cannot be done.
        """
        if on_alert not in ("warn", "raise") and not callable(on_alert):
            raise TypeError(f"on_alert={on_alert!r} is neither 'warn', 'raise' nor a function")
        if alerts is False and on_alert != "warn":
            raise ValueError(
                f"on_alert={on_alert!r} does nothing without alerts; give alerts=True, too"
            )
        if alerts is False:
            return None
        from tmm.analysis.anomaly import SEVERITIES
        from tmm.analysis.registry import all_detectors

        if alerts is True:
            return cls(all_detectors(), _LEAST, on_alert)
        if isinstance(alerts, str):
            if alerts not in SEVERITIES:
                raise ValueError(
                    f"alerts={alerts!r} is no severity ({', '.join(SEVERITIES)}); give"
                    " detectors as a list"
                )
            return cls(all_detectors(), alerts, on_alert)
        if not isinstance(alerts, Iterable):
            raise TypeError(
                f"alerts={alerts!r} is neither True, a severity nor a list of detectors"
            )
        known = dict(all_detectors())
        chosen = tuple(_detector(one, known) for one in alerts)
        if not chosen:
            raise ValueError("alerts=[] has no detectors; give True for all, False for none")
        return cls(chosen, _LEAST, on_alert)


def _detector(chosen: str | Detector, known: dict[str, Detector]) -> tuple[str, Detector]:
    if callable(chosen):
        return getattr(chosen, "__name__", type(chosen).__name__), chosen
    if chosen not in known:
        raise ValueError(f"alerts: no detector {chosen!r}; there are {', '.join(known)}")
    return chosen, known[chosen]
