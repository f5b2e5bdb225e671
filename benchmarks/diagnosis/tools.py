"""Other tools that say what is wrong with a training, used as their own pages say.

Each adapter imports its package where it is made, watches one training and keeps what the tool
says in the tool's own ``words``; these map to the kinds of faults, several where a word could mean
several. Options are those of the tool, unless ``used`` tells otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.diagnosis.faults import INPUT
from benchmarks.diagnosis.models import Batch
from benchmarks.diagnosis.training import Part, Training

CHECKED_EVERY = 10
"""Steps between checks of activations that cost a pass of the model or a decomposition."""


@dataclass(frozen=True)
class Statement:
    """What a tool says: its word, the place it names ("" for none) and the step."""

    word: str
    site: str
    step: int


class Tool:
    """Watches the part of a training between two starts of its process."""

    package: ClassVar[str]
    distribution: ClassVar[str]
    used: ClassVar[str]
    words: ClassVar[Mapping[str, str]]
    """Its words with the kinds they mean, separated by spaces; none where no fault is meant."""
    every: ClassVar[int] = 1
    """The steps between two of its checks, at most."""

    def __init__(self, training: Training, part: Part, clips_at: float | None) -> None:
        self.training, self.part, self.clips_at = training, part, clips_at
        self.model = training.task.model
        self.imported: Any = importlib.import_module(self.package)
        self.said: list[Statement] = []

    def say(self, word: str, site: str, step: int) -> None:
        """Keep a statement.

        Raises:
            KeyError: The word has no kinds in the table.
        """
        if word not in self.words:
            raise KeyError(f"{self.package} says {word!r}, which has no kinds")
        self.said.append(Statement(word, site, step))

    def around(self, step: int) -> AbstractContextManager[object]:
        """Entered for all of a step."""
        return nullcontext()

    def on_gradients(self, step: int, batch: Batch) -> None:
        """Called when the gradients are those that the optimizer gets, or will be clipped."""

    def after(self, step: int, loss: float) -> None:
        """Called when the step is taken."""

    def finish(self) -> None:
        """Called when the part is over."""


class Traintools(Tool):
    """``BatchInspector``, ``GradientHealthMonitor`` and ``PlasticityProbe``."""

    package = distribution = "traintools"
    used = (
        "BatchInspector (classes given) and GradientHealthMonitor on each step, as in its quick "
        f"start; PlasticityProbe every {CHECKED_EVERY} steps. The limit of the norm is given only "
        "where the training clips. Not used: what needs ids of examples or says when to stop"
    )
    words: ClassVar[Mapping[str, str]] = {
        "has non-finite values": "nonfinite",
        "abs max": "input_jump input_scale",
        "is nearly constant": "input_jump",
        "is empty": "",
        "dominant class": "",
        "labels outside": "",
        "non-finite gradients": "nonfinite steps_skipped",
        "appears vanished": "gradient_vanishing gradient_idle",
        "is very large": "gradient_explosion gradient_scale",
        "update/weight ratio is high": "update_large learning_rate_jump",
        "update/weight ratio is tiny": "update_small",
        "no gradients found": "parameter_without_gradient",
        "exceeds clipping threshold": "gradient_clipped",
        "dormant": "dead_units",
        "rank-collapsed": "output_collapse",
        "low-rank": "output_collapse",
    }
    every = CHECKED_EVERY

    def __init__(self, training: Training, part: Part, clips_at: float | None) -> None:
        super().__init__(training, part, clips_at)
        classes = 24 if training.task.name == "gpt" else 4
        self.batches = self.imported.BatchInspector(expected_num_classes=classes)
        self.health = self.imported.GradientHealthMonitor(max_grad_norm=clips_at)
        self.probe = self.imported.PlasticityProbe(self.model)

    def on_gradients(self, step: int, batch: Batch) -> None:
        """Inspect the batch and the gradients."""
        inputs, targets = batch
        for warning in self.batches.inspect(inputs, targets, step=step).warnings:
            self._sort(warning, INPUT, step)
        lr = self.part.optimizer.param_groups[0]["lr"]
        for warning in self.health.inspect(self.model, step=step, lr=lr).warnings:
            of_all = warning.startswith(("global", "no gradients"))
            self._sort(warning, "" if of_all else warning.split(" ", 1)[0], step)

    def after(self, step: int, loss: float) -> None:
        """Measure plasticity at the end of each window."""
        if step % CHECKED_EVERY != CHECKED_EVERY - 1:
            return
        for layer in self.probe.measure(step=step).layers:
            for flag in layer.flags if layer.is_critical() else ():
                self.say(re.split("[^a-z-]", flag.lower())[0], layer.name, step)
        self.probe.reset_buffers()

    def finish(self) -> None:
        """Take its hooks away."""
        self.probe.remove_hooks()

    def _sort(self, warning: str, site: str, step: int) -> None:
        self.say(next(word for word in self.words if word in warning), site, step)


class Torchdiag(Tool):
    """``summary``, ``verify_step``, ``check_gradients`` and ``check_dead_neurons``."""

    package = distribution = "torchdiag"
    used = (
        "summary and verify_step (on a copy) before the first step, check_gradients on each step, "
        f"check_dead_neurons every {CHECKED_EVERY} steps. Counts that it prints of frozen and "
        "unchanged parameters are taken as statements"
    )
    words: ClassVar[Mapping[str, str]] = {
        "EXPLODE": "gradient_explosion gradient_scale",
        "VANISH": "gradient_vanishing gradient_idle",
        "NO GRAD": "parameter_without_gradient gradient_vanishing",
        "neurons dead": "dead_units",
        "not finite": "nonfinite",
        "None gradients": "parameter_without_gradient gradient_vanishing",
        "unchanged": "parameter_without_optimizer",
        "No parameters changed": "update_small parameter_without_optimizer",
        "Frozen": "parameter_frozen",
    }
    every = CHECKED_EVERY

    def __init__(self, training: Training, part: Part, clips_at: float | None) -> None:
        super().__init__(training, part, clips_at)
        batch = training.task.batch(torch.Generator().manual_seed(training.seed))
        for change in training.batches:
            batch = change(part.first, batch)
        model, optimizer = copy.deepcopy((self.model, part.optimizer))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.imported.summary(model)
            found = self.imported.verify_step(model, optimizer, training.task.loss, *batch)
        text = printed.getvalue()
        frozen = re.search(r"^Frozen\s+([\d,]+)", text, re.MULTILINE)
        if frozen and frozen[1] != "0":
            self.say("Frozen", "", part.first)
        for word in ("not finite", "None gradients", "No parameters changed"):
            if f"• {word}" in text or (word == "not finite" and "Loss is not finite" in text):
                self.say(word, "", part.first)
        if found.get("params_unchanged") and found.get("params_updated"):
            self.say("unchanged", "", part.first)

    def on_gradients(self, step: int, batch: Batch) -> None:
        """Check the gradients, and the units now and then."""
        with contextlib.redirect_stdout(io.StringIO()):
            gradients = self.imported.check_gradients(self.model)
            due = step % CHECKED_EVERY == 0
            dead = self.imported.check_dead_neurons(self.model, batch[0]) if due else {}
        for name, found in gradients.items():
            if found["status"] != "OK":
                self.say(found["status"].upper().replace("_", " "), name, step)
        for name, found in dead.items():
            if found["dead_pct"] > 20:  # where it begins to warn
                self.say("neurons dead", name, step)


class Trainpulse(Tool):
    """``TrainingCallback``."""

    package = distribution = "trainpulse"
    used = (
        "TrainingCallback with loss, norm of all gradients and learning rate of each step. Windows "
        "are shortened to fit (loss_spike_window 20, plateau_patience 40); slow steps are not "
        "asked for. It names no layer, and need not"
    )
    words: ClassVar[Mapping[str, str]] = {
        "nan_detector": "nonfinite steps_skipped",
        "loss_spike": "loss_spike loss_divergence",
        "Gradient explosion": "gradient_explosion gradient_scale",
        "Vanishing gradient": "gradient_vanishing gradient_idle",
        "learning_rate": "learning_rate_jump update_large",
        "plateau": "update_small",
    }

    def __init__(self, training: Training, part: Part, clips_at: float | None) -> None:
        super().__init__(training, part, clips_at)
        config = self.imported.MonitorConfig(loss_spike_window=20, plateau_patience=40)
        self.callback = self.imported.TrainingCallback(config)
        self.norm = math.nan

    def on_gradients(self, step: int, batch: Batch) -> None:
        """Take the norm of all gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norm = float(torch.nn.utils.get_total_norm(grads))

    def after(self, step: int, loss: float) -> None:
        """Hand over what a user would."""
        lr = self.part.optimizer.param_groups[0]["lr"]
        self.callback.on_step_end(step, loss=loss, grad_norm=self.norm, lr=lr)

    def finish(self) -> None:
        """Keep its alerts, in its order."""
        for alert in self.callback.report().alerts:
            is_gradient = alert.detector == "gradient"
            word = alert.message.split(":")[0] if is_gradient else alert.detector
            self.say(word, "", alert.step)


class Nansense(Tool):
    """The checks of ``Session`` that stop a training."""

    package = distribution = "nansense"
    used = (
        "Session.batch around each step, checks on each step instead of each 100th; a training "
        "that it stops is let go on. Not used: what a person sees in its pages, such as the number "
        "of dead channels, of which it does not say when it is too many"
    )
    words: ClassVar[Mapping[str, str]] = {
        "nan": "nonfinite steps_skipped",
        "inf": "nonfinite steps_skipped",
        "underflow": "gradient_vanishing gradient_idle",
        "overflow": "gradient_explosion gradient_scale",
    }

    def __init__(self, training: Training, part: Part, clips_at: float | None) -> None:
        super().__init__(training, part, clips_at)
        with contextlib.redirect_stdout(io.StringIO()):
            self.session = self.imported.start(self.model, optimizer=part.optimizer)
        self.session.set_debug_settings(interval=1)
        self.session.detach()
        self.seen: set[tuple[str, str]] = set()
        threading.Thread(target=self._let_go_on, daemon=True).start()

    def _let_go_on(self) -> None:
        pauses = 0
        while not self.session.closed:
            if self.session.wait_until_paused(after_pauses=pauses, timeout=1):
                pauses = self.session.pause_count
                self.session.detach()

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """A batch of its session."""
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, self.session.batch(phase="train", epoch=0):
            yield
        error = self.session.debug_error
        for layer in () if error is None else error.layers:
            for word in self.words:
                least = self.session.debug_settings.threshold if "flow" in word else 0.0
                share = getattr(layer, word)
                if share > 0 and share >= least and (word, layer.layer) not in self.seen:
                    self.seen.add((word, layer.layer))
                    self.say(word, layer.layer, step)

    def finish(self) -> None:
        """Close it."""
        self.session.close()


TOOLS: tuple[type[Tool], ...] = (Traintools, Torchdiag, Trainpulse, Nansense)

WITHOUT_ADAPTER: Mapping[str, str] = {
    "gradscope": "0.1.0: cannot be imported; gradscope.backends is in neither of its archives",
    "cockpit-for-pytorch": "1.0.2: measures and draws, but states nothing that could be scored",
}
"""Tools that are not scored, and why."""
