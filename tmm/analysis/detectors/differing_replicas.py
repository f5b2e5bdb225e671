"""Parameters that ranks should hold alike and do not."""

from __future__ import annotations

from collections.abc import Iterator

from tmm.analysis.anomaly import Anomaly, episodes
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.recent import Newest
from tmm.analysis.series import named, series_of
from tmm.core.keys import REPLICAS_DIFFERING, replica_of
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded


def replicas_that_differ(recorded: Recorded) -> Iterator[Anomaly]:
    """Parameters that are other ones on some rank than on its replicas: critical.

    Compared with `tmm.Spec(..., replicas_agree=n)`; the first one is named.
    """
    counts = named(recorded, REPLICAS_DIFFERING)
    if counts is None:
        return
    firsts = {
        step: name
        for series in series_of(recorded, lambda info: replica_of(info) is not None)
        if (name := replica_of(series.info)) is not None
        for step in series.steps.tolist()
    }
    for episode in episodes(counts, counts.values > 0):
        name = firsts.get(episode.first_step, "a parameter")
        before = counts.steps[: episode.places.start]
        since = f"; at step {before[-1]} they held the same" if len(before) else ""
        text = (
            f"Ranks hold different parameters {episode.when}: {name} is the first of"
            f" {counts.values[episode.places.start]:.0f}{since}."
        )
        found = episode.anomaly("replicas_differ", "critical", 0.0, text)
        yield Anomaly(**{**vars(found), "site": name})


def _is_count(info: KeyInfo) -> bool:
    return info.key == REPLICAS_DIFFERING


def _told(newest: Newest) -> Ending:
    return Ending.of(newest, newest.values > 0)


def _reads(info: KeyInfo) -> bool:
    return replica_of(info) is not None


def _one(info: KeyInfo) -> int:
    return 0


REPLICAS_END = (EndsWith("replicas_differ", "critical", _is_count, _told, _one, _reads),)
