"""Inputs of the reference that are not those of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


class ReferenceInputs:
    """What the reference's next forward pass is given, where somebody says so.

    ``pairs`` are the tensors of the model's inputs that differ from the reference's, with those;
    ``differing`` names the arguments that have differed so far, and ``are_traced`` tells that
    graphs take what the reference is given.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.differing: dict[str, None] = {}
        self.are_traced = False
        self._given: tuple[tuple[Any, ...], dict[str, Any], list[int]] | None = None

    def give(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Use these inputs in the next forward pass."""
        versions = [_version(leaf) for leaf in tree_leaves((arguments, keywords))]
        self._given = arguments, keywords, versions

    def forget(self) -> None:
        """Use the model's own inputs in the next forward pass."""
        self._given = None

    @property
    def are_waiting(self) -> bool:
        """Whether there was no forward pass since inputs were given."""
        return self._given is not None

    def match(
        self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Find the tensors that differ from those that a forward pass of the model is given.

        Arguments are matched by name; one that only the model or only the reference has does not
        matter.

        Raises:
            ValueError: for tensors that differ in shape or dtype, or were overwritten since.
        """
        self.pairs = []
        if self._given is None:
            return
        given, given_keywords, versions = self._given
        self._given = None
        if versions != [_version(leaf) for leaf in tree_leaves((given, given_keywords))]:
            raise ValueError(
                "the reference cannot be compared: its inputs were overwritten between its forward"
                " pass and that of the model; give it a copy"
            )
        own = _by_name(forward, arguments, keywords)
        others = _by_name(forward, given, given_keywords)
        for name in own.keys() & others.keys():
            self._match(name, tree_leaves(own[name]), tree_leaves(others[name]))

    def _match(self, name: str, own: list[Any], others: list[Any]) -> None:
        if len(own) != len(others):
            raise ValueError(_refusal(name, f"{len(others)} values", f"{len(own)}"))
        for value, other in zip(own, others, strict=True):
            if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
                if (value.shape, value.dtype) != (other.shape, other.dtype):
                    raise ValueError(_refusal(name, _described(other), _described(value)))
                if value is not other and not _equal(value, other := other.to(value.device)):
                    self.differing[name] = None
                    self.pairs.append((value, other.detach()))
            elif isinstance(value, _PLAIN) and isinstance(other, _PLAIN) and value != other:
                self.differing[name] = None


def _by_name(
    forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return dict(inspect.signature(forward).bind(*arguments, **keywords).arguments)
    except (TypeError, ValueError):
        return {str(position): value for position, value in enumerate(arguments)} | dict(keywords)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    both_nan = (left != left) & (right != right)
    return bool(((left == right) | both_nan).all())


def _version(leaf: object) -> int:
    if not isinstance(leaf, torch.Tensor) or leaf.is_inference():
        return 0
    return leaf._version


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _refusal(name: str, reference: str, own: str) -> str:
    return (
        f"the reference cannot be compared: its forward pass was given {name} = {reference}, that"
        f" of the model {own}; give both the same batch"
    )
