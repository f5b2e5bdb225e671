"""Which nodes of a graph compute what is measured."""

from __future__ import annotations

from torch.fx import Node

from tmm.core.records import Slot

_SLOTS = "tmm_slots"


def slots_of(node: Node) -> tuple[Slot, ...]:
    """What is measured by the numbers that a node computes; empty for most nodes."""
    slots: tuple[Slot, ...] = node.meta.get(_SLOTS, ())
    return slots


def add_slots(node: Node, *slots: Slot) -> None:
    """Remember that a node computes ``slots``, too; indices count from its first number."""
    node.meta[_SLOTS] = (*slots_of(node), *slots)


def take_slots(node: Node) -> tuple[Slot, ...]:
    """The slots of a node, which has none afterwards."""
    taken: tuple[Slot, ...] = node.meta.pop(_SLOTS, ())
    return taken
