"""Numbers as text inside of a page: few bytes, unpacked by the page when they are looked at."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray

_LARGEST = 3.4e38  # of float32, less than its end, so that rounding stays finite
_SMALLEST = float(np.finfo(np.float32).tiny)
_DROPPED_BITS = 10  # of the 23 of a float32's fraction; 4 digits are left


def packed(*parts: npt.NDArray[Any]) -> str:
    """Arrays one after the other, compressed, in base64.

    The bytes of each are sorted by their place in a number, which compresses far better.
    """
    data = b"".join(
        np.ascontiguousarray(part).reshape(-1, 1).view(np.uint8).T.tobytes() for part in parts
    )
    return _text(data)


def packed_json(value: object) -> str:
    """Data in the types of JSON, compressed, in base64."""
    return _text(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def float32(values: FloatArray) -> npt.NDArray[np.float32]:
    """As float32; finite numbers stay finite, and others than zero stay that."""
    clipped = np.clip(values, -_LARGEST, _LARGEST)
    tiny = (clipped != 0) & (np.abs(clipped) < _SMALLEST)
    return np.where(tiny, np.copysign(_SMALLEST, clipped), clipped).astype(np.float32)


def four_digits(values: FloatArray) -> npt.NDArray[np.float32]:
    """As `float32`, rounded to four digits, which compresses better."""
    exact = float32(values)
    half, kept = np.uint32(1 << (_DROPPED_BITS - 1)), np.uint32(2**32 - (1 << _DROPPED_BITS))
    rounded = ((exact.view(np.uint32) + half) & kept).view(np.float32)
    return np.where(np.isnan(exact), exact, rounded)


def _text(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")
