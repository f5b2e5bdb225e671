"""The hooks that a model carries during a monitored forward pass, and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tmm.core.dynamo_private import GuardFilterEntry, OptimizedModule
from tmm.core.module_names import modules_of, wrapped_module
from tmm.core.replacement import Replacement
from tmm.core.torch_private import has_any_global_hook
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.eager_backend import in_fused_layers
from tmm.instrumentation.outputs import mark_inputs, mark_nothing, mark_outputs
from tmm.instrumentation.regions import COMPILED_CALL
from tmm.instrumentation.traced_calls import TracedCalls, markable_without_hooks

_KEY = -1  # torch numbers its own hooks from 0; inserted last, so it runs after them

# What exists only while tracing, or only between graphs: no guard may depend on it.
_UNGUARDED = (
    *("._forward_hooks", "._forward_pre_hooks", "._forward_pre_hooks_with_kwargs"),
    f".{COMPILED_CALL}",
)


class ModuleHooks:
    """Marks the outputs of modules while Dynamo traces, and shows their calls where no graph is.

    ``enter`` is called with a module and its arguments before it runs between graphs, ``leave``
    with its output afterwards; both also with a wrapper of a module, whose forward may be where a
    graph begins. With ``marks_inputs`` inputs are marked, too. With ``spares_fused_layers`` nothing
    is inside of layers that torch computes as a whole where no module has a hook.

    ``are_guarded`` tells that a graph was traced where modules had hooks of the user's: it runs
    again only where they have as many, with ours.
    """

    def __init__(
        self,
        attribution: Attribution,
        enter: Callable[..., None],
        leave: Callable[..., None],
        *,
        marks_inputs: bool,
        spares_fused_layers: bool = False,
    ) -> None:
        self._attribution = attribution
        self._enter = enter
        self._leave = leave
        self._marks_inputs = marks_inputs
        self._spares_fused_layers = spares_fused_layers
        self.are_guarded = False
        self._standing: list[torch.nn.Module] = []
        self._wrapping: tuple[object, tuple[torch.nn.Module, ...]] | None = None
        self._hidden_calls: list[Replacement] = []
        self._traced = TracedCalls()

    def mark(self) -> None:
        """Mark what Dynamo traces from now on."""
        self.remove()  # from the modules known so far: there may be others now
        self._attribution.refresh()
        self.are_guarded |= any(map(has_own_hooks, self._attribution.names))
        unhooked = []
        markable = set() if self._marks_inputs else markable_without_hooks(self._attribution.names)
        for module in self._hooked():
            is_unhooked = module in markable and not has_own_hooks(module)
            if not is_unhooked or module.__dict__.get(COMPILED_CALL) is not None:
                # A part that is compiled on its own is traced like any other, and no guard says
                # that the attribute is not there, which it is in a monitored step.
                self._hidden_calls.append(Replacement(module, COMPILED_CALL, None))
            if is_unhooked:
                unhooked.append(module)
                continue
            self._standing.append(module)
            module._forward_hooks[_KEY] = mark_outputs
            if self._marks_inputs:
                module._forward_pre_hooks[_KEY] = mark_inputs
                module._forward_pre_hooks_with_kwargs[_KEY] = True
            elif module._forward_pre_hooks:
                # The user's hooks are guarded on, with the length of the dict that holds them.
                module._forward_pre_hooks[_KEY] = mark_nothing
        self._traced.begin(unhooked)

    def watch(self, held: frozenset[torch.nn.Module] = frozenset()) -> None:
        """Show the calls that run from now on, but for those of modules that graphs hold."""
        self.remove()
        for module in (*self._hooked(), *self._wrappers()):
            # What the user's hooks are guarded on has a length, with ours.
            if module in held and not (module._forward_hooks or module._forward_pre_hooks):
                continue
            module._forward_pre_hooks[_KEY] = self._enter
            if self._marks_inputs:
                module._forward_pre_hooks_with_kwargs[_KEY] = True
            module._forward_hooks[_KEY] = self._leave
            self._standing.append(module)

    def remove(self) -> None:
        """Leave the modules as they were."""
        self._show_calls()
        for module in self._standing:
            module._forward_pre_hooks.pop(_KEY, None)
            module._forward_pre_hooks_with_kwargs.pop(_KEY, None)
            module._forward_hooks.pop(_KEY, None)
        self._standing.clear()

    def _hooked(self) -> Iterator[torch.nn.Module]:
        names = self._attribution.names
        spared = in_fused_layers(names) if self._spares_fused_layers else set()
        for module in names:
            if module not in spared:
                yield module
            elif self._attribution.plan.metrics(self._attribution.name(module)):
                self._attribution.unmeasured[self._attribution.name(module)] = (
                    "torch may compute the whole layer in its fast path, which hooks would prevent"
                )

    def _wrappers(self) -> Sequence[torch.nn.Module]:
        """What wraps a part of the model, as activation checkpointing does."""
        if self._wrapping is None or self._wrapping[0] is not self._attribution.names:
            wrappers = (
                module
                for module in modules_of(self._attribution.root)
                if wrapped_module(module) is not None and not isinstance(module, OptimizedModule)
            )
            self._wrapping = self._attribution.names, tuple(wrappers)
        return self._wrapping[1]

    def _show_calls(self) -> None:
        self._traced.end()
        while self._hidden_calls:
            self._hidden_calls.pop().restore()


def has_own_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` runs hooks that are the user's, of its own or of all modules."""
    own = (module._forward_pre_hooks, module._forward_hooks)
    return (
        any(len(hooks) > (_KEY in hooks) for hooks in own)
        or bool(module._backward_hooks or module._backward_pre_hooks)
        or has_any_global_hook()
    )


def keep_guard(entry: GuardFilterEntry) -> bool:
    """Whether a guard of Dynamo depends on the user's program, and not on these hooks."""
    ours = any(entry.value is hook for hook in (mark_outputs, mark_inputs, mark_nothing))
    return not ours and not entry.name.endswith(_UNGUARDED)
