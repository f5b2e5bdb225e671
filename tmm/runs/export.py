"""Exports the numbers of a run to files that other programs read."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from tmm.core.atomic_file import replacing
from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.runs.recorded_run import Run
from tmm.runs.text_values import csv_cell, plain
from tmm.runtime.store.run_file import INFO_NAME

FileName: TypeAlias = str | os.PathLike[str]

_GROUP_ROWS = 1 << 20  # of parquet: 20 MB in memory
_SEGMENT = re.compile(r"metrics-\d+\.h5")
_OPERATORS = re.compile(r"[\\^$*+?()\[\]|]")  # of regular expressions


def export_run(
    run: Run, path: FileName, format: str | None = None, pattern: str | None = None
) -> int:
    """Write the numbers of ``run`` to ``path``; return how many rows there are.

    ``format`` is one of the following, by the suffix of ``path`` where it is None; ``pattern``
    selects keys as `Run.keys` does. Histograms are left out; what was not measured has no row.

    ==================  ==========================================================================
    ``csv``             ``step,key,value`` in UTF-8, a row per number, by key and then by step;
                        ``nan``, ``inf`` and ``-inf``; the numbers read back exactly; an
                        apostrophe comes before a key that begins with one, or that a
                        spreadsheet would take for a formula
    ``jsonl``           an object per step, ``{"step": n, key: value, ...}``; JSON has no such
                        numbers: they are the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``
    ``parquet``         the columns and rows of ``csv``: int64, dictionary of strings, double;
                        needs pyarrow
    ``hdf5``, ``h5``    a group per key, for `tmm.StorageManager.load_hdf5`; torch-module-monitor
                        reads its entries, too
    ==================  ==========================================================================

    A run that is still recorded is exported up to the step at which this starts. A file that was
    there is replaced at the end, or stays as it was.

    Raises ValueError for an unknown format, a pattern that matches nothing, keys and steps that
    the format cannot hold, a file of the run itself, and where pyarrow is missing; OSError if
    the file cannot be written.
    """
    write = _writer(path, format)
    target = Path(os.path.realpath(path))  # a link stays one
    _check_target(run, target)
    numbers = _Numbers(run, tuple(_keys(run, pattern)), run.steps)
    with replacing(target) as temporary:
        rows = write(numbers, temporary)
        if not rows and pattern is not None:
            raise ValueError(f"pattern {pattern!r} matches no numbers; histograms are left out")
    return rows


# What is exported, and to where


@dataclass(frozen=True)
class _Numbers:
    """The series of ``keys`` at ``steps``, read when asked for."""

    run: Run
    keys: tuple[str, ...]
    steps: StepArray

    def series(self) -> Iterator[tuple[str, StepArray, FloatArray]]:
        """Each key with its steps and values, shape (n,); those without any are left out."""
        for key in self.keys:
            steps, values = self.of(key)
            if len(steps):
                yield key, steps, values

    def of(self, key: str) -> tuple[StepArray, FloatArray]:
        """Steps and values of one key, shape (n,); none of a histogram."""
        try:
            steps, values = self.run.series(key)
        except ValueError:  # a number in one segment, a histogram in another; or a damaged file
            found = [(step, self.run.at(step).get(key)) for step in self.steps.tolist()]
            pairs = [(step, value) for step, value in found if isinstance(value, float)]
            steps = np.array([step for step, _ in pairs], dtype=np.int64)
            values = np.array([value for _, value in pairs], dtype=np.float64)
        chosen = np.isin(steps, self.steps) if values.ndim == 1 else np.zeros(len(steps), np.bool_)
        return steps[chosen], values[chosen]

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each step with its values by key; those without any are left out."""
        chosen = set(self.keys)
        for step in self.steps.tolist():
            found = self.run.at(step).items()
            numbers = ((key, value) for key, value in found if isinstance(value, float))
            values = {key: value for key, value in numbers if key in chosen}
            if values:
                yield step, values

    def check_text(self, name: str) -> None:
        """Raise ValueError for a key that is no Unicode text, as which ``name`` holds keys."""
        for key in self.keys:
            try:
                key.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the key {key!r} is no Unicode text, as which {name} holds keys; export as"
                    " hdf5, or leave it out by pattern= (--key of `tmm runs export`)"
                ) from error


def _keys(run: Run, pattern: str | None) -> list[str]:
    keys = run.keys(pattern)
    if keys or pattern is None:
        return keys
    known = run.keys()
    words = _OPERATORS.sub("", pattern).replace(".", " ").strip()
    near = get_close_matches(words, known, cutoff=0.0)
    inside = any(re.search(pattern, key) for key in known)
    hint = f"; patterns match from the start of a key: {'.*' + pattern!r} does" if inside else ""
    raise ValueError(f"pattern {pattern!r} matches no key of {run.path}; nearest: {near}{hint}")


def _check_target(run: Run, target: Path) -> None:
    is_of_run = target.name == INFO_NAME or _SEGMENT.fullmatch(target.name)
    if is_of_run and target.parent == Path(os.path.realpath(run.path)):
        raise ValueError(f"{target} is a file of the run itself; export to another one")


# Formats


def _write_csv(numbers: _Numbers, path: Path) -> int:
    numbers.check_text("csv")
    rows = 0
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write("step,key,value\n")
        for key, steps, values in numbers.series():
            text = csv_cell(key)
            pairs = zip(steps.tolist(), values.tolist(), strict=True)
            file.writelines(f"{step},{text},{value!r}\n" for step, value in pairs)
            rows += len(steps)
    return rows


def _write_jsonl(numbers: _Numbers, path: Path) -> int:
    numbers.check_text("jsonl")
    if "step" in numbers.keys:
        raise ValueError(
            "the key 'step' would be the number of the step in jsonl; export as csv, or leave it"
            " out by pattern='(?!step$)'"
        )
    rows = 0
    with path.open("x", encoding="ascii", newline="") as file:
        for step, values in numbers.rows():
            line = {"step": step} | plain(values)
            file.write(json.dumps(line, allow_nan=False) + "\n")
            rows += 1
    return rows


def _write_parquet(numbers: _Numbers, path: Path) -> int:
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError("parquet needs pyarrow: pip install pyarrow, or export as csv") from error
    numbers.check_text("parquet")
    text = arrow.dictionary(arrow.int32(), arrow.string())
    names = ("step", "key", "value")
    fields = zip(names, (arrow.int64(), text, arrow.float64()), strict=True)
    schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in fields])
    rows = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for group in _groups(numbers):
            keys = [key for key, _, _ in group]
            lengths = [len(steps) for _, steps, _ in group]
            places = np.repeat(np.arange(len(keys), dtype=np.int32), lengths)
            columns = [
                arrow.array(np.concatenate([steps for _, steps, _ in group])),
                arrow.DictionaryArray.from_arrays(places, arrow.array(keys, arrow.string())),
                arrow.array(np.concatenate([values for _, _, values in group])),
            ]
            table = arrow.Table.from_arrays(columns, schema=schema)
            writer.write_table(table, row_group_size=_GROUP_ROWS)
            rows += table.num_rows
    return rows


def _groups(numbers: _Numbers) -> Iterator[list[tuple[str, StepArray, FloatArray]]]:
    """All series, of at least so many rows together as one group has, but for the last."""
    group: list[tuple[str, StepArray, FloatArray]] = []
    rows = 0
    for series in numbers.series():
        group.append(series)
        rows += len(series[1])
        if rows >= _GROUP_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _write_hdf5(numbers: _Numbers, path: Path) -> int:
    from tmm.runs.keyed_files import save_by_key  # imports torch

    by_key = _ByKey(numbers)
    save_by_key(path, by_key)
    return by_key.rows


class _ByKey(Mapping[str, Mapping[int, object]]):
    """Key to step to value, each key read when asked for; ``rows`` are all values together."""

    def __init__(self, numbers: _Numbers) -> None:
        self._numbers = numbers
        lengths: dict[str, int] = {}
        for key, steps, _ in numbers.series():
            with np.errstate(invalid="ignore"):  # 2**63 - 1 becomes 2**63, which is no int64
                inexact = steps[steps.astype(np.float64).astype(np.int64) != steps]
            if len(inexact):
                raise ValueError(
                    f"the step {inexact[0]} of {key!r} is no float64, as which hdf5 holds steps;"
                    " export as csv, jsonl or parquet"
                )
            lengths[key] = len(steps)
        self._keys = tuple(lengths)
        self.rows = sum(lengths.values())

    def __getitem__(self, key: str) -> Mapping[int, object]:
        steps, values = self._numbers.of(key)
        return dict(zip(steps.tolist(), values.tolist(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


_WRITERS: Mapping[str, Callable[[_Numbers, Path], int]] = MappingProxyType(
    {
        "csv": _write_csv,
        "jsonl": _write_jsonl,
        "parquet": _write_parquet,
        "hdf5": _write_hdf5,
        "h5": _write_hdf5,
    }
)


def _writer(path: FileName, name: str | None) -> Callable[[_Numbers, Path], int]:
    found = Path(path).suffix.removeprefix(".") if name is None else name
    if found.lower() not in _WRITERS:
        asked = f"the suffix of {os.fspath(path)!r}" if name is None else f"format {name!r}"
        raise ValueError(f"{asked} is no format of a file; choose format= of {list(_WRITERS)}")
    return _WRITERS[found.lower()]
