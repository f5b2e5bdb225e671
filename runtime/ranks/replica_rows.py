"""Whether all ranks hold alike what only one of them measures.

Each rank sends one number of each of its tensors with its rows; of equal tensors they are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tmm.core.families import FAMILIES, GRADIENT, PARAMETER, Phase
from tmm.core.keys import key_of, parts_of
from tmm.core.metrics import FloatArray, Reduction
from tmm.kernels.summarize.group import summarize_group
from tmm.runtime.key_binding import Binding, RowGroup, SiteNames

REPLICAS = Reduction(("replicas",), ("count", "sum", "absmax"))
"""Rows of the numbers of one rank. ``absmax`` is on how many ranks they are to be known."""

JOINED_REPLICAS = Reduction(("replicas",), ("count", "absmax", "minimum", "maximum"))
"""Rows of the least and the largest of all ranks, and of how many ranks have one."""

FOLLOWING = tuple(
    family.name
    for family in FAMILIES.values()
    if family.subject == "parameters" and family.phase is not Phase.GRADIENT
)
"""What is another's, where the parameters of ranks are."""

_PREFIX = "replicas of "
_SMALL = 1 << 14  # elements, of tensors that are read once more for their signs
_SAME = 1e-6  # relative: sums of the same numbers in another order


def numbers_of(tensors: Sequence[torch.Tensor], squares: torch.Tensor) -> torch.Tensor:
    """One number of each tensor, float64, shape ``(tensors,)``; from the sums of their squares.

    That of a small tensor tells it from its negative.
    """
    small = [place for place, tensor in enumerate(tensors) if 0 < tensor.numel() <= _SMALL]
    if not small:
        return squares
    rows = summarize_group([tensors[place] for place in small], ("count", "sum"))
    places = torch.tensor(small, device=squares.device)
    largest = (rows[:, 0] * squares[places]).sqrt_()  # that the sum could be
    signs = torch.where(largest > 0, rows[:, 1] / largest, torch.zeros_like(largest))
    return squares.index_add(0, places, squares[places] * signs / 2)


def binding_of(sites: Sequence[str]) -> Binding:
    """How rows of these sites are named, as ``rows_of`` gives them."""
    indices = np.arange(3 * len(sites), dtype=np.intp).reshape(-1, 3)
    named = SiteNames(_PREFIX + site for site in sites)  # the sites have rows of other kinds, too
    return Binding((RowGroup(REPLICAS, named, 0, indices),), ())


def rows_of(numbers: torch.Tensor, ranks: int | torch.Tensor) -> torch.Tensor:
    """The rows of numbers that ``ranks`` ranks are to know, or as many as it says of each.

    One dimension.
    """
    one = torch.ones_like(numbers)
    return torch.stack([one, numbers, one * ranks], dim=1).reshape(-1)


def sent(rows: FloatArray) -> FloatArray:
    """What a rank sends of its rows of ``REPLICAS``: rows of ``JOINED_REPLICAS``."""
    number = rows[:, 1]
    return np.stack([np.ones(len(rows)), rows[:, 2], number, number], axis=1)


def differing(sites: Sequence[str], rows: FloatArray) -> Iterator[str]:
    """The sites of which ranks do not hold the same, in joined rows.

    Gradients of zeros say nothing, such as those before a layer that begins with zeros: they count
    as the others of their family.
    """
    sites = [site.removeprefix(_PREFIX) for site in sites]
    count, expected, least, largest = rows.T
    with np.errstate(invalid="ignore"):
        are_equal = largest - least <= _SAME * np.maximum(np.abs(least), np.abs(largest))
    are_known = np.isfinite(least) & np.isfinite(largest)
    is_there = count > 0  # in this step
    differ = is_there & ((are_known & ~are_equal) | (count < expected))
    kinds = np.array([parts_of(site)[0] for site in sites])
    unclear = ~are_known | ((least == 0) & (largest == 0) & (kinds != PARAMETER.name))
    differ |= is_there & unclear & np.isin(kinds, kinds[differ])
    # Where gradients are said to be averaged, parameters are not compared: they follow these.
    follow = expected == 1
    for place in np.flatnonzero(differ):
        family, name = parts_of(sites[place])
        if family != PARAMETER.name:
            yield sites[place]
        if family == PARAMETER.name or (family == GRADIENT.name and follow[place]):
            yield from (key_of(each, name) for each in FOLLOWING)
