"""Samples of a run: small arrays and texts, a few per step."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeAlias

import numpy as np

from tmm.core.atomic_file import replacing
from tmm.runtime.store.untrusted import open_file

FOLDER = "samples"
MOST_BYTES = 16 << 20  # of one step; more is no sample
_MOST_READ = 4 * MOST_BYTES  # earlier versions kept as much at each call
_MOST_ENTRIES = 10_000
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may ask for any memory
_KINDS = "biufc"  # of arrays of numbers

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Sample: TypeAlias = str | _Array


def write_samples(run: Path, step: int, samples: Mapping[str, object]) -> None:
    """Keep the samples of a step, in place of earlier ones of the same names.

    Raises:
        ValueError: for a name that is not text, or samples that are too large together.
        TypeError: for what is neither text nor an array of numbers.
        OSError: if they cannot be written.
    """
    arrays = dict(_entry(name, value) for name, value in samples.items())
    path = _path(run, step)
    known = _read(path) if path.exists() else {}
    size = sum(array.nbytes for array in (known | arrays).values())
    if size > MOST_BYTES:
        raise ValueError(
            f"log_samples({step}): the samples have {size / 1e6:.0f} MB; at most"
            f" {MOST_BYTES >> 20} MiB of a step are kept: log a part of them"
        )
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **(known | arrays))


def read_samples(run: Path, step: int) -> dict[str, Sample]:
    """The samples of a step by name: texts and arrays.

    Raises:
        KeyError: if the step has none; names the steps that have some.
        ValueError: if the file is damaged, or no sample's.
        OSError: if it cannot be read.
    """
    path = _path(run, step)
    if not path.exists():
        raise KeyError(f"step {step} has no samples; steps that have some: {sample_steps(run)}")
    try:
        return dict(_sample(name, array) for name, array in _read(path).items())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not readable as samples: {error}") from error


def sample_steps(run: Path) -> list[int]:
    """The steps that have samples."""
    found = (re.fullmatch(r"step-(\d+)\.npz", path.name) for path in (run / FOLDER).glob("*.npz"))
    return sorted(int(match[1]) for match in found if match)


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.npz"


def _read(path: Path) -> dict[str, _Array]:
    """The arrays in a file, by the names of their entries; raises ValueError and OSError."""
    with open(open_file(path), "rb") as file:
        try:
            return _unpacked(file)
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and numpy report damage under many classes
            raise ValueError(f"{path} is not readable as samples: {error}") from error


def _unpacked(file: IO[bytes]) -> dict[str, _Array]:
    if (packed_size := os.fstat(file.fileno()).st_size) > _MOST_READ:
        raise ValueError(f"it has {packed_size:,} bytes")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)  # no more is unpacked
        if size > _MOST_READ or len(entries) > _MOST_ENTRIES:
            raise ValueError(f"{size:,} bytes in {len(entries):,} entries are no samples")
        found = {}
        for entry in entries:
            if entry.compress_type not in _METHODS:
                raise ValueError(f"it is compressed by method {entry.compress_type}")
            with archive.open(entry) as packed:
                found[entry.filename.removesuffix(".npy")] = _array(packed, entry.file_size)
    return found


def _array(file: IO[bytes], size: int) -> _Array:
    """An array of numbers that the file has all of: its shape alone may ask for any memory."""
    read_header = _HEADERS[np.lib.format.read_magic(file)]
    shape, is_fortran, dtype = read_header(file)
    data = file.read(size)
    if dtype.kind not in _KINDS or np.prod(shape, dtype=object) * dtype.itemsize != len(data):
        raise ValueError(f"an array of {dtype} in the shape {shape} of {len(data):,} bytes")
    array = np.frombuffer(data, dtype=dtype).copy()
    return array.reshape(shape, order="F" if is_fortran else "C")


_HEADERS = MappingProxyType(
    {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
)


# Names of files in an archive: escaped, and with the kind in front.
_TEXT, _ARRAY = "text:", "array:"


def _entry(name: object, value: object) -> tuple[str, _Array]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"log_samples: the name {name!r} is not text, or empty")
    escaped = name.replace("%", "%25").replace("/", "%2F")
    if isinstance(value, str):
        return _TEXT + escaped, np.frombuffer(value.encode("utf-8", "surrogatepass"), np.uint8)
    import torch  # here, as reading needs none

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"log_samples: {name!r} is a {type(value).__name__}; give text, or an array of numbers"
        )
    return _ARRAY + escaped, array


def _sample(entry: str, array: _Array) -> tuple[str, Sample]:
    kind, _, escaped = entry.partition(":")
    name = escaped.replace("%2F", "/").replace("%25", "%")
    if f"{kind}:" == _TEXT:
        return name, array.tobytes().decode("utf-8", "surrogatepass")
    return name, array
