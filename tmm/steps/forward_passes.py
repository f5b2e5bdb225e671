"""Which forward passes of a step belong to the training, and which are those of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef

from tmm.core.autograd import (
    is_in_autograd_function,
    reaches_parameters,
    tensors_within,
)
from tmm.core.torch_private import has_storage
from tmm.instrumentation.apart import apart_from_the_program

EVALUATIONS = "forward passes of evaluations"
KEPT_APART = (
    "{count} were kept apart from the monitored steps that they ran in: they had no gradients, or"
    " no backward pass where others of the training had one"
)
NO_PHASE = (
    "a step holds forward passes in training mode and in evaluation mode, none with a backward"
    " pass{detail}: those in {counted} count. Whether the others belong to the training cannot be"
    " known; run an evaluation in `with monitor.no_monitor():`"
)
NO_BACKWARD = (
    "after the last run.step() there was a forward pass with gradients that no backward pass went"
    " through. Whether it belongs to the training cannot be known: it is not recorded. If it does,"
    " end its step by run.step(); run an evaluation in `with run.monitor.no_monitor():`"
)
HIDDEN_OUTPUT = (
    "a forward pass gave no tensor that tmm could find (in tuples, lists, dicts and attributes), so"
    " that it cannot be known whether a backward pass went through it: it counts as one of the"
    " training. Run an evaluation in `with monitor.no_monitor():`"
)

# How much speaks for a pass to belong to the training.
_EVALUATION, _WITHOUT_GRADIENTS, _EVALUATION_MODE, _TRAINING_MODE, _BACKWARD, _PARAMETERS = range(6)


@dataclass(eq=False)
class ForwardPass:
    """One forward pass, and what is known of it.

    Attributes:
        module: what ran; None for a step function.
        is_training: the mode of the module.
        has_gradients: whether they were enabled when the pass began.
        function: the pass of the step function that made this one; None outside of one.
        backward: how far a backward pass has gone through it: not at all, or to no parameter of
            the model (as for the gradient of an input), or to one.
        is_hidden: whether no backward pass could be noticed.
        has_rows: whether anything was measured.
        read: earlier passes whose outputs it was given.
    """

    module: torch.nn.Module | None
    is_training: bool
    has_gradients: bool
    function: ForwardPass | None = None
    backward: int = 0
    is_hidden: bool = False
    has_rows: bool = False
    read: set[ForwardPass] = field(default_factory=set)

    def will_train(self) -> None:
        """Somebody has said that a backward pass goes from it to parameters."""
        self.backward = _PARAMETERS

    @property
    def evidence(self) -> int:
        """How much speaks for the training."""
        if self.backward:
            return self.backward
        if self.has_gradients:
            return _TRAINING_MODE if self.is_training else _EVALUATION_MODE
        return _WITHOUT_GRADIENTS if self.is_training else _EVALUATION


class Parts:
    """Modules, with all that they are made of; None is a step function, which may call any."""

    def __init__(self) -> None:
        self._modules: dict[torch.nn.Module | None, None] = {}
        self._parts: set[torch.nn.Module] = set()
        self._expanded = 0

    def __bool__(self) -> bool:
        return bool(self._modules)

    def add(self, module: torch.nn.Module | None) -> None:
        """Add a module; what it is made of is looked for when somebody asks."""
        self._modules[module] = None

    def overlap(self, module: torch.nn.Module | None) -> bool:
        """Whether ``module`` has a part in common with any of these."""
        if module is None or None in self._modules:
            return bool(self._modules)
        for added in list(self._modules)[self._expanded :]:
            assert added is not None
            self._parts.update(added.modules())
        self._expanded = len(self._modules)
        return module in self._parts or any(part in self._parts for part in module.modules())


@dataclass(frozen=True)
class Verdict:
    """What became of the passes of a step: those kept ``apart``, and a ``doubt`` to warn of."""

    apart: frozenset[ForwardPass]
    counts_any: bool
    doubt: str = ""


class ForwardPasses:
    """The forward passes of the step that is open.

    A pass belongs to the training if a backward pass goes through it. Where none does, as in
    training without gradients or where ``backward()`` comes after the step, the mode decides and
    whether gradients were enabled. A step of nothing but evaluations is one that its user wants
    to see, unless the run has opened it by itself.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.current: ForwardPass | None = None
        self.count_apart = 0
        self._module = module
        self._passes: list[ForwardPass] = []
        self._unmeasured = 0
        self._outputs: dict[int, tuple[StorageWeakRef, ForwardPass]] = {}
        self._in_training = Parts()  # what has run with gradients in training mode
        # Of earlier steps: what was trained, and in which modes.
        self._trained = Parts()
        self._trained_modes: set[bool] = set()

    # While a step is open

    def is_surely_evaluation(self, module: torch.nn.Module | None, *, opened_by_run: bool) -> bool:
        """Whether a pass that begins now cannot count, so that it need not be measured.

        It has no gradients, and the training runs the same modules: in this step, or in earlier
        ones of a run that opens its steps by itself.
        """
        if torch.is_grad_enabled():
            return False
        known = (self._in_training, self._trained) if opened_by_run else (self._in_training,)
        if not any(parts.overlap(module) for parts in known) or is_in_autograd_function():
            return False
        self._unmeasured += 1
        return True

    @contextmanager
    def running(self, module: torch.nn.Module | None, inputs: object) -> Iterator[ForwardPass]:
        """Around a forward pass; ``current`` is it in the block."""
        outer, self.current = self.current, None
        try:
            yield self.begin(module, inputs)
        finally:
            self.current = outer

    def begin(self, module: torch.nn.Module | None, inputs: object) -> ForwardPass:
        """A pass begins; within that of a step function it is one of its own."""
        function = self.current
        if function is not None and function.function is not None:
            function = function.function  # the pass before it was left by an exception
        mode = self._module if module is None else module
        begun = ForwardPass(module, mode.training, torch.is_grad_enabled(), function)
        if not begun.has_gradients and is_in_autograd_function():
            # A reentrant checkpoint: gradients are enabled around it, and it is run once more.
            begun.has_gradients = True
            begun.backward = _PARAMETERS if begun.is_training else 0
        if self._outputs:
            with apart_from_the_program():
                for tensor in tensors_within(inputs):
                    if has_storage(tensor):
                        made = self._outputs.get(tensor.untyped_storage()._cdata)
                        if made is not None:
                            begun.read.add(made[1])
        self._passes.append(begun)
        if begun.has_gradients and begun.is_training and module is not None:
            self._in_training.add(module)
        self.current = begun
        return begun

    def end(self, output: object) -> None:
        """The current pass has given ``output``."""
        with apart_from_the_program():
            self._end(output)

    def _end(self, output: object) -> None:
        ended = self.current
        assert ended is not None
        tensors = list(tensors_within(output))
        for tensor in tensors:
            if has_storage(tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self._outputs[storage.cdata] = storage, ended
        is_followed = self.follow(tensors)
        can_be_hidden = ended.module is not None and ended.has_gradients and not ended.backward
        ended.is_hidden = can_be_hidden and not tensors and not is_followed
        self.current = ended.function

    def follow(self, tensors: Collection[torch.Tensor]) -> bool:
        """Notice a backward pass that comes to any of these, which the current pass has made.

        Tells whether one can.
        """
        followed = self.current
        assert followed is not None
        nodes: set[Node] = {t.grad_fn for t in tensors if t.grad_fn is not None}
        note = _note_backward(followed, self._module)
        for node in nodes:
            node.register_prehook(note)
        return bool(nodes)

    # Its end

    def forget(self) -> None:
        """Begin anew."""
        self._passes, self._outputs, self._unmeasured, self.current = [], {}, 0, None
        self._in_training = Parts()

    def settle(self, *, opened_by_run: bool, is_ended: bool) -> Verdict:
        """Decide which passes of the step count, and begin anew.

        Args:
            opened_by_run: nobody asked for this step but ``run.step`` and the like.
            is_ended: somebody has said that it is over, or an exception has ended it; not so where
                the run finishes.
        """
        # What a step function measured outside of modules counts if it did measure something.
        passes = [p for p in self._passes if p.module is not None or p.has_rows]
        unmeasured = self._unmeasured
        self.forget()
        if not passes:
            self.count_apart += unmeasured
            return Verdict(frozenset(), counts_any=False)
        doubt = ""
        best = max(p.evidence for p in passes)
        counted = {p for p in passes if p.evidence == best}
        if best >= _BACKWARD:
            for trained in counted:
                self._trained.add(trained.module)
                self._trained_modes.add(trained.is_training)
            hidden = {p for p in passes if p.is_hidden and p.is_training} - counted
            counted |= hidden
        elif opened_by_run and self._trained:
            counted = {p for p in counted if self._is_like_training(p)}
            if counted and not is_ended:
                counted, doubt = set(), NO_BACKWARD
        counted |= _belonging_to(counted, passes)
        apart = frozenset(passes) - counted
        self.count_apart += unmeasured + len(apart)
        return Verdict(apart, bool(counted), doubt or _doubt(best, counted, apart))

    def _is_like_training(self, forward_pass: ForwardPass) -> bool:
        """Whether a pass may be one of a training whose backward pass was left out this time."""
        return forward_pass.has_gradients and forward_pass.is_training in self._trained_modes


def _belonging_to(counted: set[ForwardPass], passes: Sequence[ForwardPass]) -> set[ForwardPass]:
    """Passes without a backward pass that are a part of others that count.

    As of a frozen encoder: its output goes into one of them, or one step function made both; and
    nothing of what it ran is trained.
    """
    found: set[ForwardPass] = set()
    if len(counted) == len(passes):
        return found
    trained = Parts()
    for one in counted:
        trained.add(one.module)
    functions = {one.function for one in counted} - {None}
    read = {earlier for one in counted for earlier in one.read}
    for earlier in reversed(passes):
        is_used = earlier in read or earlier.function in functions
        if is_used and earlier not in counted and not trained.overlap(earlier.module):
            found.add(earlier)
            read |= earlier.read
    return found


def _doubt(best: int, counted: Collection[ForwardPass], apart: Collection[ForwardPass]) -> str:
    if any(p.is_hidden for p in counted) and best >= _BACKWARD:
        return HIDDEN_OUTPUT
    others = {p.evidence for p in apart}
    if best == _WITHOUT_GRADIENTS and _EVALUATION in others:
        return NO_PHASE.format(detail=" or gradients", counted="training mode")
    if best == _EVALUATION_MODE and _WITHOUT_GRADIENTS in others:
        return NO_PHASE.format(detail="", counted="evaluation mode, which have gradients,")
    return ""


def _note_backward(
    followed: ForwardPass, module: torch.nn.Module
) -> Callable[[tuple[torch.Tensor, ...]], None]:
    def note(gradients: tuple[torch.Tensor, ...]) -> None:
        if followed.backward != _PARAMETERS:
            with apart_from_the_program():
                followed.backward = _PARAMETERS if reaches_parameters(module) else _BACKWARD

    return note
