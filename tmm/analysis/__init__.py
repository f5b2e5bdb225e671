"""What a recorded run says: what went wrong, in numbers, and beside other runs."""

from tmm.analysis.anomaly import Anomaly
from tmm.analysis.compare import Comparison, Divergence, compare, first_divergence
from tmm.analysis.detectors.nonfinite_values import first_nonfinite
from tmm.analysis.ranks_apart import ranks_apart
from tmm.analysis.recorded import RecordedSeries
from tmm.analysis.registry import find_anomalies
from tmm.analysis.series import KeySummary, summarize
from tmm.analysis.story import Excerpt, Story, find_stories
from tmm.core.series_by_key import Recorded

__all__ = [
    "Anomaly",
    "Comparison",
    "Divergence",
    "Excerpt",
    "KeySummary",
    "Recorded",
    "RecordedSeries",
    "Story",
    "compare",
    "find_anomalies",
    "find_stories",
    "first_divergence",
    "first_nonfinite",
    "ranks_apart",
    "summarize",
]
