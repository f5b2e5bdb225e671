"""Which launches of a program are which of the plain one, and what was split in two for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A launch of a Triton kernel: its name, the nodes that it computes, those that it stores."""

    name: str
    origins: frozenset[str]
    stored: frozenset[str]


@dataclass(frozen=True)
class Comparison:
    """What became of each launch of the plain program.

    ``pairs`` counts the kernels of the plain program and of the other one that do the same work,
    ``added`` the kernels that do none of it, ``split`` names the plain kernels of whose work a part
    has become a launch of its own, with that one.
    """

    pairs: Counter[tuple[str, str]]
    added: Counter[str]
    split: tuple[tuple[str, str], ...]


def compare(plain: Sequence[Kernel], other: Sequence[Kernel]) -> Comparison:
    """Tell the launches of one graph in two programs apart.

    A launch of the plain program is taken for that of the other one which stores most of what it
    stores, and least of what others of the plain program store, and then for that which computes
    most of what it computes, and least else. A launch that is taken for none was added. Where
    it stores something that the plain program computed inside of a launch, and that launch's own
    successor no longer computes, the plain one was split.
    """
    of_plain = frozenset[str]().union(*(kernel.stored for kernel in plain))
    images: list[int | None] = []
    for kernel in plain:
        images.append(_image(kernel, other, of_plain, images))
    new = [index for index in range(len(other)) if index not in images]
    pairs = Counter(
        (kernel.name, other[image].name)
        for kernel, image in zip(plain, images, strict=True)
        if image is not None
    )
    split = [
        (kernel.name, other[index].name)
        for kernel, image in zip(plain, images, strict=True)
        for index in new
        if _is_part(other[index], kernel, None if image is None else other[image])
    ]
    return Comparison(pairs, Counter(other[index].name for index in new), tuple(split))


def _image(
    kernel: Kernel, other: Sequence[Kernel], of_plain: frozenset[str], taken: Container[int | None]
) -> int | None:
    def likeness(index: int) -> tuple[int, int, int, int, bool]:
        candidate = other[index]
        return (
            len(kernel.stored & candidate.stored),
            -len((candidate.stored & of_plain) - kernel.stored),
            len(kernel.origins & candidate.origins),
            -len(candidate.origins - kernel.origins),
            index not in taken,  # of equal ones each is the image of one
        )

    best = max(range(len(other)), key=likeness, default=None)
    if best is None or not (
        kernel.stored & other[best].stored or kernel.origins & other[best].origins
    ):
        return None
    return best


def _is_part(added: Kernel, plain: Kernel, image: Kernel | None) -> bool:
    kept = frozenset() if image is None else image.origins
    return bool(added.stored & (plain.origins - kept))
