"""``tmm.find_nonfinite``: which operation made the first NaN or infinity of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tmm.core.dynamo_private import TorchDynamoException
from tmm.core.failures import warn
from tmm.core.module_names import buffer_names, parameter_names
from tmm.instrumentation.outputs import tensors_in
from tmm.nonfinite.graphs import Tracer
from tmm.nonfinite.memory_of_step import Written, undisturbed
from tmm.nonfinite.origin import Kind, Nonfinite, Origin
from tmm.nonfinite.places import ModuleNames
from tmm.nonfinite.programs import Program, program_of, replaced
from tmm.nonfinite.repeated_step import Batch, Ran, StepError, autocast_without_cache, run_step
from tmm.nonfinite.statistics import is_checked, nonfinite_elements
from tmm.nonfinite.watcher import Found, Watcher

Loss = Callable[[Any], torch.Tensor]


def find_nonfinite(
    model: Callable[..., Any],
    batch: object,
    loss: Loss | None = None,
    *,
    backward: bool = True,
    module: torch.nn.Module | None = None,
) -> Nonfinite | None:
    """Run one step and name the operation that makes its first NaN or infinity.

    What is compiled runs as the graphs that ``torch.compile`` traces, forward and backward, node
    by node; the rest runs eagerly, operation by operation. The result of each is checked. Then the
    user's own compiled program runs once, where it need not be compiled for that, and the result
    says whether it is affected. Autocast contexts that are open count. Infinities that the
    program asks for (``masked_fill(mask, float("-inf"))``, a mask among the buffers) are no
    finding unless they reach the loss or a gradient, or make a NaN.

    Nothing is left behind: parameters, buffers, gradients, the batch, random states and what the
    user's programs have compiled stay as they are. No optimizer steps.

    Args:
        model: a module, compiled in any way or not, instrumented or not; or a step function
            that takes the batch and gives back the loss (without ``backward``).
        batch: what it is called with: a tensor; a tuple or list of arguments; or a mapping of
            arguments by name.
        loss: gives the loss for the output of ``model``, a tensor of one number. Multiply by the
            scale of a ``GradScaler`` here to find overflows of scaled gradients. Without it, the
            output itself is the loss if it is one number, or its ``loss`` (attribute or key).
        backward: whether to compute gradients. Without a loss none are, and ``notes`` say so.
        module: the module whose parts are named, when ``model`` is a function. Without it, those
            modules that the function refers to.

    Returns:
        What was found; None if everything is finite.

    Raises:
        TypeError: if ``model`` is neither a module nor a function, or ``loss`` not a function.
        ValueError: if ``loss`` does not give one number, a step function calls ``backward``, or
            ``module`` goes with a module.
    """
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r} is not a function of the model's output")
    program = program_of(model, module)
    given = Batch.of(batch)
    notes: list[str] = []
    with _quiet(program):
        try:
            search = _Search(program, given, loss, backward, traced=program.is_compiled)
        except _NotTracedError as error:
            notes.append(f"run eagerly, as tracing it failed: {error}")
            search = _Search(program, given, loss, backward, traced=False)
        own = None
        if program.is_compiled and not program.uses_cuda_graphs:
            own = _own_program(model, program, given, loss, search)
    notes += [note for note in (search.ran.note, search.stopped) if note]
    origins = search.origins()
    if own and not any(found.reaches for found in search.found):
        origins.insert(0, _COMPILED_ONLY)
    if not origins:
        asks_for_loss = loss is not None or not isinstance(model, torch.nn.Module)
        if asks_for_loss and backward and not search.ran.went_back:
            _tell_of_no_backward(search.ran)
        return None
    return Nonfinite(
        first=origins[0],
        others=tuple(origins[1:]),
        checked="forward and backward" if search.ran.went_back else "forward",
        graphs=search.graphs,
        own_program=own,
        notes=tuple(notes),
    )


def _tell_of_no_backward(ran: Ran) -> None:
    if ran.has_loss:
        warn(
            "find_nonfinite: only the forward pass was checked, in which all is finite, as the loss"
            " does not require a gradient: do not detach it, nor compute it under torch.no_grad()"
        )
    else:
        warn(
            "find_nonfinite: only the forward pass was checked, in which all is finite, as the"
            " function gave back no loss: let it return the loss, or give loss="
        )


class _NotTracedError(Exception):
    """A compiled part could not be traced; says why."""


class _Search:
    """One watched run of a step."""

    def __init__(
        self, program: Program, batch: Batch, loss: Loss | None, backward: bool, *, traced: bool
    ) -> None:
        self.ran = Ran()
        self.stopped = ""
        self.found: list[Found] = []
        self.graphs = 0
        roots = tuple(program.roots.values())
        written = Written()
        watcher = Watcher(ModuleNames(program.roots), run_step.__code__, written)
        tracer = Tracer(watcher) if traced else None
        with undisturbed(roots, written):
            names = _give(watcher, program, batch)
            try:
                cast = autocast_without_cache()
                with replaced(program, tracer) as callee, torch.enable_grad(), cast, watcher:
                    run_step(self.ran, callee, batch, loss, backward=backward, modules=roots)
            except TorchDynamoException as error:
                if traced:
                    raise _NotTracedError(" ".join(str(error).split("\n")[:2])) from error
                raise
            except StepError:
                raise
            except Exception as error:
                if not any(not found.is_meant for found in watcher.found):
                    raise
                # As by a check of the user's own, or by a function that refuses a NaN.
                self.stopped = f"the step ended with {type(error).__name__}: {error}"
            finally:
                if tracer is not None:
                    self.graphs = tracer.graphs
                    tracer.close()
            _reach(watcher, self.ran, names, written)
            self.written = written.tensors
        self.found = watcher.found
        self.ran.output = self.ran.loss = None
        self.ran.gradients = ()

    def origins(self) -> list[Origin]:
        """What is to be told: first what reaches something, then what is hidden."""
        told = [f for f in self.found if not f.is_meant or set(f.reaches) - {"output"}]
        told.sort(key=lambda found: (not found.reaches, found.is_meant))
        return [found.finished() for found in told]


_Names = dict[int, tuple[Kind, str]]


def _give(watcher: Watcher, program: Program, batch: Batch) -> _Names:
    """Know the tensors that are there before the step; what they are and are called, by ``id``."""
    names: _Names = {}
    for name, tensor in batch.tensors:
        watcher.give(tensor, "batch", name, "")
        names[id(tensor)] = "batch", name
    for prefix, root in program.roots.items():
        start = f"{prefix}." if len(program.roots) > 1 else ""
        for parameter, (name, module) in parameter_names(root).items():
            watcher.give(parameter, "parameter", start + name, module)
            names[id(parameter)] = "parameter", start + name
        for buffer, name in buffer_names(root).items():
            watcher.give(buffer, "buffer", start + name, "")
            names[id(buffer)] = "buffer", start + name
    return names


def _reach(watcher: Watcher, ran: Ran, names: _Names, written: Written) -> None:
    """Credit what is not finite in the end."""
    if ran.loss is not None:
        watcher.reach("loss", ran.loss)
    else:
        for _, tensor in tensors_in(ran.output):
            watcher.reach("output", tensor)
    gradients = {id(leaf): gradient for leaf, gradient in ran.gradients}
    for identity in sorted(gradients, key=[*names, *gradients].index):  # in the model's order
        _, name = names.get(identity, ("constant", "an unnamed leaf"))
        watcher.reach(f"gradient of {name}", gradients[identity])
    for tensor in written.tensors:
        kind, name = names.get(id(tensor), ("constant", ""))
        if kind in ("parameter", "buffer") and not _is_nonfinite(written.before(tensor)):
            watcher.reach(f"{kind} {name}", tensor)


def _is_nonfinite(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (
        is_checked(value) and nonfinite_elements(value) is not None
    )


def _own_program(
    model: Callable[..., Any], program: Program, batch: Batch, loss: Loss | None, search: _Search
) -> bool | None:
    """Whether the user's program gives anything that is not finite; None if it cannot be told."""
    roots, ran, written = tuple(program.roots.values()), Ran(), Written()
    backward = search.ran.went_back
    with undisturbed(roots, written), torch.enable_grad():
        for tensor in search.written:
            written.keep(tensor)
        buffers = [buffer for root in roots for buffer in root.buffers()]
        results = [buffer for buffer in buffers if not _is_nonfinite(buffer)]
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                run_step(ran, model, batch, loss, backward=backward, modules=roots)
        except Exception:
            return None  # it was not compiled for such a batch, or refuses a NaN
        results += [ran.loss] if ran.loss is not None else [t for _, t in tensors_in(ran.output)]
        results += [gradient for _, gradient in ran.gradients]
        return any(map(_is_nonfinite, results))


@contextmanager
def _quiet(program: Program) -> Iterator[None]:
    """In the block, monitors measure nothing and no gradient is sent to another process."""
    parts = [part for switch in program.switches for part in switch.siblings]
    ran_twin = [part.ran_twin for part in parts]
    with ExitStack() as stack:
        for switch in program.switches:
            stack.enter_context(switch.steps.no_monitor())
        for parallel in program.parallel:
            stack.enter_context(parallel.no_sync())
        try:
            yield
        finally:
            for part, ran in zip(parts, ran_twin, strict=True):
                part.ran_twin = ran


_COMPILED_ONLY = Origin(
    operation="the compiled program",
    kind="compiled program",
    module="",
    source=None,
    stack=(),
    phase="forward",
    reason="node by node its graphs are finite, so the compiler's fusions or random numbers differ;"
    " compare with torch.compile(backend='aot_eager')",
    inputs=(),
    outputs=(),
    reaches=("output",),
)
