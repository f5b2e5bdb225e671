"""What was logged, by step and key."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from tmm.kernels.dense import packed_dtype
from tmm.runs import keyed_files as files
from tmm.runs.keyed_files import FileName, as_float
from tmm.runtime.aggregate import join

AggregationFunction: TypeAlias = Callable[[Any], object]
"""Takes all elements logged of a key, or the list of its numbers; gives one number, or several by
suffix."""

_FLOAT_BYTES = sys.getsizeof(0.0)


class StorageManager:
    """Holds ``log_dict``: step to key to value, or a list of values until they are aggregated.

    ``aggregation_fns`` maps keys to the functions that aggregate them, in all steps.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self.log_dict: dict[int, dict[str, Any]] = {}
        self.aggregation_fns: dict[str, AggregationFunction] = {}
        self.logger = logger

    def create_step_entry(self, step: int) -> None:
        """Start ``step`` with nothing logged, whatever it held."""
        self.log_dict[step] = {}

    def has_step(self, step: int) -> bool:
        """Whether anything was logged at ``step``, or an entry created."""
        return step in self.log_dict

    def get_step_metrics(self, step: int) -> dict[str, Any]:
        """Key to value of one step; empty for a step that is not there."""
        return self.log_dict.get(step, {})

    def get_all_metrics(self) -> dict[int, dict[str, Any]]:
        """Step to the metrics of that step."""
        return self.log_dict

    def load_metrics(self, log_dict: dict[int, dict[str, Any]]) -> None:
        """Take over ``log_dict``.

        Raises:
            ValueError: if there is something logged already.
        """
        if self.log_dict:
            raise ValueError("load_metrics: the current log dict is not empty; call clear() first")
        self.log_dict = log_dict

    def clear(self) -> None:
        """Forget what was logged. Aggregation functions stay."""
        self.log_dict = {}

    def log_scalar(
        self,
        step: int,
        key: str,
        value: float | torch.Tensor,
        aggregation_fn: AggregationFunction | None = None,
    ) -> None:
        """Log a number, or a tensor of one element. Several of one step and key make a list.

        Raises:
            ValueError: if ``value`` is not one real number, or the key holds tensors.
        """
        number = value.item() if torch.is_tensor(value) and value.numel() == 1 else value
        if as_float(number) is None:
            raise ValueError(
                f"log_scalar({key!r}): the value {value!r} is not one real number; log_tensor"
                " takes tensors of any shape"
            )
        entry = self.log_dict.setdefault(step, {})
        if key not in entry:
            entry[key] = number
        elif not isinstance(entry[key], list):
            entry[key] = [entry[key], number]
        elif _holds_tensors(entry[key]):
            raise ValueError(
                f"log_scalar({key!r}): the key holds tensors in step {step}; log numbers under"
                " another key"
            )
        else:
            entry[key].append(number)
        self._remember(key, aggregation_fn)

    def log_scalars(
        self,
        step: int,
        values: Mapping[str, float | torch.Tensor],
        aggregation_fn: AggregationFunction | None = None,
    ) -> None:
        """``log_scalar`` for each item.

        Raises:
            ValueError: as ``log_scalar`` does; the items before are logged.
        """
        for key, value in values.items():
            self.log_scalar(step, key, value, aggregation_fn)

    def log_tensor(
        self,
        step: int,
        key: str,
        tensor: torch.Tensor,
        aggregation_fn: AggregationFunction | None = None,
    ) -> None:
        """Log a copy of ``tensor``, on its device. All elements of a step are aggregated together.

        Raises:
            TypeError: if ``tensor`` is not a tensor.
            ValueError: if the key holds numbers.
        """
        if not torch.is_tensor(tensor):
            raise TypeError(
                f"log_tensor({key!r}): {tensor!r} is not a tensor; log_scalar takes numbers"
            )
        copy = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
        held = self.log_dict.setdefault(step, {}).setdefault(key, [])
        if not isinstance(held, list) or (held and not _holds_tensors(held)):
            raise ValueError(
                f"log_tensor({key!r}): the key holds numbers, or was aggregated, in step {step};"
                " log tensors under another key, or before aggregate_step"
            )
        held.append(copy)
        self._remember(key, aggregation_fn)

    def _remember(self, key: str, function: AggregationFunction | None) -> None:
        if function is not None:
            self.aggregation_fns[key] = function

    def aggregate_step(self, step: int) -> None:
        """Turn every value of ``step`` into one float.

        Lists are joined by the key's aggregation function, or else the mean. A function may give
        numbers by suffix, which are appended to the key. Keys without a single element go.

        Raises:
            ValueError: a function fails, or a key has no mean; the step stays as it was.
        """
        entry = self.log_dict.get(step)
        if entry is None:
            return
        numbers: dict[str, float] = {}
        origins: dict[str, str] = {}
        for key, value in entry.items():
            if isinstance(value, list):
                for name, number in self._joined(step, key, value).items():
                    if origins.setdefault(name, key) != key:
                        raise ValueError(
                            f"aggregate_step({step}): {key!r} and {origins[name]!r} both give"
                            f" {name!r}; log one of them under another key"
                        )
                    numbers[name] = number
            elif key not in origins:
                numbers[key] = _number(step, key, value)
        entry.clear()
        entry.update(numbers)
        if self.logger:
            entries = self.log_dict.values()
            size = sum(sys.getsizeof(held) + _FLOAT_BYTES * len(held) for held in entries)
            self.logger.info(
                f"Logged {len(entry)} keys at step {step}. Total size of log data:"
                f" {(size + sys.getsizeof(self.log_dict)) / 1024:.2f} KB"
            )

    def _joined(self, step: int, key: str, values: list[Any]) -> dict[str, float]:
        function = self.aggregation_fns.get(key)
        if not values:
            return {}
        if not _holds_tensors(values):
            numbers = [_number(step, key, value) for value in values]
            parts = [torch.tensor(numbers, dtype=torch.float64, device="cpu")]
            return join(key, "mean" if function is None else lambda _: function(values), parts)
        if function is None and any(part.is_complex() for part in values):
            raise ValueError(
                f"the mean of {key!r} is complex, not a number; log it with an aggregation_fn that"
                " gives a real one"
            )
        device = values[0].device
        if function is None and packed_dtype(device) is not torch.float64:
            device = torch.device("cpu")
        return join(key, function or "mean", [part.to(device) for part in values])

    def condensed_log_dict(self) -> dict[str, dict[int, Any]]:
        """Key to step to value, of all that was logged."""
        condensed: dict[str, dict[int, Any]] = {}
        for step, metrics in self.log_dict.items():
            for key, value in metrics.items():
                condensed.setdefault(key, {})[step] = value
        return condensed

    def save_hdf5(self, filename: FileName, condensed: bool = True) -> None:
        """Save what was logged, by key, or by step where not ``condensed``.

        A file that was there is replaced at the end, or stays as it was.

        Raises:
            ValueError: for a key, step or value that cannot be saved, such as a list that was not
                aggregated.
            OSError: if the file cannot be written.
        """
        if condensed:
            files.save_by_key(filename, self.condensed_log_dict())
        else:
            files.save_by_step(filename, self.log_dict)

    @staticmethod
    def read_hdf5_entry_keys(filename: FileName) -> list[str]:
        """All keys in a file, in their order; of a file by step, the steps as text.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if a later version wrote it.
        """
        return files.read_names(filename)

    @staticmethod
    def read_hdf5_entry(
        filename: FileName, entry_key: str | int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]] | None:
        """Steps and values of a key, or keys and values of a step; None if it is not there.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if a later version wrote it.
        """
        return files.read_entry(filename, str(entry_key))

    @staticmethod
    def load_hdf5(filename: FileName) -> dict[Any, dict[Any, float]]:
        """What ``condensed_log_dict`` gave when the file was saved, or ``log_dict`` of one by step.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if a later version wrote it.
        """
        return files.load(filename)


def _holds_tensors(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], torch.Tensor)


def _number(step: int, key: str, value: object) -> float:
    number = as_float(value)
    if number is None:
        raise ValueError(
            f"aggregate_step({step}): {key!r} holds {value!r}, which is not one real number"
        )
    return number
