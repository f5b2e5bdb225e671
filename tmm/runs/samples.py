"""Samples of a run: small arrays and texts, a few per step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tmm.runtime.replacing import replacing

FOLDER = "samples"
MOST_BYTES = 16 << 20  # of one step; more is no sample

Sample: TypeAlias = str | np.ndarray[Any, np.dtype[Any]]


def write_samples(run: Path, step: int, samples: Mapping[str, object]) -> None:
    """Keep the samples of a step, in place of earlier ones of the same names.

    Raises:
        ValueError: for a name that is not text, or samples that are too large together.
        TypeError: for what is neither text nor an array of numbers.
        OSError: if they cannot be written.
    """
    arrays = dict(_entry(name, value) for name, value in samples.items())
    size = sum(array.nbytes for array in arrays.values())
    if size > MOST_BYTES:
        raise ValueError(
            f"log_samples({step}): the samples have {size / 1e6:.0f} MB; at most"
            f" {MOST_BYTES >> 20} MiB of a step are kept: log a part of them"
        )
    path = _path(run, step)
    path.parent.mkdir(exist_ok=True)
    known = dict(np.load(path)) if path.exists() else {}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **(known | arrays))


def read_samples(run: Path, step: int) -> dict[str, Sample]:
    """The samples of a step by name: texts and arrays.

    Raises:
        KeyError: if the step has none; names the steps that have some.
    """
    path = _path(run, step)
    if not path.exists():
        raise KeyError(f"step {step} has no samples; steps that have some: {sample_steps(run)}")
    with np.load(path) as file:
        return dict(_sample(name, array) for name, array in file.items())


def sample_steps(run: Path) -> list[int]:
    """The steps that have samples."""
    found = (re.fullmatch(r"step-(\d+)\.npz", path.name) for path in (run / FOLDER).glob("*.npz"))
    return sorted(int(match[1]) for match in found if match)


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.npz"


# Names of files in an archive: escaped, and with the kind in front.
_TEXT, _ARRAY = "text:", "array:"


def _entry(name: object, value: object) -> tuple[str, np.ndarray[Any, np.dtype[Any]]]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"log_samples: the name {name!r} is not text")
    escaped = name.replace("%", "%25").replace("/", "%2F")
    if isinstance(value, str):
        return _TEXT + escaped, np.frombuffer(value.encode("utf-8", "surrogatepass"), np.uint8)
    import torch  # here, as reading needs none

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"log_samples: {name!r} is a {type(value).__name__}; give text, or an array of numbers"
        )
    return _ARRAY + escaped, array


def _sample(entry: str, array: np.ndarray[Any, np.dtype[Any]]) -> tuple[str, Sample]:
    kind, _, escaped = entry.partition(":")
    name = escaped.replace("%2F", "/").replace("%25", "%")
    if f"{kind}:" == _TEXT:
        return name, array.tobytes().decode("utf-8", "surrogatepass")
    return name, array
