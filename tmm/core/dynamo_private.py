"""The private names of Dynamo that are used; see `torch_private` for what else there is.

Dynamo takes seconds to import, hence this is a file of its own.
"""

from __future__ import annotations

import torch
import torch._dynamo
import torch._dynamo.backends.common
import torch._dynamo.backends.debugging
import torch._dynamo.callback
import torch._dynamo.eval_frame
import torch._dynamo.exc
import torch._dynamo.guards
import torch._dynamo.symbolic_convert
import torch._dynamo.trace_rules
import torch._dynamo.types
import torch._dynamo.utils
import torch._dynamo.variables.base
import torch._dynamo.variables.builder
import torch._dynamo.variables.functions
import torch._dynamo.variables.nn_module
import torch._dynamo.variables.tensor
import torch._dynamo.variables.torch
import torch._functorch.partitioners

# What torch.compile gives

OptimizedModule = torch._dynamo.eval_frame.OptimizedModule
"""The wrapper that ``torch.compile(module)`` returns; ``_orig_mod`` is the module."""

TorchDynamoContext = torch._dynamo.eval_frame._TorchDynamoContext
"""The settings of a ``torch.compile`` call."""

DisableContext = torch._dynamo.eval_frame.DisableContext
"""The settings of one with ``disable=True``."""

optimize = torch._dynamo.optimize
"""Makes such settings; ``torch.compile`` without the choice of a backend by name."""

innermost_fn = torch._dynamo.eval_frame.innermost_fn
"""The function that was compiled, behind all wrappers."""

innermost_backend = torch._dynamo.eval_frame.innermost_backend
"""The backend, behind all of Dynamo's callbacks."""

cached_backends = torch._dynamo.eval_frame.cached_backends
"""The backends that Dynamo keeps, by their ``id``."""

eager_backend = torch._dynamo.backends.debugging.eager
"""The backend that runs graphs as they were traced."""

eager_noexcept_backend = torch._dynamo.backends.debugging.eager_noexcept
"""The same, with a remark about exceptions in graphs."""

aot_autograd = torch._dynamo.backends.common.aot_autograd
"""Makes a backend of compilers of forward and backward graphs."""

default_partition = torch._functorch.partitioners.default_partition
"""Splits a joint graph such that the backward computes nothing of the forward again."""

# How Dynamo traces

skip_code = torch._dynamo.eval_frame.skip_code
"""Lets Dynamo run a code object as it is, and look into what that calls."""

remove_from_cache = torch._dynamo.eval_frame.remove_from_cache
"""Lets Dynamo forget what it compiled of a code object."""

is_skipped = torch._dynamo.trace_rules.check
"""Whether Dynamo leaves a function or code object alone, such as most of torch's own."""

maybe_mark_dynamic = torch._dynamo.maybe_mark_dynamic
"""Leaves a size of a tensor open in graphs, where the program allows that."""

dynamo_config = torch._dynamo.config
"""The settings of Dynamo."""

callback_handler = torch._dynamo.callback.callback_handler
"""Calls functions when Dynamo begins and ends to compile a frame."""

CallbackArgs = torch._dynamo.callback.CallbackArgs
"""What these functions are told."""

CallbackTrigger = torch._dynamo.callback.CallbackTrigger
"""What began to compile: Dynamo, or a backward graph that waited for its first run."""

ConvertFrameReturn = torch._dynamo.types.ConvertFrameReturn
"""What Dynamo's callback for frames returns; without arguments, the frame runs as it is."""

InstructionTranslator = torch._dynamo.symbolic_convert.InstructionTranslator
"""Traces a frame; ``current_tx()`` is the one that is at work."""

module_variables = torch._dynamo.variables.nn_module
"""The module whose ``record_nn_module_stack`` tells which call of which module is traced."""

ModuleVariable = torch._dynamo.variables.nn_module.UnspecializedNNModuleVariable
"""A module while it is traced; ``call_function`` traces a call of it."""

MethodVariable = torch._dynamo.variables.functions.UserMethodVariable
"""A method while it is traced; ``call_function`` traces a call of it."""

TensorVariable = torch._dynamo.variables.tensor.TensorVariable
"""A tensor while it is traced."""

VariableTracker = torch._dynamo.variables.base.VariableTracker
"""Any value while it is traced; ``build`` makes one of a value."""

answers = torch._dynamo.variables.torch
"""The module whose ``tracing_state_functions`` says what traced code is told of being traced."""

GraphArg = torch._dynamo.variables.builder.GraphArg
"""Where an input of a graph comes from."""

GuardFilterEntry = torch._dynamo.types.GuardFilterEntry
"""A guard, as a ``guard_filter_fn`` is asked about it."""

CheckFunctionManager = torch._dynamo.guards.CheckFunctionManager
"""The guards of a program; what they compare by identity has a finalizer that refers to it."""

counters = torch._dynamo.utils.counters
"""How often Dynamo has met what: the reasons of graph breaks, among others."""

TorchDynamoException = torch._dynamo.exc.TorchDynamoException
"""What Dynamo raises of its own accord."""

InternalTorchDynamoError = torch._dynamo.exc.InternalTorchDynamoError
"""What it raises around an exception of what it traces."""

BackendCompilerFailed = torch._dynamo.exc.BackendCompilerFailed
"""What it raises around an exception of a backend, its ``inner_exception``."""

InvalidBackend = torch._dynamo.exc.InvalidBackend
"""What ``torch.compile`` raises for a backend that nobody registered."""


def isolation_id() -> int:
    """The program that the frame that is being compiled belongs to (torch 2.13 and newer)."""
    number: int = torch._C._dynamo.eval_frame.get_eval_frame_isolate_recompiles_id()
    return number
