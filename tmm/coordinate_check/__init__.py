"""Private: how the sizes of updates and activations grow with the width of a model."""

from tmm.coordinate_check.coordinate_check import coord_check
from tmm.coordinate_check.result import TERMS, CoordinateCheck, Growth, Term

__all__ = ["TERMS", "CoordinateCheck", "Growth", "Term", "coord_check"]
