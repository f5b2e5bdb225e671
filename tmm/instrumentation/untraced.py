"""Measures a model that is not compiled, while the user's own program runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tmm.core.autograd import Node, goes_on_to, nearest_leaf
from tmm.core.families import families_of_outputs
from tmm.core.module_names import ModuleTree, display_name
from tmm.core.records import Measurement, Site
from tmm.core.torch_private import current_graph_task_id, queue_callback
from tmm.instrumentation.apart import (
    apart_from_the_program,
    runs_under_modes,
    values_of,
    why_no_values,
)
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.module_calls import ModuleCalls
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.packing import RowPacker, Rows, Wanted
from tmm.instrumentation.uncalled import Uncalled
from tmm.kernels.build import start_compiling
from tmm.kernels.summarize.host import SOURCES as HOST_SOURCES
from tmm.passes.graph.sharding import why_unsummed
from tmm.passes.insert_gradient_probes import NOT_JOINED
from tmm.passes.metrics.gradient_rows import FAMILY as GRADIENT
from tmm.runtime.key_binding import Binding
from tmm.spec.ranks import is_distributed, local_part

if TYPE_CHECKING:
    from tmm.instrumentation.recorder import GradientSink, Recorder

_OUTPUTS = ""
"""Stands for all families that are measured of outputs."""


class Pass:
    """One forward pass: its rows so far, and what takes those of its gradients.

    ``direct`` are rows that were bound by themselves. Nothing is measured after a ``fault``.
    ``is_repeated`` tells that modules ran without gradients, as in a reentrant checkpoint. That of
    a step function holds a pass for each call of a module by the function.
    """

    def __init__(
        self, sink: GradientSink | None, *, is_measured: bool, is_function: bool = False
    ) -> None:
        self.is_measured = is_measured
        self.is_function = is_function
        self.rows: Rows = []
        self.direct: list[tuple[Binding, torch.Tensor]] = []
        self.fault: Exception | None = None
        self.sink = sink
        self.is_running = True
        self.has_gradients = torch.is_grad_enabled()
        self.is_repeated = False
        self.factors: dict[torch.device, torch.Tensor | None] = {}
        self.backward_rows: dict[int, Rows] = {}


class Untraced:
    """Measures modules where the user's own program calls them; nothing is traced.

    What it does to a pass is none of the program's business: its faults come after the pass, and
    modes and transforms that the program runs under do not see it.

    ``ran`` are the modules that were called so far, ``uncalled`` tells of the others.
    ``is_running`` tells whether a pass is under way in this context, ``is_step_function`` that a
    pass may hold its own backward pass.
    """

    def __init__(
        self,
        attribution: Attribution,
        recorder: Recorder,
        is_running: Callable[[], bool],
        *,
        is_step_function: bool,
    ) -> None:
        self.ran: dict[torch.nn.Module, None] = {}
        self._attribution = attribution
        self._recorder = recorder
        self._is_running = is_running
        self._is_step_function = is_step_function
        self._measures_gradients = attribution.plan.spec.measures(GRADIENT)
        self._tree = ModuleTree(attribution.root)
        self._modules: dict[torch.nn.Module, str] = {}
        self._wanted: dict[tuple[torch.nn.Module, str, torch.dtype, str], tuple[Wanted, ...]] = {}
        self._plain: dict[tuple[torch.nn.Module, torch.dtype], tuple[Wanted, ...]] = {}
        self._measured: set[tuple[torch.nn.Module, str, torch.dtype, str]] = set()
        self._packer = RowPacker(attribution.bind_layout)
        self._calls = ModuleCalls(self.leave, self._call if is_step_function else None)
        self._pass: Pass | None = None
        self._repeated: Pass | None = None
        self._has_started = False
        self.uncalled = Uncalled(attribution, self._modules, self.ran)

    @contextmanager
    def forward(self, *, is_measured: bool, is_function: bool) -> Iterator[Pass]:
        """Measure what runs in the block; the rows count if it comes to its end."""
        with apart_from_the_program():
            self._look_around()
        sink = self._recorder.gradient_sink() if self._measures_gradients and is_measured else None
        current = Pass(sink, is_measured=is_measured, is_function=is_function)
        outer, self._pass = self._pass, current
        try:
            with self._calls.shown(tuple(self._modules)):
                yield current
        finally:
            current.is_running = False
            self._pass = outer
        self._finish(current)
        if current.is_repeated and sink is not None:
            self._calls.keep_shown(tuple(self._modules))

    def _finish(self, current: Pass) -> None:
        """A pass has come to its end."""
        if current.is_measured and current.fault is None:
            try:
                with apart_from_the_program():
                    self._hand_over(current)
            except Exception as error:  # the program goes on
                current.fault = error
        if current.is_repeated and current.sink is not None and not current.is_function:
            self._repeated = current

    def _call(
        self,
        module: torch.nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call of a module; one by a step function is a forward pass of its own."""
        function = self._pass
        if function is None or not function.is_function or is_in_backward():
            output = run(*args, **kwargs)
            self.leave(module, output)
            return output
        self._recorder.begin_pass(module, (args, kwargs))
        sink = None if function.sink is None else self._recorder.gradient_sink()
        current = self._pass = Pass(sink, is_measured=function.is_measured)
        try:
            output = run(*args, **kwargs)
            self.leave(module, output)
        finally:
            current.is_running, self._pass = False, function
        self._finish(current)
        function.fault = function.fault or current.fault
        function.is_repeated |= current.is_repeated
        self._recorder.end_pass(output)
        return output

    def rest(self) -> None:
        """Leave the modules alone: the step is over, and what it repeats."""
        if self._repeated is not None:
            self._repeated = None
            self._calls.hide()

    def note_call(self, module: torch.nn.Module) -> None:
        """Know of a call past the model's own forward."""
        if module not in self.ran:
            self._look_around()
            self.ran[module] = None

    def do(self, work: Callable[[Pass], None]) -> None:
        """Do something for the pass that is running, if it is to be measured here."""
        current = self._pass
        if current is None or current.fault is not None or is_repeating():
            return
        try:
            with apart_from_the_program():
                work(current)
        except Exception as error:  # the program goes on
            current.fault = error

    def close(self) -> None:
        """Hold on to no module."""
        self.rest()
        self._calls.forget()
        self._wanted.clear()
        self._plain.clear()
        self._measured.clear()

    # Modules

    def _look_around(self) -> None:
        """Know the modules that the model has now."""
        if not self._has_started:
            self._has_started = True
            if all(parameter.is_cpu for parameter in self._attribution.root.parameters()):
                start_compiling(*HOST_SOURCES)
        if self._pass is not None or not self._tree.has_changed():
            return
        self._attribution.refresh()
        self.close()
        self._modules.clear()
        self._modules.update(
            (module, name)
            for module, name in self._attribution.names.items()
            if self._is_asked_for(display_name(name))
        )

    def _is_asked_for(self, name: str) -> bool:
        plan = self._attribution.plan
        dtypes = (torch.float32, torch.complex64)
        families = *families_of_outputs(), GRADIENT
        return any(plan.select(name, dtype, f) for dtype in dtypes for f in families)

    # Measuring

    def leave(self, module: torch.nn.Module, output: object) -> None:
        """Measure what a module gave back."""
        current = self._pass
        if is_repeating():
            # By a checkpoint: only a reentrant one had no gradients before.
            current = current or self._repeated
            if current is not None and current.sink is not None and module in self._modules:
                self._measure(current, module, output, self._probe)
            return
        if current is None or current.fault is not None or not self._is_running():
            return
        if module not in self.ran:
            if module not in self._modules:
                return
            self.ran[module] = None
        if type(output) is not torch.Tensor or not self._reduce_plainly(current, module, output):
            self._measure(current, module, output, self._reduce)
        if self._measures_gradients:
            if torch.is_grad_enabled():
                self._measure(current, module, output, self._probe)
            else:
                current.is_repeated |= current.has_gradients

    def _reduce_plainly(self, current: Pass, module: torch.nn.Module, output: torch.Tensor) -> bool:
        """What ``_reduce`` does of most outputs, in less time; False if it is not one of them."""
        if runs_under_modes():
            return False  # which would see even that attributes are read
        wanted = self._plain.get((module, output.dtype))
        if wanted is None or output.layout is not torch.strided:
            return False
        if output.is_nested or output.is_meta:
            return False
        try:
            values = output.detach()
            for one in wanted:
                if one.calls is None or values.numel():
                    current.rows.append((one, one.row(values)))
        except Exception as error:  # the program goes on
            current.fault = error
        return True

    def _measure(
        self,
        current: Pass,
        module: torch.nn.Module,
        output: object,
        how: Callable[[Pass, torch.nn.Module, object], None],
    ) -> None:
        if current.fault is not None:
            return
        try:
            with apart_from_the_program():
                how(current, module, output)
        except Exception as error:  # the program goes on
            current.fault = error

    def _reduce(self, current: Pass, module: torch.nn.Module, output: object) -> None:
        for tensor, wanted in self._select(module, output, _OUTPUTS):
            values = values_of(local_part(tensor))
            for one in wanted:
                if one.calls is None or values.numel():
                    current.rows.append((one, one.row(values)))

    def _probe(self, current: Pass, module: torch.nn.Module, output: object) -> None:
        if current.sink is None:
            return
        for tensor, wanted in self._select(module, output, GRADIENT):
            device = tensor.device
            if device not in current.factors:
                current.factors[device] = self._recorder.gradient_factor(device)
            # Of a view whose base was written to, torch makes the node when it is asked for it; it
            # crashes if a hook comes first.
            if tensor.requires_grad and (tensor.grad_fn is not None or tensor.is_leaf):
                factor = current.factors[device]
                leaf = None if self._attribution.splits_backward else nearest_leaf(tensor)
                tensor.register_hook(partial(self._reduce_gradient, current, wanted, factor, leaf))

    def _select(
        self, module: torch.nn.Module, output: object, family: str
    ) -> Iterator[tuple[torch.Tensor, tuple[Wanted, ...]]]:
        """The tensors that are to be measured, and how."""
        for path, tensor in tensors_in(output):
            key = module, path, tensor.dtype, family
            wanted = self._wanted.get(key)
            if wanted is None:
                wanted = self._wanted[key] = self._choose(*key)
            if not wanted:
                continue
            reason = why_no_values(tensor) or why_unsummed(tensor)
            if family == GRADIENT and is_distributed(tensor):
                reason = f"gradient: {NOT_JOINED}"
            if reason:
                self._attribution.unmeasured[self._attribution.name(module) + path] = reason
            else:
                if key not in self._measured:
                    self._measured.add(key)
                    self._attribution.note_eager(self._attribution.name(module))
                if path == "" and family == _OUTPUTS:
                    self._plain[module, tensor.dtype] = wanted
                yield tensor, wanted

    def _choose(
        self, module: torch.nn.Module, path: str, dtype: torch.dtype, family: str
    ) -> tuple[Wanted, ...]:
        site, plan = Site(self._attribution.name(module), path), self._attribution.plan
        return tuple(
            Wanted(Measurement(one, site, reduction))
            for one in (families_of_outputs() if family == _OUTPUTS else (family,))
            for reduction in plan.select(site.module, dtype, one)
        )

    def _reduce_gradient(
        self,
        current: Pass,
        wanted: tuple[Wanted, ...],
        factor: torch.Tensor | None,
        leaf: Node | None,
        gradient: torch.Tensor | None,
    ) -> None:
        """Hook of a tensor."""
        if gradient is None or not goes_on_to(leaf):
            return  # nothing that the loss depends on used the tensor, or it is not backward()
        if current.is_running and not self._is_step_function:
            return  # of what the forward pass itself differentiates, not of the loss
        if runs_under_modes():
            with apart_from_the_program():
                rows = _rows_of_gradient(gradient, wanted, factor)
        else:
            rows = _rows_of_gradient(gradient, wanted, factor)
        task = current_graph_task_id()
        if task not in current.backward_rows:
            current.backward_rows[task] = []
            done = partial(self._hand_over_gradients, current, task)
            queue_callback(done)
        current.backward_rows[task] += rows

    # Handing over

    def _hand_over(self, current: Pass) -> None:
        if current.rows:
            self._recorder.add(*self._packer.pack(current.rows))
        for binding, row in current.direct:
            self._recorder.add(binding, [row])

    def _hand_over_gradients(self, current: Pass, task: int) -> None:
        rows = current.backward_rows.pop(task)
        if rows and current.sink is not None:
            with apart_from_the_program():
                current.sink(*self._packer.pack(rows))


def _rows_of_gradient(
    gradient: torch.Tensor, wanted: tuple[Wanted, ...], factor: torch.Tensor | None
) -> Rows:
    values = values_of(local_part(gradient))
    if factor is not None:
        values = values.to(torch.promote_types(values.dtype, torch.float32)) * factor
    return [(one, one.row(values)) for one in wanted]


def is_in_backward() -> bool:
    """Whether a backward pass is running."""
    return current_graph_task_id() != -1


def is_repeating() -> bool:
    """Whether activation checkpointing repeats a part of a forward pass in the backward pass."""
    return is_in_backward() and torch.is_grad_enabled()
