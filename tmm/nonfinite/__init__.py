"""Where the first NaN or infinity of a step comes from."""

from tmm.nonfinite.find import find_nonfinite
from tmm.nonfinite.result import Nonfinite, Origin, SourceLine
from tmm.nonfinite.statistics import TensorStatistics

__all__ = ["Nonfinite", "Origin", "SourceLine", "TensorStatistics", "find_nonfinite"]
