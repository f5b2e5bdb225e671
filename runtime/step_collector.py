"""What one step has measured: gathered while it runs, evaluated when somebody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from tmm.core.metrics import Aggregate, Reduction
from tmm.core.records import ALONE, Event, KeyInfo, StepRecord, Table
from tmm.runtime.aggregate import join
from tmm.runtime.eager_functions import apply_function
from tmm.runtime.host_copies import HostCopies, HostCopy, are_ready
from tmm.runtime.key_binding import Binding, KeyRegistry
from tmm.runtime.key_owners import LOGGED_BY_HAND, LOGGED_FOR_RUN, MEASURED
from tmm.runtime.partials import Logged, Partials, Rows
from tmm.runtime.ranks.protocol import (
    CrossRank,
    Exchange,
    NotJoinedError,
    RanksDisagreeError,
    Turn,
)
from tmm.runtime.ranks.replica_rows import REPLICAS
from tmm.runtime.ranks.wire import exchange_of, of_all_ranks

Copies = tuple[Aggregate, list[HostCopy]]
"""How the values of a key are joined, and the values on their way."""

_LATE_SECONDS = 60.0  # that other ranks may be behind before a step is recorded without them


class _Arrival(NamedTuple):
    """The extra outputs of one call of a graph, and what made them."""

    binding: Binding
    copies: list[HostCopy]
    unless: HostCopy | Callable[[], bool] | None
    source: object

    def counts(self) -> bool:
        """Whether it belongs to the step; waits for the copy that tells."""
        if isinstance(self.unless, HostCopy):
            return not _is_nonzero(self.unless)
        return self.unless is None or not self.unless()

    def partials(self) -> Partials:
        """What the call has measured; waits for copies that are under way."""
        tensors = [copy.read() for copy in self.copies]
        rows: dict[Reduction, list[Rows]] = {}
        values: dict[tuple[Reduction, str], list[torch.Tensor]] = {}
        for group in self.binding.groups:
            packed = tensors[group.output].numpy().astype(np.float64, copy=False)
            rows.setdefault(group.reduction, []).append((group.sites, group.rows(packed)))
        for whole in self.binding.whole:
            output = tensors[whole.output]
            if whole.reduction.collects_values:
                values.setdefault((whole.reduction, whole.site), []).append(output)
            else:
                row = (whole.site,), output.numpy().astype(np.float64)[None]
                rows.setdefault(whole.reduction, []).append(row)
        return Partials(rows, values)


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
        self.raises_clashes = False
        self.ran_forward = False
        self.expects_forward = monitored
        self.has_activation_gradients = False
        self.has_parameters = False
        self.has_gradients = False
        self.has_gradients_before_clip = False
        self.has_watched_gradients = False
        self.has_stepped = False  # an optimizer that is watched
        self.has_trained = False  # such a one had gradients, as far as one can tell
        self.skipped: list[HostCopy] = []
        self._copies = HostCopies()
        self._arrivals: list[_Arrival] = []
        self._logged: dict[str, Copies] = {}
        self._measured: dict[str, Copies] = {}
        self._own: dict[str, Copies] = {}
        self._clashes: list[str] = []
        self._left_out: set[str] = set()
        self._turn: Turn[StepCollector] | None = None
        self._sent: Partials | None = None
        self._record: StepRecord | None = None
        self._lock = threading.Lock()

    def add(
        self,
        binding: Binding,
        outputs: Sequence[torch.Tensor],
        *,
        unless: torch.Tensor | Callable[[], bool] | None = None,
        source: object = None,
    ) -> None:
        """Take the extra outputs of one call of a graph; what it left out has no row in the step.

        They do not count if ``unless``, one element or a test, holds when the step is evaluated, or
        if their ``source`` is left out.
        """
        self._left_out.update(binding.left_out)
        # What leaves a reentrant checkpoint requires a gradient, even a row. Others are kept as
        # they are: autograd adds later gradients in place to one that nobody else refers to.
        outputs = [output.detach() if output.requires_grad else output for output in outputs]
        arrived = [self._copies.copy(output) for output in outputs]
        for whole in binding.whole:
            if not whole.reduction.trace:
                output = outputs[whole.output]
                tensors = output.unbind() if whole.is_pair else (output,)
                applied = apply_function(whole.reduction, *tensors)
                arrived[whole.output] = self._copies.copy(applied)
        if isinstance(unless, torch.Tensor):
            test: HostCopy | Callable[[], bool] | None = self._copies.copy(unless.detach().clone())
        else:
            test = unless
        self._arrivals.append(_Arrival(binding, arrived, test, source))

    def leave_out(self, sources: Collection[object]) -> None:
        """Forget what came from any of ``sources``."""
        self._arrivals = [some for some in self._arrivals if some.source not in sources]

    def log(
        self, key: str, values: torch.Tensor, aggregate: Aggregate, *, of_all_ranks: bool = True
    ) -> None:
        """Take values that the user logs; all values of a key in a step are joined.

        Those of other ranks are not, without ``of_all_ranks``.
        """
        copied = self._copies.copy(values.detach().reshape(-1).clone())
        logged = self._logged if of_all_ranks else self._own
        logged.setdefault(key, (aggregate, []))[1].append(copied)

    def times_logged(self, key: str) -> int:
        """How often a key was logged for this rank alone."""
        return len(self._own[key][1]) if key in self._own else 0

    def add_numbers(self, keys: Sequence[str], values: torch.Tensor, aggregate: Aggregate) -> None:
        """Take numbers that tmm itself measures: one element of ``values`` for each of the keys.

        Nobody changes ``values`` afterwards.
        """
        for key, copied in zip(keys, self._copies.copy(values).elements(), strict=True):
            self._measured.setdefault(key, (aggregate, []))[1].append(copied)

    def note_skipped(self, skipped: torch.Tensor) -> None:
        """An optimizer has stepped, or skipped its step where the element is not zero."""
        self.skipped.append(self._copies.copy(skipped))

    def end(self) -> None:
        """Nothing of the step follows: no copy of it waits for what a device does from now on."""
        self._copies.end()

    def take_logged(self, other: StepCollector) -> None:
        """Take what was logged in ``other``, of the same step, which is given up."""
        for mine, theirs in ((self._logged, other._logged), (self._own, other._own)):
            for key, (aggregate, copies) in theirs.items():
                mine.setdefault(key, (aggregate, []))[1].extend(copies)

    def logged(self, *, is_certain: bool = False) -> StepCollector:
        """A step of what was logged by hand in this one, which is dropped or cannot be evaluated.

        Of a step that waits for other ranks, without what all of them join. With ``is_certain``
        without what a user's function joins, which may fail.
        """
        found = StepCollector(self.step, self.registry, monitored=False)
        found.take_logged(self)
        for key, (aggregate, _) in self._logged.items():
            if self._turn is not None or (is_certain and callable(aggregate)):
                del found._logged[key]
        return found

    def was_skipped(self) -> bool:
        """Whether an optimizer skipped its step; known once the step is over."""
        return any(map(_is_nonzero, self.skipped))

    @property
    def holds_logged(self) -> bool:
        """Whether anything was logged by hand."""
        return bool(self._logged or self._own)

    @property
    def holds_rows(self) -> bool:
        """Whether a graph, or a call outside of graphs, has given rows."""
        return bool(self._arrivals)

    @property
    def holds_values(self) -> bool:
        """Whether anything arrived."""
        return bool(self._arrivals or self._logged or self._measured or self._own)

    @property
    def is_on_host(self) -> bool:
        """Whether everything can be read without waiting for an accelerator or other ranks."""
        return self._turn is None and all(copy.ready is None for copy in self._all_copies())

    @property
    def is_copied(self) -> bool:
        """Whether everything has arrived on the host; waits for nothing."""
        if not self._lock.acquire(blocking=False):
            return False  # another thread evaluates it, and may wait
        try:
            return self._record is not None or are_ready(self._all_copies())
        finally:
            self._lock.release()

    @property
    def is_ready(self) -> bool:
        """Whether the step, which has ended, can be evaluated without waiting."""
        return self.is_copied and (self._turn is None or self._turn.is_over)

    def join_ranks(self, ranks: CrossRank) -> None:
        """Join the step, which has ended, with those of other ranks; waits for nothing."""
        self._turn = ranks.submit(self)

    def contribution(self) -> Exchange | None:
        """What other ranks are to know of the step; None for one that failed."""
        if self.failed:
            return None
        self._sent = self._gathered()
        return exchange_of(self._sent)

    def record(self) -> StepRecord:
        """Evaluate the step; waits for copies that are still under way.

        Raises ``ValueError`` for a user's aggregate that fails or does not give a number.
        """
        with self._lock:
            if self._record is None:
                self._record = self._evaluate()
                self._arrivals.clear()
                self._logged.clear()
                self._measured.clear()
                self._own.clear()
                self.skipped.clear()
                self._copies = HostCopies()
            return self._record

    def _all_copies(self) -> Iterator[HostCopy]:
        for arrival in self._arrivals:
            yield from arrival.copies
            if isinstance(arrival.unless, HostCopy):
                yield arrival.unless
        for logged in (self._logged, self._measured, self._own):
            for _, values in logged.values():
                yield from values
        yield from self.skipped

    def _gathered(self) -> Partials:
        partials = Partials.merged(
            [arrival.partials() for arrival in self._arrivals if arrival.counts()]
        )
        logged = self._claimed(self._measured, MEASURED)
        # That of the run counts, should a key be in both.
        for key in self._own:
            self.registry.owners.claim((key,), LOGGED_FOR_RUN, key)
        logged |= self._claimed(self._logged, LOGGED_BY_HAND)
        return replace(partials, logged=logged, left_out=frozenset(self._left_out))

    def _numbers(
        self, info: KeyInfo, aggregate: Aggregate, values: list[torch.Tensor]
    ) -> dict[str, tuple[KeyInfo, float]]:
        """The number of a key, or those that an aggregate gives instead, with keys of their own."""
        numbers = join(info.key, aggregate, values)
        owner = f"a number that the aggregate of {info.key!r} gives"
        return {
            key: (info if key == info.key else replace(info, key=key), number)
            for key, number in numbers.items()
            if key == info.key or self.registry.owners.claim((key,), owner, key)
        }

    def _claimed(self, logged: Mapping[str, Copies], owner: str) -> Logged:
        """What was logged, without the keys that hold something else."""
        taken = {}
        for key, (aggregate, copies) in logged.items():
            if self.registry.owners.claim((key,), owner, key):
                taken[key] = aggregate, [copy.read() for copy in copies]
            elif self.registry.owners.of(key) not in (LOGGED_FOR_RUN, LOGGED_BY_HAND):
                self._clashes.append(key)
        return taken

    def _alone(self, reason: NotJoinedError) -> Partials:
        """What is left of a step that is not joined, with an event that says so."""
        assert self._turn is not None
        is_whole = isinstance(reason, RanksDisagreeError) or self._turn.contribution() is None
        kind, text = ("gap", "") if is_whole else ("partial", "the rows of this rank alone: ")
        self.events = (*self.events, Event(self.step, kind, f"{text}{reason}"))
        if is_whole or self._sent is None:
            return Partials()
        own = {kind: parts for kind, parts in self._sent.rows.items() if kind != REPLICAS}
        return replace(self._sent, rows=own)

    def _evaluate(self) -> StepRecord:
        if self._turn is None:
            gathered = self._gathered()
        else:
            try:
                joined = self._turn.wait(_LATE_SECONDS)
            except NotJoinedError as error:
                gathered = self._alone(error)
            else:
                assert self._sent is not None
                gathered = of_all_ranks(joined, self._sent, self.registry.collected)
                self.registry.note(gathered.alone, ALONE)
        gathered = gathered.complete()
        scalars, histograms = gathered.tables(self.registry)
        extra: dict[str, tuple[KeyInfo, float]] = {}
        for (reduction, site), tensors in gathered.values.items():
            info = self.registry.infos(reduction, (site,))[0]
            extra.update(self._numbers(info, reduction.aggregate, tensors))
        logged: dict[str, tuple[KeyInfo, float]] = {}
        own = self._claimed(self._own, LOGGED_FOR_RUN)
        for key, (aggregate, tensors) in (gathered.logged | own).items():
            name = aggregate if isinstance(aggregate, str) else "function"
            logged.update(self._numbers(self.registry.logged(key, name), aggregate, tensors))
        if self._clashes and self.raises_clashes:
            raise ValueError(
                f"{min(self._clashes)!r} was recorded by the model and logged by hand in step"
                f" {self.step}; log it under another name"
            )
        if extra or logged:
            scalars.append(_table([*extra.values(), *logged.values()]))
        return StepRecord(
            self.step,
            tuple(table for table in scalars if table.infos),
            tuple(table for table in histograms if table.infos),
            self.events,
        )


def _is_nonzero(copy: HostCopy) -> bool:
    return bool(copy.read().item() != 0)


def _table(items: list[tuple[KeyInfo, float]]) -> Table:
    return Table(tuple(info for info, _ in items), np.array([value for _, value in items]))
