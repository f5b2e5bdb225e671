"""What one step has measured: gathered while it runs, evaluated when somebody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from tmm.layout import Event, KeyInfo, StepRecord, Table
from tmm.metrics import Aggregate, FloatArray, Reduction, finalize, merge
from tmm.runtime.binding import Binding, KeyRegistry
from tmm.runtime.eager import apply_function
from tmm.runtime.joining import join


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A tensor on its way to the host; reading it waits for that, making it does not."""

    tensor: torch.Tensor
    ready: torch.Event | None

    def read(self) -> torch.Tensor:
        """The tensor in host memory."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tensor


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Start to copy ``tensor`` to pinned host memory, in stream order and without waiting."""
    if tensor.device.type == "cpu":
        return HostCopy(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    host.copy_(tensor, non_blocking=True)
    ready = torch.Event(device=tensor.device)
    ready.record(torch.accelerator.current_stream(tensor.device))
    return HostCopy(host, ready)


class StepCollector:
    """Gathers what arrives during one step and turns it into a ``StepRecord``, once.

    ``add`` and ``log`` cost the training thread a list entry. ``record`` may be called from any
    thread after the step has ended.
    """

    def __init__(self, step: int, registry: KeyRegistry, *, monitored: bool) -> None:
        self.step = step
        self.monitored = monitored
        self.registry = registry
        self.events: tuple[Event, ...] = ()
        self.failed = False
        self.ran_forward = False
        self.expects_forward = monitored
        self.has_parameters = False
        self.has_gradients = False
        self.has_gradients_before_clip = False
        self.has_watched_gradients = False
        self.skipped: list[HostCopy] = []
        self._arrivals: list[tuple[Binding, list[HostCopy], Callable[[], bool] | None]] = []
        self._logged: dict[str, tuple[Aggregate, list[HostCopy]]] = {}
        self._record: StepRecord | None = None
        self._lock = threading.Lock()

    def add(
        self,
        binding: Binding,
        outputs: Sequence[torch.Tensor],
        *,
        unless: torch.Tensor | Callable[[], bool] | None = None,
    ) -> None:
        """Take the extra outputs of one call of a graph.

        They do not count if ``unless``, one element or a test, holds when the step is evaluated.
        """
        # What leaves a reentrant checkpoint requires a gradient, even a row. Others are kept as
        # they are: autograd adds later gradients in place to one that nobody else refers to.
        outputs = [output.detach() if output.requires_grad else output for output in outputs]
        arrived = [copy_to_host(output) for output in outputs]
        for whole in binding.whole:
            if not whole.reduction.trace:
                output = outputs[whole.output]
                tensors = output.unbind() if whole.is_pair else (output,)
                arrived[whole.output] = copy_to_host(apply_function(whole.reduction, *tensors))
        if isinstance(unless, torch.Tensor):
            unless = partial(_is_nonzero, copy_to_host(unless.detach().clone()))
        self._arrivals.append((binding, arrived, unless))

    def log(self, key: str, values: torch.Tensor, aggregate: Aggregate) -> None:
        """Take values that the user logs; all values of a key in a step are joined."""
        copied = copy_to_host(values.detach().reshape(-1).clone())
        self._logged.setdefault(key, (aggregate, []))[1].append(copied)

    def take_logged(self, other: StepCollector) -> None:
        """Take what was logged in ``other``, of the same step, which is given up."""
        for key, (aggregate, copies) in other._logged.items():
            self._logged.setdefault(key, (aggregate, []))[1].extend(copies)

    def was_skipped(self) -> bool:
        """Whether an optimizer skipped its step; known once the step is over."""
        return any(map(_is_nonzero, self.skipped))

    @property
    def holds_logged(self) -> bool:
        """Whether anything was logged by hand."""
        return bool(self._logged)

    @property
    def holds_values(self) -> bool:
        """Whether anything arrived."""
        return bool(self._arrivals or self._logged)

    @property
    def is_on_host(self) -> bool:
        """Whether everything can be read without waiting for an accelerator."""
        copies = [c for _, arrived, _ in self._arrivals for c in arrived]
        copies += [c for _, logged in self._logged.values() for c in logged]
        return all(copy.ready is None for copy in copies)

    def record(self) -> StepRecord:
        """Evaluate the step; waits for copies that are still under way.

        Raises ``ValueError`` for a user's aggregate that fails or does not give a number.
        """
        with self._lock:
            if self._record is None:
                self._record = self._evaluate()
                self._arrivals.clear()
                self._logged.clear()
            return self._record

    def _evaluate(self) -> StepRecord:
        accumulators: dict[Reduction, Accumulator] = {}
        collected: dict[tuple[Reduction, str], list[torch.Tensor]] = {}
        for binding, arrived, unless in self._arrivals:
            if unless is not None and unless():
                continue
            tensors = [copy.read() for copy in arrived]
            for group in binding.groups:
                packed = tensors[group.output].numpy().astype(np.float64, copy=False)
                accumulator = accumulators.setdefault(group.reduction, Accumulator(group.reduction))
                accumulator.add(group.sites, group.rows(packed))
            for whole in binding.whole:
                reduction, values = whole.reduction, tensors[whole.output]
                if reduction.collects_values:
                    collected.setdefault((reduction, whole.site), []).append(values)
                else:
                    row = values.numpy().astype(np.float64)[None]
                    accumulators.setdefault(reduction, Accumulator(reduction)).add(
                        (whole.site,), row
                    )

        scalars: list[Table] = []
        histograms: list[Table] = []
        for accumulator in accumulators.values():
            table = accumulator.table(self.registry)
            (histograms if accumulator.reduction.is_histogram else scalars).append(table)
        extra: dict[str, tuple[KeyInfo, float]] = {}
        for (reduction, site), parts in collected.items():
            info = self.registry.infos(reduction, (site,))[0]
            extra.update(_joined(info, reduction.aggregate, parts))
        logged: dict[str, tuple[KeyInfo, float]] = {}
        for key, (aggregate, copies) in self._logged.items():
            name = aggregate if isinstance(aggregate, str) else "function"
            parts = [copy.read() for copy in copies]
            logged.update(_joined(self.registry.logged(key, name), aggregate, parts))
        recorded = {info.key for table in scalars for info in table.infos} | extra.keys()
        if clash := recorded & logged.keys():
            raise ValueError(
                f"{min(clash)!r} was recorded by the model and logged by hand in step {self.step};"
                " log it under another name"
            )
        scalars.append(_table([*extra.values(), *logged.values()]))
        return StepRecord(
            self.step,
            tuple(table for table in scalars if table.infos),
            tuple(table for table in histograms if table.infos),
            self.events,
        )


class Accumulator:
    """Rows of one reduction, merged by site."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self._sites: tuple[str, ...] = ()
        self._rows: FloatArray = np.empty((0, reduction.width))

    def add(self, sites: tuple[str, ...], rows: FloatArray) -> None:
        """Merge ``rows``, shape ``(sites, width)``, into those of the same sites."""
        if not self._sites:
            self._sites, self._rows = sites, rows
        elif sites == self._sites:
            self._rows = merge(self.reduction, self._rows, rows)
        else:
            index = {site: i for i, site in enumerate(self._sites)}
            known = [i for i, site in enumerate(sites) if site in index]
            targets = [index[sites[i]] for i in known]
            new = [i for i, site in enumerate(sites) if site not in index]
            self._rows[targets] = merge(self.reduction, self._rows[targets], rows[known])
            self._rows = np.concatenate([self._rows, rows[new]])
            self._sites += tuple(sites[i] for i in new)

    def table(self, registry: KeyRegistry) -> Table:
        """Values of the metrics of each site that had any elements."""
        measured = self._rows[:, 0] > 0
        sites, rows = self._sites, self._rows
        if not measured.all():
            sites = tuple(site for site, there in zip(sites, measured, strict=True) if there)
            rows = rows[measured]
        values = finalize(self.reduction, rows)
        if not self.reduction.is_histogram:
            values = values.reshape(-1)
        return Table(registry.infos(self.reduction, sites), values)


def _is_nonzero(copy: HostCopy) -> bool:
    return bool(copy.read().item() != 0)


def _joined(
    info: KeyInfo, aggregate: Aggregate, values: list[torch.Tensor]
) -> dict[str, tuple[KeyInfo, float]]:
    numbers = join(info.key, aggregate, values)
    return {key: (replace(info, key=key), number) for key, number in numbers.items()}


def _table(items: list[tuple[KeyInfo, float]]) -> Table:
    return Table(tuple(info for info, _ in items), np.array([value for _, value in items]))
