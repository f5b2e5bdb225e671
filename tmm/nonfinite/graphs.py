"""The traced forward and backward graphs of what is compiled, run node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from tmm.core.dynamo_private import GuardFilterEntry, aot_autograd, default_partition
from tmm.instrumentation.compile_settings import CompileSettings, compile_separately
from tmm.instrumentation.handle import Handle
from tmm.instrumentation.kept_by_dynamo import KeptByDynamo
from tmm.nonfinite.places import counterparts, place_of_node
from tmm.nonfinite.watcher import Watcher


class _NodeByNode(Interpreter):
    """Runs a graph, and tells which node is running.

    A graph may serve several equal modules: it was traced in a frame of ``traced`` and runs in
    one of ``running``.
    """

    def __init__(
        self,
        module: GraphModule,
        watcher: Watcher,
        traced: torch.nn.Module | None,
        running: torch.nn.Module | None,
        *,
        in_backward: bool,
    ) -> None:
        super().__init__(module)
        self._watcher = watcher
        self._modules = None if traced is running else counterparts(traced, running)
        self._running = running
        self._in_backward = in_backward

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        place = place_of_node(n)
        module = self._running if place.module is None else place.module
        if self._modules is not None and isinstance(module, int):
            module = self._modules.get(module, module)
        # What checkpointing computes a second time is part of the forward pass.
        is_forward = not self._in_backward or n.meta.get("partitioner_tag") == "is_forward"
        with self._watcher.at(
            replace(place, module=module), "forward" if is_forward else "backward"
        ):
            return super().run_node(n)


class Tracer:
    """Compiles like the user did, but to graphs that run node by node.

    What it compiles is kept apart from what the user's own programs compiled.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.graphs = 0
        self._watcher = watcher
        self._handles: list[Handle] = []
        self._held: list[Callable[..., Any]] = []
        self._kept = KeptByDynamo()

    def program(self, callee: Callable[..., Any], settings: CompileSettings) -> Callable[..., Any]:
        """A program that calls its first argument, ``callee``, with the others."""

        def compile_graph(module: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            traced = self._watcher.frame_of_compilation()
            compiler = aot_autograd(
                fw_compiler=self._compiler(traced, in_backward=False),
                bw_compiler=self._compiler(traced, in_backward=True),
                # Nothing is computed a second time for the backward pass.
                partition_fn=default_partition,
                keep_inference_input_mutations=True,
            )
            return self._handle(compiler(module, inputs))

        handle = self._handle(compile_graph)

        def trace(module: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            run: Callable[..., Any] = handle(module, inputs)
            return run

        # The user's filter may drop guards that hold for the user's calls only.
        settings = replace(settings, guard_filter=None)
        program, forget = compile_separately(_traced, settings, trace, _keep_all, callee)
        self._kept.add(forget)
        return program

    def close(self) -> None:
        """Let go of what was traced, which Dynamo keeps."""
        for handle in self._handles:
            handle.let_go()
        self._handles.clear()
        self._held.clear()
        self._kept.forget()

    def _handle(self, held: Callable[..., Any]) -> Handle:
        self._held.append(held)
        self._handles.append(Handle(held))
        return self._handles[-1]

    def _compiler(self, traced: torch.nn.Module | None, *, in_backward: bool) -> Callable[..., Any]:
        watcher = self._watcher

        def compile_graph(module: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
            self.graphs += 1

            def run(arguments: list[Any]) -> Any:
                given = tuple(arguments)
                arguments.clear()
                running = watcher.frame_of_graph()
                nodes = _NodeByNode(module, watcher, traced, running, in_backward=in_backward)
                return nodes.run(*given)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile_graph


def _traced(callee: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return callee(*args, **kwargs)


def _keep_all(entries: Sequence[GuardFilterEntry]) -> list[bool]:
    return [True] * len(entries)
