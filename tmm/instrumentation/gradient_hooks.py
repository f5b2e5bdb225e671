"""Gradients of activations: as rows that a graph makes of them, and by hooks of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tmm.core.autograd import Node, goes_on_to, is_in_autograd_function, nearest_leaf
from tmm.core.metrics import Reduction
from tmm.core.torch_private import is_batched
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.handing_over import HandingOver
from tmm.instrumentation.measured_graph import MeasuredGraph
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.recorder import GradientSink, Recorder
from tmm.kernels.dense import packed_dtype
from tmm.passes.findings import RowInput
from tmm.passes.insert_gradient_probes import WITHOUT_GRADIENT
from tmm.passes.metrics.gradient_probe import part_of_gradient, placements_of_gradient
from tmm.passes.metrics.gradient_rows import FAMILY as GRADIENT
from tmm.runtime.eager_functions import reduce_eagerly
from tmm.runtime.key_binding import Binding

_REPEATED = (
    "it runs inside of a reentrant checkpoint, without gradients, and is repeated for the backward"
    " pass: use_reentrant=False has them"
)


class GradientHooks:
    """Has gradients of activations measured when they come.

    ``drops`` tells whether those of the pass that is running are not to be.
    """

    def __init__(
        self,
        attribution: Attribution,
        recorder: Recorder,
        handing_over: HandingOver,
        drops: Callable[[], bool],
    ) -> None:
        self._attribution = attribution
        self._recorder = recorder
        self._handing_over = handing_over
        self._drops = drops

    def rows(
        self,
        graph: MeasuredGraph,
        inputs: Sequence[object],
        wanted: RowInput,
        frames: Sequence[torch.nn.Module],
        *,
        is_recorded: bool,
    ) -> torch.Tensor:
        """An extra input of one call of ``graph``; the gradient that it gets holds rows."""
        dtype, device = packed_dtype(wanted.device), wanted.device
        rows = torch.zeros(wanted.length, dtype=dtype, device=device)
        if (factor := self._recorder.gradient_factor(device)) is not None:
            rows += factor
        rows.requires_grad_()
        if not is_recorded:
            return rows
        binding = self._attribution.bind(graph, wanted.layout, inputs, frames)
        sink = self._sink()
        if binding is not None and sink is not None and torch.is_grad_enabled():
            rows.register_hook(partial(self._take, sink, binding))
        return rows

    def probe(self, module: torch.nn.Module, output: object) -> None:
        """Measure the gradients of what a module gave outside of graphs."""
        sink = self._sink()
        if sink is None:
            return
        selected = self._attribution.select_eagerly(module, output, GRADIENT)
        is_repeated = not torch.is_grad_enabled() and is_in_autograd_function()
        for binding, tensor, reduction in selected:
            if is_repeated or (tensor.requires_grad and not torch.is_grad_enabled()):
                reason = _REPEATED if is_repeated else WITHOUT_GRADIENT
                for path, given in tensors_in(output):
                    if given is tensor:
                        name = self._attribution.name(module) + path
                        self._attribution.unmeasured[name] = f"gradient: {reason}"
            elif tensor.requires_grad and (tensor.grad_fn is not None or tensor.is_leaf):
                # Asked for first: torch crashes on a hook of a view whose base was written to.
                factor = self._recorder.gradient_factor(tensor.device)
                placements = placements_of_gradient(tensor)
                leaf = None if self._attribution.splits_backward else nearest_leaf(tensor)
                measure = partial(self._reduce, sink, binding, reduction, factor, placements, leaf)
                tensor.register_hook(partial(self._handing_over.attempt, measure))

    def _sink(self) -> GradientSink | None:
        return None if self._drops() else self._recorder.gradient_sink()

    def _take(self, sink: GradientSink, binding: Binding, rows: torch.Tensor | None) -> None:
        if rows is not None:  # else nothing of the graph's outputs had a gradient
            self._handing_over.give(sink, binding, [rows])

    def _reduce(
        self,
        sink: GradientSink,
        binding: Binding,
        reduction: Reduction,
        factor: torch.Tensor | None,
        placements: tuple[Any, ...] | None,
        leaf: Node | None,
        gradient: torch.Tensor | None,
    ) -> None:
        if gradient is None or not goes_on_to(leaf):
            return  # nothing that the loss depends on used the tensor, or it is not backward()
        gradient = part_of_gradient(gradient, placements)
        if reduction.function is not None and not gradient.numel():
            return
        if is_batched(gradient):
            self._handing_over.refuse_batched(binding)
            return
        if factor is not None:
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor
        sink(binding, [reduce_eagerly(gradient, reduction)])
