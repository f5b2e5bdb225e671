"""Inputs of the reference that are not those of the model."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tmm.core.torch_private import tree_leaves
from tmm.runtime.host_copies import HostCopies, HostCopy, are_ready

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


class ReferenceInputs:
    """What the reference's next forward pass is given, where somebody says so.

    ``pairs`` are the tensors of the model's inputs that differ from the reference's, with those;
    ``differing`` names the arguments in which that was so, ``lacking`` those that the reference was
    not given, and ``are_traced`` tells that graphs take what the reference is given.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.differing: dict[str, None] = {}
        self.lacking: dict[str, None] = {}
        self.are_traced = False
        self._given: tuple[tuple[Any, ...], dict[str, Any], list[int]] | None = None
        self._compared: deque[tuple[str, HostCopy]] = deque()

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

    def remarks(self) -> Iterator[str]:
        """What a user should know of the inputs so far."""
        self._note_differing(is_waiting=True)
        for name in self.differing:
            yield (
                f"the reference was given another {name} than the monitored module; its own is what"
                " is compared"
            )
        for name in self.lacking:
            yield (
                f"the reference was not given {name}, which the monitored module was; it is"
                " compared as if it had been given the same"
            )

    def match(
        self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Find the tensors that differ from those that a forward pass of the model is given.

        Arguments are matched by name. One that the reference was not given is taken to be that of
        the model.

        Raises:
            ValueError: for tensors that differ in shape or dtype, or were overwritten since, for
                other values that differ, and for an argument that the model is not given.
        """
        self.pairs = []
        self._note_differing(is_waiting=False)
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
        if further := others.keys() - own.keys():
            raise ValueError(_refusal(min(further), "a value", "was not"))
        for name in own.keys() & others.keys():
            self._match(name, tree_leaves(own[name]), tree_leaves(others[name]))
        for name in own.keys() - others.keys():
            self.lacking[name] = None

    def _match(self, name: str, own: list[Any], others: list[Any]) -> None:
        if others == [None] and own != [None]:
            self.lacking[name] = None  # as targets are, which only a loss depends on
            return
        if len(own) != len(others):
            raise ValueError(_refusal(name, f"{len(others)} values", f"{len(own)}"))
        for value, other in zip(own, others, strict=True):
            if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
                if (value.shape, value.dtype) != (other.shape, other.dtype):
                    raise ValueError(_refusal(name, _described(other), _described(value)))
                if value is not other:
                    self._compare(name, value, other.to(value.device))
            elif isinstance(value, _PLAIN) and isinstance(other, _PLAIN) and value != other:
                raise ValueError(_refusal(name, repr(other), repr(value)))
            elif isinstance(value, torch.Tensor) != isinstance(other, torch.Tensor):
                raise ValueError(_refusal(name, type(other).__name__, type(value).__name__))

    def _compare(self, name: str, value: torch.Tensor, other: torch.Tensor) -> None:
        """On an accelerator nobody waits to know: it is compared as if it differed."""
        differs = _differs(value, other)
        if value.is_cpu and not differs.item():
            return
        self.pairs.append((value, other.detach()))
        copies = HostCopies()
        self._compared.append((name, copies.copy(differs)))
        copies.end()

    def _note_differing(self, *, is_waiting: bool) -> None:
        while self._compared and (is_waiting or are_ready([self._compared[0][1]])):
            name, differs = self._compared.popleft()
            if differs.read().item():
                self.differing[name] = None


def _by_name(
    forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = inspect.signature(forward).bind(*arguments, **keywords)
        bound.apply_defaults()
        return dict(bound.arguments)
    except (TypeError, ValueError):
        return {str(position): value for position, value in enumerate(arguments)} | dict(keywords)


def _differs(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Whether any elements differ, one element; NaN is like NaN."""
    both_nan = (left != left) & (right != right)
    return ~((left == right) | both_nan).all()


def _version(leaf: object) -> int:
    if not isinstance(leaf, torch.Tensor) or leaf.is_inference():
        return 0
    return leaf._version


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _refusal(name: str, reference: str, own: str) -> str:
    return (
        f"the reference cannot be compared: its forward pass was given {name} = {reference}, that"
        f" of the model {own}; give both the same arguments, or leave out the reference's own pass"
    )
