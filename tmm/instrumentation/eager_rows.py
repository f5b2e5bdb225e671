"""Rows of tensors outside of graphs: of modules, and of what the program itself shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from tmm.core.families import ATTENTION, VALUE_FAMILY
from tmm.core.metrics import Aggregate, Reduction
from tmm.core.recorded_values import RecordedValues
from tmm.core.records import Measurement, Site
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.handing_over import HandingOver
from tmm.instrumentation.recorder import Recorder
from tmm.instrumentation.untraced import Untraced
from tmm.kernels.ops import summarize_attention
from tmm.kernels.unreadable import why_unreadable
from tmm.passes.graph.sharding import why_unsummed
from tmm.passes.insert_attention import SHOWN
from tmm.runtime.eager_functions import reduce_eagerly
from tmm.runtime.key_binding import Binding
from tmm.spec.ranks import local_part

EagerRow = tuple[Binding, torch.Tensor]


class EagerRows:
    """Measures tensors as the program comes to them.

    ``drops`` tells whether nothing is to be measured now, ``watched`` gives what measures the
    user's own program, where that runs. ``values`` are those that the program records by name.
    """

    def __init__(
        self,
        attribution: Attribution,
        recorder: Recorder,
        handing_over: HandingOver,
        drops: Callable[[], bool],
        watched: Callable[[], Untraced | None],
    ) -> None:
        self.values = RecordedValues()
        self._attribution = attribution
        self._recorder = recorder
        self._handing_over = handing_over
        self._drops = drops
        self._watched = watched

    def measure(self, module: torch.nn.Module, output: object) -> None:
        """Measure what a module gave."""
        for binding, tensor, reduction in self._attribution.select_eagerly(module, output):
            self._add(binding, tensor, reduction)

    def declare(
        self, name: str, value_type: type, aggregate: Aggregate | None, *, any_family: bool = False
    ) -> None:
        """Know of a value that the model records; see ``RecordedValues.declare``."""
        declare = partial(self.values.declare, name, value_type, aggregate, any_family=any_family)
        if (untraced := self._watched()) is not None:
            untraced.do(lambda _: declare())  # what is wrong is said after the pass
        else:
            declare()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self, name: str, tensor: torch.Tensor) -> None:
        """Take a declared value."""
        reduction = self.values.reductions.get(name)
        if reduction is None:
            return  # the declaration was refused
        if reason := why_unreadable(tensor) or why_unsummed(tensor):
            self._attribution.unmeasured[name] = reason
            return
        share = self._attribution.share_of(tensor)
        measurement = Measurement(VALUE_FAMILY, Site(name), reduction, share)
        self._add(self._attribution.bind_eagerly(measurement), tensor.detach(), reduction)

    def show(self, site: Site, tensor: torch.Tensor) -> None:
        """Measure a tensor that the program shows; see ``tmm.instrumentation.show``."""
        for binding, reduction in self._attribution.select_shown(site, tensor):
            self._add(binding, tensor, reduction)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def show_attention(
        self,
        owner: torch.nn.Module | str,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        """Measure an attention that the program shows; see ``tmm.instrumentation.show``."""
        if self._drops():
            return
        (reduction,) = SHOWN.statistics
        family = ATTENTION.of(reduction.metrics[0])

        def rows() -> Iterator[EagerRow]:
            found = summarize_attention(
                *(query.detach(), key.detach(), None if mask is None else mask.detach()),
                *(is_causal, scale, SHOWN.queries, SHOWN.pooled, reduction.metrics[0]),
            )
            for head, row in enumerate(found.unflatten(0, (-1, reduction.width)).unbind()):
                site = self._attribution.shown_site(owner, f".head_{head}")
                share = self._attribution.share_of(query)
                measurement = Measurement(family, site, reduction, share)
                yield self._attribution.bind_eagerly(measurement), row

        self._take(rows)

    def _add(self, binding: Binding, tensor: torch.Tensor, reduction: Reduction) -> None:
        tensor = local_part(tensor)
        is_empty = not tensor.numel()
        if not self._drops() and not (is_empty and reduction.function is not None):
            self._take(lambda: [(binding, reduce_eagerly(tensor, reduction))])

    def _take(self, rows: Callable[[], Iterable[EagerRow]]) -> None:
        if (untraced := self._watched()) is not None:
            untraced.do(lambda current: current.direct.extend(rows()))
        else:
            self._handing_over.attempt(self._add_all, rows)

    def _add_all(self, rows: Callable[[], Iterable[EagerRow]]) -> None:
        for binding, row in rows():
            self._recorder.add(binding, [row])
