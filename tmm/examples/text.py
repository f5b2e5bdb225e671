"""Real text that is at hand without a download: the topics of Python's own ``help()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY = 256
"""Number of different tokens: a token is one byte of the text in UTF-8."""


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held back, each a one-dimensional int64 tensor."""

    training: Tensor
    validation: Tensor


def documentation_text() -> str:
    """About 0.5 MB of English: the documentation of Python that ships with CPython.

    Raises:
        RuntimeError: if this distribution of Python left it out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "this Python comes without the module pydoc_data.topics, whose text the demo trains"
            " on; a Python from python.org or conda has it, a distribution may keep it in a"
            " package of its own"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """The tokens of ``text``: its UTF-8 bytes as int64, one-dimensional."""
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()


def decode(tokens: Tensor) -> str:
    """The text of ``tokens``; bytes that are no UTF-8 become replacement characters."""
    return bytes(tokens.tolist()).decode("utf-8", "replace")


def split(tokens: Tensor, validation_fraction: float = 0.1) -> Corpus:
    """Hold back the end of ``tokens``.

    Raises:
        ValueError: if the fraction does not lie between 0 and 1.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction={validation_fraction} does not lie in (0, 1)")
    border = len(tokens) - round(len(tokens) * validation_fraction)
    return Corpus(tokens[:border], tokens[border:])


def batches(
    tokens: Tensor, *, batch_size: int, length: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random passages of ``tokens`` without end, each with the tokens that follow.

    Yields:
        Inputs and targets of shape (batch_size, length); targets are inputs one token later.

    Raises:
        ValueError: if ``tokens`` is shorter than a passage.
    """
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few for passages of length={length}")
    passages = tokens.unfold(0, length + 1, 1)
    while True:
        chosen = torch.randint(len(passages), (batch_size,), generator=generator)
        batch = passages[chosen]
        yield batch[:, :-1], batch[:, 1:]
