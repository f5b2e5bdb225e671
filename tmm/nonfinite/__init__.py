"""Private: where the first NaN or infinity of a step comes from."""

from tmm.nonfinite.find_nonfinite import find_nonfinite
from tmm.nonfinite.origin import Nonfinite, Origin, SourceLine
from tmm.nonfinite.statistics import TensorStatistics

__all__ = ["Nonfinite", "Origin", "SourceLine", "TensorStatistics", "find_nonfinite"]
