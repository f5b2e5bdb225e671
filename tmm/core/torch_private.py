"""The private names of torch that are used, but for those of its compiler: each stands here once.

A new version of torch may move them, and is looked at here, in `dynamo_private` and in
`inductor_private`. All of these are there once torch is imported, in torch 2.11 and newer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch._C._functorch
import torch._functorch.pyfunctorch
import torch._ops
import torch._subclasses.fake_tensor
import torch.distributed
import torch.distributed._functional_collectives
import torch.fx._symbolic_trace
import torch.fx.graph
import torch.fx.graph_module
import torch.utils._device
import torch.utils._python_dispatch
import torch.utils._pytree

# Autograd

current_graph_task_id = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs; -1 outside of one."""

current_autograd_node = torch._C._current_autograd_node
"""The node whose backward is running; None outside of a backward pass."""

will_engine_execute_node = torch._C._will_engine_execute_node
"""Whether the running backward pass reaches a node; RuntimeError under ``torch.autograd.grad``."""

queue_callback = torch.autograd.Variable._execution_engine.queue_callback
"""Calls a function at the end of the running backward pass."""

get_sequence_nr = torch._C._autograd._get_sequence_nr
"""The number that the next operation gives its autograd node."""

unsafe_set_version_counter = torch._C._autograd._unsafe_set_version_counter
"""Sets how often tensors count as written to, after their elements were put back."""

set_grad_enabled = torch._C._set_grad_enabled
"""What Dynamo writes into graphs for ``torch.no_grad`` and its like."""

enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
"""What Dynamo writes into graphs where ``torch.inference_mode`` begins."""

exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
"""What Dynamo writes into graphs where ``torch.inference_mode`` ends."""

# Tensors and operators

AsyncCollectiveTensor = torch.distributed._functional_collectives.AsyncCollectiveTensor
"""What a collective gives: a tensor that whoever reads it waits for."""

wait_tensor = torch.distributed._functional_collectives.wait_tensor
"""Waits for the collective that a tensor comes from, if it does from one."""

FakeTensor = torch._subclasses.fake_tensor.FakeTensor
"""A tensor without elements, as traced graphs have for their values."""

FakeTensorMode = torch._subclasses.fake_tensor.FakeTensorMode
"""The mode that fake tensors are made in."""

OpOverload = torch._ops.OpOverload
"""What dispatch modes are given: an operator such as ``torch.ops.aten.add.Tensor``."""

OpOverloadPacket = torch._ops.OpOverloadPacket
"""All forms of an operator, such as ``torch.ops.aten.add``."""

has_storage = torch._C._has_storage
"""Whether a tensor has memory of its own to tell it by."""

foreach_copy_ = torch._foreach_copy_
"""Copies many tensors in one call."""

attention_math = torch.ops.aten._scaled_dot_product_attention_math
"""The attention that gives its weights, too, with the rounding of the plain kernel."""

nn_functions = torch._C._nn
"""Where functions of ``torch.nn.functional`` that are written in C++ stand."""

tree_flatten = torch.utils._pytree.tree_flatten
"""The leaves of nested containers, and their structure."""

tree_leaves = torch.utils._pytree.tree_leaves
"""The leaves of nested containers."""

tree_map = torch.utils._pytree.tree_map
"""Nested containers with a function of each leaf."""

# Modes

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""A block in which each operation passes through a function of ours, below autograd."""

DispatchModeKey = torch._C._TorchDispatchModeKey
"""Tells the dispatch modes of torch itself apart: tracing, fake tensors, functionalization."""

DeviceContext = torch.utils._device.DeviceContext
"""The function mode of a default device."""

DisableTorchFunction = torch._C.DisableTorchFunction
"""A block without function modes and without ``__torch_function__``."""

get_dispatch_mode = torch._C._get_dispatch_mode
"""The dispatch mode of a key; None if it is not at work."""

len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
"""How many dispatch modes of users are at work."""

len_torch_function_stack = torch._C._len_torch_function_stack
"""How many function modes are at work."""

get_function_stack_at = torch._C._get_function_stack_at
"""A function mode by its depth."""

disable_current_modes = torch.utils._python_dispatch._disable_current_modes
"""A block without dispatch modes."""

get_current_dispatch_mode = torch.utils._python_dispatch._get_current_dispatch_mode
"""The innermost dispatch mode; None if there is none."""

get_current_dispatch_mode_stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack
"""All dispatch modes, the innermost one last."""

pop_mode_temporarily = torch.utils._python_dispatch._pop_mode_temporarily
"""A block without the innermost dispatch mode."""

is_traceable_wrapper_subclass = torch.utils._python_dispatch.is_traceable_wrapper_subclass
"""Whether a tensor holds others, such as a DTensor."""

# Transforms and tracers

TransformType = torch._C._functorch.TransformType
"""Tells the transforms of ``torch.func`` apart."""

get_interpreter_stack = torch._C._functorch.get_interpreter_stack
"""The transforms at work; None or empty if there are none."""

peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
"""The innermost transform at work; None if there is none."""

temporarily_clear_interpreter_stack = (
    torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack
)
"""A block without transforms."""

is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a transform wraps a tensor."""

get_tracing_state = torch._C._get_tracing_state
"""The state of ``torch.jit.trace``; None if it does not trace."""

is_fx_symbolic_tracing = torch.fx._symbolic_trace.is_fx_symbolic_tracing
"""Whether ``torch.fx.symbolic_trace`` traces."""

CUSTOM_BUILTINS = torch.fx.graph._custom_builtins
"""The names that the code of a graph uses without an import, and the import of each."""

InductorWrapper = torch._TorchCompileInductorWrapper
"""What ``torch.compile`` makes of ``backend="inductor"`` with its mode and options."""

# Modules and ranks

module_call = torch.nn.Module._call_impl
"""What a call of a module runs, with its hooks."""

module_wrapped_call = torch.nn.Module._wrapped_call_impl
"""What a call of a module runs that may be compiled: ``nn.Module.__call__``."""

has_any_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
"""Whether hooks of all modules are registered."""


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether ``vmap`` runs over a tensor, which other transforms may have wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that transforms have wrapped, or the tensor itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def keep_sources(traced: torch.fx.GraphModule, copied: torch.fx.GraphModule) -> None:
    """Tell a copy of a graph where the inputs come from, as Dynamo told of the graph.

    Without that AOTAutograd takes no input for one whose memory stays, and CUDA graphs copy each
    parameter whenever they run.
    """
    if not hasattr(traced, "_param_name_to_source"):
        return
    copied._param_name_to_source = traced._param_name_to_source
    inputs = (graph.find_nodes(op="placeholder") for graph in (traced.graph, copied.graph))
    for own, node in zip(*inputs, strict=True):
        node._dynamo_source = getattr(own, "_dynamo_source", None)


def without_source(node: torch.fx.Node) -> None:
    """Tell that an input of a graph was added to what Dynamo traced."""
    node._dynamo_source = None


def stays_in_memory(node: torch.fx.Node) -> None:
    """Tell that an input of a graph lies in the same place whenever the graph runs.

    CUDA graphs copy what may not, and are recorded anew where it does not.
    """
    node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"


def placements_before_local(
    node: Any,
) -> tuple[object, tuple[Any, ...], tuple[Any, ...] | None] | None:
    """Of the autograd node of ``DTensor.to_local``: the mesh, and how the tensor is placed on it.

    The last are the placements of its gradient, or None where the program does not say. Of any
    other node nothing is known.
    """
    if type(node).__name__ != "_ToTorchTensorBackward":
        return None
    spec: Any = getattr(node, "dtensor_spec", None)
    if spec is None:
        return None
    given = getattr(node, "grad_placements", None)
    return spec.mesh, tuple(spec.placements), None if given is None else tuple(given)


def localized_spec(parameter: torch.Tensor) -> Any:
    """What ``DistributedDataParallel`` with a mesh notes on a part of a ``DTensor`` parameter.

    It has ``mesh``, ``placements``, ``shape`` and ``stride`` of the whole; None for others.
    """
    return getattr(parameter, "_st_info", None)


def graph_sources() -> dict[str, str]:
    """The source of each graph that runs, by the name of the file that it pretends to be in.

    ``torch.fx.graph_module`` keeps it for tracebacks. It may be changed.
    """
    loader = getattr(torch.fx.graph_module, "_loader", None)
    sources: dict[str, str] = getattr(loader, "eval_cache", {})
    return sources


def default_patience() -> float:
    """The seconds that the collectives of the default process group wait for a rank."""
    group = torch.distributed.distributed_c10d._get_default_group()
    backends = [group._get_backend(device) for device in group._device_types]
    return min(backend.options._timeout.total_seconds() for backend in backends)


def device_of_collectives(group: torch.distributed.ProcessGroup | None = None) -> torch.device:
    """Where tensors lie that all ranks of ``group`` exchange; the same on each of them.

    A group of NCCL alone takes no tensor of a CPU, such as that of a parameter that is offloaded.
    """
    return torch.device(torch.distributed.distributed_c10d._get_object_coll_device(group))


def set_patience(group: torch.distributed.ProcessGroup, seconds: float) -> None:
    """Let the collectives of ``group`` wait so long for a rank, from now on."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_pipeline_schedule(thing: object) -> bool:
    """Whether it is a schedule of ``torch.distributed.pipelining``."""
    # Who has one has imported them: that takes a while.
    schedules = sys.modules.get("torch.distributed.pipelining.schedules")
    return schedules is not None and isinstance(thing, schedules._PipelineSchedule)


def stages_of_schedule(schedule: Any) -> list[Any]:
    """The stages of this process, in the order of the model."""
    several = getattr(schedule, "_stages", None)
    stages = [schedule._stage] if several is None else several
    return sorted(stages, key=lambda stage: stage.stage_index)


def losses_of_schedule(schedule: Any) -> int:
    """Of how many losses of micro-batches that of the batch is the mean; 1 for their sum.

    The schedule divides gradients of parameters by it once all backward passes are done.
    """
    return schedule._n_microbatches if schedule.scale_grads else 1
