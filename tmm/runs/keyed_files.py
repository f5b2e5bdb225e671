"""The HDF5 files of a storage.

Each key has a group with the float64 datasets ``keys`` (its steps) and ``values``. The path of the
group is the key; parts of it that HDF5 could not hold as they are get encoded. A file by step has
a group per step instead, whose ``keys`` are texts. The attribute ``position`` keeps the order.
Files without the attribute ``tmm_form`` are of torch-module-monitor itself: by key, not encoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
import torch

from tmm.core.atomic_file import replacing

FileName: TypeAlias = str | os.PathLike[str]
Table: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[np.float64]]
"""Keys and values of a group, of one length."""

_FORM, _POSITION = "tmm_form", "position"
_BY_KEY, _BY_STEP, _FOREIGN = "condensed", "steps", ""
_NO_NAMES = ("", ".")  # HDF5 skips them in a path
_DATASETS = ("keys", "values")  # beside the groups of longer keys
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # HDF5 stops at a NUL, and UTF-8 has no surrogates
_ENCODED = re.compile("%(?:[0-9a-f]{2})*")
_TEXT = h5py.string_dtype("utf-8")


def as_float(value: object) -> float | None:
    """A real number or a tensor of one as a float; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real | Decimal | np.bool_):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):  # too large an integer, a signalling NaN
        return None


def save_by_key(filename: FileName, condensed: Mapping[str, Mapping[int, object]]) -> None:
    """Save key to step to value.

    Raises:
        ValueError: for a key, step or value that cannot be saved.
        OSError: if the file cannot be written.
    """
    tables: dict[str, Table] = {}
    for key, series in condensed.items():
        values = [_saved_value(step, key, value) for step, value in series.items()]
        steps = [_saved_step(step) for step in series]
        for step in steps:
            if as_float(step) != step:
                raise ValueError(
                    f"save_hdf5: the step {step} of {key!r} is no float64, as which steps are"
                    " saved; save with condensed=False"
                )
        tables[_path(key)] = np.array(steps, np.float64), np.array(values, np.float64)
    _save(filename, _BY_KEY, tables)


def save_by_step(filename: FileName, log_dict: Mapping[int, Mapping[str, object]]) -> None:
    """Save step to key to value; raises as `save_by_key` does."""
    tables: dict[str, Table] = {}
    for step, metrics in log_dict.items():
        values = [_saved_value(step, key, value) for key, value in metrics.items()]
        keys = np.array([_encode(key) for key in metrics], dtype=_TEXT)
        tables[str(_saved_step(step))] = keys, np.array(values, np.float64)
    _save(filename, _BY_STEP, tables)


def read_names(filename: FileName) -> list[str]:
    """All keys of a file, or its steps as text, in their order.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a later version wrote it.
    """
    with h5py.File(filename, "r") as file:
        return list(_groups(file))


def read_entry(filename: FileName, name: str) -> Table | None:
    """What a file holds of one of its names; None if nothing. Raises as `read_names` does."""
    with h5py.File(filename, "r") as file:
        form = _form(file)
        path = _path(name) if form == _BY_KEY else name
        if any(part in _NO_NAMES or _NO_TEXT.search(part) for part in path.split("/")):
            return None
        group = file.get(path)
        return _read(group, form) if _is_entry(group) else None


def load(filename: FileName) -> dict[Any, dict[Any, float]]:
    """All that a file holds, as it was given to be saved. Raises as `read_names` does."""
    loaded: dict[Any, dict[Any, float]] = {}
    with h5py.File(filename, "r") as file:
        form = _form(file)
        for name, group in _groups(file).items():
            keys, values = _read(group, form)
            if form == _BY_STEP:
                loaded[_step(name)] = dict(zip(keys, values.tolist(), strict=True))
            else:
                steps = (_whole(step) for step in keys.tolist())
                loaded[name] = dict(zip(steps, values.tolist(), strict=True))
    return loaded


# Values and steps


def _saved_value(step: int, key: object, value: object) -> float:
    where = f"save_hdf5: {key!r} of step {step}"
    if not isinstance(key, str):
        raise ValueError(f"{where} cannot be saved: the key is not text; log it under str(key)")
    if isinstance(value, list):
        raise ValueError(f"{where} was not aggregated yet; call aggregate_step({step}) first")
    number = as_float(value)
    if number is None:
        raise ValueError(
            f"{where} cannot be saved: {value!r} is not one real number; replace or delete it"
        )
    return number


def _saved_step(step: object) -> int | float:
    if isinstance(step, Integral):
        return int(step)
    number = as_float(step)
    if number is None or number != step:
        raise ValueError(f"save_hdf5: the step {step!r} cannot be saved; use an integer")
    return _whole(number)


def _whole(step: float) -> int | float:
    return int(step) if step.is_integer() else step


def _step(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdecimal() else float(text)


# Names


def _encode(text: str, but: tuple[str, ...] = ()) -> str:
    if text not in but and not _NO_TEXT.search(text) and not _ENCODED.fullmatch(text):
        return text
    return "%" + text.encode("utf-8", "surrogatepass").hex()


def _decode(text: str) -> str:
    if not _ENCODED.fullmatch(text):
        return text
    return bytes.fromhex(text[1:]).decode("utf-8", "surrogatepass")


def _path(key: str) -> str:
    first, *rest = key.split("/")
    inner = (_encode(part, _NO_NAMES + _DATASETS) for part in rest)
    return "/".join([_encode(first, _NO_NAMES), *inner])


def _name(path: str, form: str) -> str:
    return "/".join(map(_decode, path.split("/"))) if form == _BY_KEY else path


# Files


def _save(filename: FileName, form: str, tables: Mapping[str, Table]) -> None:
    target = Path(os.path.realpath(filename))  # a link stays one
    with replacing(target) as temporary, h5py.File(temporary, "w") as file:
        file.attrs[_FORM] = form
        for position, (path, (keys, values)) in enumerate(tables.items()):
            group = file.require_group(path)
            group.attrs[_POSITION] = position
            group.create_dataset("keys", data=keys)
            group.create_dataset("values", data=values)


def _form(file: Any) -> str:
    form = str(file.attrs.get(_FORM, _FOREIGN))
    if form not in (_BY_KEY, _BY_STEP, _FOREIGN):
        raise ValueError(f"{file.filename} has the form {form!r}, which a later tmm wrote")
    return form


def _groups(file: Any) -> dict[str, Any]:
    """Name to group, in the order in which they were saved."""
    form = _form(file)
    found: list[tuple[int, str, Any]] = []
    waiting = [("", file)]
    while waiting:
        folder, parent = waiting.pop()
        for name in parent:
            group = parent[name]
            if not isinstance(group, h5py.Group):
                continue
            waiting.append((f"{folder}{name}/", group))
            if _is_entry(group):
                position = int(group.attrs.get(_POSITION, 0))
                found.append((position, _name(folder + name, form), group))
    found.sort(key=lambda item: item[:2])
    return {name: group for _, name, group in found}


def _is_entry(group: Any) -> bool:
    """Whether it is a group that holds a table, and not only groups of longer keys."""
    if not isinstance(group, h5py.Group):
        return False
    return all(isinstance(group.get(name), h5py.Dataset) for name in _DATASETS)


def _read(group: Any, form: str) -> Table:
    keys, values = group["keys"], group["values"][()]
    if form == _BY_STEP:
        return np.array([_decode(key) for key in keys.asstr()[()]], dtype=object), values
    return keys[()], values
