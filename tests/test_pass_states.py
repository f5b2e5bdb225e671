"""Whether a forward pass that has failed may be run once more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tmm.core.rng import PassStates


def count(net: nn.Module) -> None:
    assert isinstance(net.count, torch.Tensor)
    net.count.add_(1)


def replace(net: nn.Module) -> None:
    net.count = torch.ones(())


def add(net: nn.Module) -> None:
    net.register_buffer("another", torch.ones(()))


def back_propagate(net: nn.Module) -> None:
    net(torch.ones(2, 4)).sum().backward()


def step(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.sub_(1.0)


def draw(net: nn.Module) -> None:
    torch.rand(3)


def counting() -> nn.Module:
    net = nn.Linear(4, 4)
    net.register_buffer("count", torch.zeros(()))
    return net


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(
    ("change", "trains", "writes"),
    [
        (count, False, True),
        (replace, False, True),
        (add, False, True),
        (back_propagate, True, True),
        (step, True, True),
        (draw, False, False),
        (step, False, False),  # a forward pass of a module alone has no part in that
    ],
)
def test_what_has_begun_to_write_is_not_run_once_more(
    change: Callable[[nn.Module], None], trains: bool, writes: bool, looks: bool
) -> None:
    net = counting()
    states = PassStates(net)
    states.capture(trains=trains)
    before = states.capture(trains=trains, looks=looks)
    assert not before.is_written_to()
    change(net)
    assert before.is_written_to() == writes


def test_buffers_that_nobody_looked_for_since_are_no_reason_to_run_a_pass_once_more() -> None:
    net = nn.Sequential(counting(), nn.Linear(4, 4))
    states = PassStates(net)
    states.capture(trains=False)
    replace(net[0])  # by one that is known when the next pass begins
    assert not states.capture(trains=False, looks=False).is_written_to()
    add(net[1])
    assert states.capture(trains=False, looks=False).is_written_to()
    assert not states.capture(trains=False).is_written_to()
    assert not states.capture(trains=False, looks=False).is_written_to()
