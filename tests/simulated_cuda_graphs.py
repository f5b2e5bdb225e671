"""CUDA graphs without a GPU: torch's own manager of recordings, and recordings that are none.

Which program is warmed up, recorded or replayed, and behind which other one, is decided by torch's
``CUDAGraphTreeManager``. A recording here is the program itself on a CPU, whose outputs come to lie
in the same memory with every replay: who still reads those of the last one reads others, and NaN
where a warm-up's memory was given back.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import cudagraph_trees as trees
from torch._inductor.cudagraph_utils import CheckInvariantStatus, WrappedFunction

_MODES = trees.CompilationMode


class SimulatedGraphs:
    """A backend for ``torch.compile``; ``events`` are what became of each call of a graph."""

    compiler_name = "cudagraphs"

    def __init__(self) -> None:
        self.manager = _Manager()
        self.events = self.manager.events
        self.settled = 0
        """How many events there were when a test took note."""

    def count(self, kind: str) -> int:
        """How often something was done: ``warm up``, ``record`` or ``replay``."""
        return sum(event[0] == kind for event in self.events)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = {
            name: functools.partial(self._compile, mode)
            for name, mode in (
                ("fw_compiler", _MODES.FORWARD),
                ("bw_compiler", _MODES.BACKWARD),
                ("inference_compiler", _MODES.INFERENCE),
            )
        }
        return aot_autograd(**compiled)(module, inputs)

    def _compile(self, mode: Any, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        static: list[int] = []
        if mode != _MODES.BACKWARD:
            context = torch._guards.TracingContext.get()
            assert context.fw_metadata is not None
            static = [i for i in context.fw_metadata.static_input_indices if i < len(inputs)]
        known: list[Callable[..., Any]] = []

        def run(given: list[Any]) -> Any:
            inputs = list(given)
            given.clear()
            if known:
                return known[0](inputs)
            added, outputs = self.manager.add_function(
                lambda own: module.forward(*own), inputs, static, None, mode, (), (), (), None
            )
            known.append(added)
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


@contextmanager
def simulated_graphs() -> Iterator[SimulatedGraphs]:
    """The backend, as the one of device 0."""
    graphs = SimulatedGraphs()
    containers = trees.get_obj(trees.local, "tree_manager_containers")
    containers[0] = SimpleNamespace(
        tree_manager=graphs.manager, add_strong_reference=lambda function: None
    )
    try:
        yield graphs
    finally:
        del containers[0]


class _Node:
    """What both kinds of nodes know of the outputs of one run."""

    wrapped_function: WrappedFunction
    id: Any
    outputs_weakrefs: list[Any]
    tensor_weakrefs: list[Any]
    stack_traces: list[None]

    def note(self, inputs: list[Any], outputs: Any) -> None:
        given = {_storage(x) for x in inputs if isinstance(x, torch.Tensor)}
        own = [
            x if isinstance(x, torch.Tensor) and _storage(x) not in given else None for x in outputs
        ]
        self.outputs_weakrefs[:] = [trees.map_to_ref(x) for x in own]
        self.tensor_weakrefs[:] = [None if x is None else trees.TensorWeakRef(x) for x in own]
        self.stack_traces = [None] * len(own)

    def all_outputs_are_dead(self) -> bool:
        return not list(self.path_live_weakrefs())

    def path_live_weakrefs(self) -> Iterator[Any]:
        for node in self._path_from_root:  # type: ignore[attr-defined]
            yield from (ref for ref in node.outputs_weakrefs if trees.is_live(ref))


class _Warmup(_Node, trees.CUDAWarmupNode):
    def __init__(self, function: WrappedFunction, parent: Any, number: Any) -> None:
        self.wrapped_function, self.parent, self.id = function, parent, number
        self.outputs_weakrefs, self.tensor_weakrefs = [], []

    def run(self, inputs: list[Any]) -> Any:
        outputs = self.wrapped_function.model(inputs)
        self.note(inputs, outputs)
        return outputs


class _Recording(_Node, trees.CUDAGraphNode):
    def __init__(
        self, function: WrappedFunction, parent: Any, number: Any, inputs: list[Any]
    ) -> None:
        self.wrapped_function, self.id = function, number
        self._parent = None if parent is None else weakref.ref(parent)
        self.children = defaultdict(list)
        self.outputs_weakrefs, self.tensor_weakrefs = [], []
        self.addresses = {i: inputs[i].data_ptr() for i in function.static_input_idxs}
        self.dead = self._dead_before()
        self.memory: list[Any] = []

    def _dead_before(self) -> set[tuple[Any, int]]:
        before = [] if self.parent is None else self.parent._path_from_root
        return {
            (node.id, place)
            for node in before
            for place, ref in enumerate(node.outputs_weakrefs)
            if ref is not None and not trees.is_live(ref)
        }

    def check_invariants(self, inputs: list[Any]) -> Any:
        status = CheckInvariantStatus.SUCCESS
        if not self.dead <= self._dead_before():
            status = CheckInvariantStatus.ExpectedDeadIndicesBeforeGraphMismatch
        elif any(inputs[i].data_ptr() != address for i, address in self.addresses.items()):
            status = CheckInvariantStatus.StaticInputIdxMismatch
        return status, lambda: str(status)

    def run(self, inputs: list[Any]) -> Any:
        outputs = list(self.wrapped_function.model(inputs))
        given = {_storage(x) for x in inputs if isinstance(x, torch.Tensor)}
        self.memory = self.memory or [None] * len(outputs)
        seen: dict[int, int] = {}
        for place, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor) or _storage(output) in given:
                continue
            first = seen.setdefault(_storage(output), place)
            if first == place:
                raw = torch.empty(0, dtype=torch.uint8).set_(output.untyped_storage())
                if self.memory[place] is None:
                    self.memory[place] = torch.empty_like(raw)
                self.memory[place].copy_(raw)
            # The same memory, and a storage of its own: whether that lives is looked at.
            storage = torch.from_numpy(self.memory[first].numpy()).untyped_storage()
            again = torch.empty(0, dtype=output.dtype)
            again.set_(storage, output.storage_offset(), output.shape, output.stride())
            outputs[place] = again
        self.note(inputs, outputs)
        return outputs

    def clear_path_state(self) -> None:
        pass


class _Manager(trees.CUDAGraphTreeManager):
    """Decides as torch's does; what needs a device is left out."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int | None]] = []
        self.roots = defaultdict(list)
        self.ids_to_funcs, self.ids_to_stack_traces = {}, {}
        self.id_to_mode, self.id_to_compile_id = {}, {}
        self.warmed_up_functions, self.warned_functions = trees.OrderedSet(), trees.OrderedSet()
        self.warned_mutation = trees.OrderedSet()
        self.stream = self.cuda_graphs_thread_pool = None  # type: ignore[assignment]
        self.graph = object()  # type: ignore[assignment]
        self.graph_counter, self.func_counter = itertools.count(), itertools.count()
        self.warmup_node_counter = itertools.count(-1, -1)
        self.non_cudagraph_managed_mutation_hint = defaultdict(dict)
        self.num_rerecord = defaultdict(lambda: defaultdict(int))
        self.path_state = trees.ExecutionState.NONE
        self.device_index = 0
        self._current_node = None
        self.current_gen = -1
        self.debug_fail_counter = self.debug_checkpointing_counter = 0
        self.running_forwards_with_pending_backwards = False
        self.mode = None
        self.disable_invalidate_aliases = False

    def _note(self, kind: str, function_id: Any) -> None:
        behind = self.current_node
        parent = None if behind is None else behind.wrapped_function.id.id
        self.events.append((kind, function_id.id, parent))

    def run_eager(self, new_inputs: list[Any], function_id: Any) -> Any:
        self._note("warm up", function_id)
        self.warmed_up_functions.add(function_id)
        function = self.ids_to_funcs[function_id]
        self.current_node = node = _Warmup(function, self.current_node, self.new_warmup_node_id())
        self.path_state = trees.ExecutionState.WARMUP
        self.update_generation()
        return node.run(new_inputs)

    def record_function(self, new_inputs: list[Any], function_id: Any) -> Any:
        self._note("record", function_id)
        function, parent = self.ids_to_funcs[function_id], self.current_node
        node = _Recording(function, parent, self.new_graph_id(), new_inputs)
        if parent is None:
            self.roots[function_id].append(node)
        else:
            parent.add_child(function_id, node)  # type: ignore[union-attr]
        self.current_node = node
        self.path_state = trees.ExecutionState.RECORDING
        self.update_generation()
        return node.run(new_inputs)

    def execute_node(self, node: Any, new_inputs: list[Any]) -> Any:
        self._note("replay", node.wrapped_function.id)
        return super().execute_node(node, new_inputs)

    def apply_checkpoint_execution_state_in_allocator(self) -> None:
        self.debug_checkpointing_counter += 1

    def dealloc_current_path_weakrefs(self) -> None:
        assert self.current_node is not None
        for node in self.current_node._path_from_root:
            for reference in node.tensor_weakrefs:
                tensor = None if reference is None else reference()
                if tensor is not None:
                    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    raw.fill_(255)  # NaN


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
