"""Numbers by which ranks compare what they hold."""

from __future__ import annotations

import numpy as np
import torch

from tests.model_zoo import noise
from tmm.runtime.grouped_statistics import sum_of_squares
from tmm.runtime.ranks.joined_rows import JoinedLayout, joined, maxima, sums
from tmm.runtime.ranks.replica_rows import (
    JOINED_REPLICAS,
    binding_of,
    differing,
    numbers_of,
    rows_of,
    sent,
)

Tensors = dict[str, torch.Tensor]


def compared(*of_ranks: Tensors, expected: int = 2, known: Tensors | None = None) -> set[str]:
    """The sites that differ between ranks with these tensors, as the ranks find it out."""
    layout, sent_rows = JoinedLayout(), []
    for tensors in (known or {}, *of_ranks):
        held = list(tensors.values())
        if not held:
            sent_rows.append({})
            continue
        numbers = numbers_of(held, sum_of_squares(held))
        binding = binding_of(tuple(tensors)).groups[0]
        rows = binding.rows(rows_of(numbers, expected).numpy())
        sent_rows.append({JOINED_REPLICAS: (binding.sites, sent(rows))})
    layout.extend([layout.missing(rows) for rows in sent_rows])
    own = [layout.own(rows) for rows in sent_rows[1:]]
    largest = np.max([maxima(rows) for rows in own], axis=0)
    total = np.sum([sums(rows, largest) for rows in own], axis=0)
    return set(differing(*joined(layout, own[0], largest, total, np.empty(0))[JOINED_REPLICAS]))


def test_what_is_equal_and_what_is_not() -> None:
    x, y = noise(30, 20), noise(30, 21)[:, :20]
    large = noise(300, 200)
    alone, other = {"gradient/w": x, "gradient/v": large}, {"gradient/w": -x, "gradient/v": large}
    assert compared(alone, alone) == set()
    assert compared(alone, other) == {"gradient/w"}
    assert compared(alone, {"gradient/w": y, "gradient/v": 1.0001 * large}) == set(alone)
    assert compared(alone, {"gradient/v": large}) == {"gradient/w"}
    assert compared(alone, {}, expected=1) == set()


def test_zeros_and_what_is_not_finite_count_as_the_others() -> None:
    x, zeros = noise(3, 4), torch.zeros(3, 4)
    for unclear in (zeros, x.clone().fill_(torch.nan), x.clone().fill_(torch.inf)):
        held = {"gradient/w": x, "gradient/v": unclear, "gradient_before_clip/v": unclear}
        assert compared(held, held) == set()
        assert compared(held, held | {"gradient/w": 2 * x}) == {"gradient/w", "gradient/v"}
    held = {"parameter/w": x, "parameter/v": zeros}
    families = ("parameter", "update", "optimizer_state", "parameter_difference")
    assert compared(held, held | {"parameter/w": 2 * x}) == {f"{name}/w" for name in families}


def test_parameters_follow_gradients_that_a_wrapper_should_average() -> None:
    x = noise(3, 4)
    found = compared({"gradient/w": x}, {"gradient/w": 2 * x}, expected=1)
    families = ("gradient", "parameter", "update", "optimizer_state", "parameter_difference")
    assert found == {f"{name}/w" for name in families}


def test_what_is_missing_in_a_step_says_nothing() -> None:
    held, known = {"gradient/w": noise(3, 4)}, {"gradient/v": noise(3, 4)}
    assert compared(held, held, known=known) == set()
