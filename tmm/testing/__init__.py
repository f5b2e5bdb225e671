"""For tests of a model that is to be monitored: compare what tmm says with plain eager hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tmm.core.dynamo_private import OptimizedModule
from tmm.core.inductor_private import inductor_config
from tmm.core.keys import info_of, key_of, metric_of
from tmm.core.rng import RandomState, unchanged
from tmm.runs.instrument import explain, instrument, monitor, remove
from tmm.spec.rules import Rule
from tmm.spec.spec import Spec
from tmm.testing.defined_values import Expected, FloatArray, Tolerance, disagreements
from tmm.testing.eager_hooks import Recording, eager_hooks, gradient_hooks, site_names, walk

__all__ = ["assert_matches_hooks"]

Loss = Callable[[Any], torch.Tensor]

_FAMILIES = ("activation", "activation_gradient", "gradient", "parameter")
_SHOWN = 12  # keys at fault in a message


def assert_matches_hooks(
    model: torch.nn.Module,
    batch: object,
    spec: Spec,
    *,
    loss: Loss | None = None,
    tolerance: float = 1e-4,
) -> dict[str, float | FloatArray]:
    """Compare every row of one step with what plain eager hooks see, computed in float64.

    The model runs one monitored step, forward and backward, in the way in which it is compiled; a
    copy of it runs the same uncompiled, from the same random numbers, with hooks on its modules
    that keep all outputs. The model's parameters, gradients, buffers and random state are left as
    they were.

    Args:
        model: a module, compiled in any way or not at all, and not instrumented.
        batch: what the model is called with: a mapping (by keyword), a tuple (by position), or one
            argument.
        spec: rules of activations, activation gradients, gradients and parameters.
        loss: the scalar to go backward from, of what the model returns. Without it, the sum of
            squares of all returned tensors that require a gradient.
        tolerance: the relative error that is allowed; counts must be equal. tmm promises 1e-5 for
            float32 that is not compiled by Inductor, and 1e-4 under it.

    Returns:
        The rows of the step by key; each has agreed. What ``tmm.explain`` names as not measured
        is not among them.

    Raises:
        AssertionError: for rows that are missing without a reason, superfluous, or wrong, the worst
            first.
        ValueError: for a rule of what hooks do not see, a model that is instrumented, or a negative
            tolerance.
        TypeError: if ``model`` is not a module, or ``spec`` not a spec.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r} is not a torch.nn.Module")
    if not isinstance(spec, Spec):
        raise TypeError(f"spec={spec!r} is not a tmm.Spec; write tmm.Spec(tmm.activation('rms'))")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} must be 0 at least")
    for rule in spec.rules:
        if rule.family not in _FAMILIES:
            raise ValueError(
                f"{rule}: plain hooks do not see it; leave it out of the spec, which may hold"
                f" rules of {', '.join(_FAMILIES)}"
            )
    loss = _sum_of_squares if loss is None else loss
    inner: torch.nn.Module = model._orig_mod if isinstance(model, OptimizedModule) else model
    original = copy.deepcopy(inner)
    gradients = {parameter: parameter.grad for parameter in inner.parameters()}
    for parameter in gradients:
        parameter.grad = None
    original.zero_grad()
    with unchanged(inner):
        random_state = RandomState.capture()
        instrument(model, spec)
        try:
            # Inductor's own random numbers would be others than those of eager code.
            with inductor_config().patch(fallback_random=True):
                got = _monitored_step(model, batch, spec, loss)
                explanation = explain(model)
        finally:
            remove(model)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        random_state.restore()
        seen = _Seen.of(original, batch, spec, loss, explanation.eager)
    want = dict(seen.expected(spec))
    got = {key: value for key, value in got.items() if not seen.leaves_open(key, value)}
    want = {
        key: expected
        for key, expected in want.items()
        if key in got or info_of(key).site not in explanation.unmeasured
    }
    if not want:
        reasons = "; ".join(f"{name}: {why}" for name, why in explanation.unmeasured.items())
        raise AssertionError(f"nothing was measured. {reasons}")
    lines = disagreements(got, want, Tolerance(tolerance, tolerance))
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise AssertionError(
            f"{len(lines)} of {len(want)} rows disagree with eager hooks:\n"
            + "\n".join([*lines[:_SHOWN], *more])
        )
    return got


def _call(model: Callable[..., Any], batch: object) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _sum_of_squares(output: object) -> torch.Tensor:
    tensors = [tensor for _, tensor in walk(output) if tensor.requires_grad]
    return sum((t.abs().square().sum() for t in tensors), torch.zeros(()))


def _backward(total: torch.Tensor) -> None:
    if total.requires_grad:
        total.backward()


def _monitored_step(
    model: torch.nn.Module, batch: object, spec: Spec, loss: Loss
) -> dict[str, float | FloatArray]:
    step = 0
    while not spec.is_step_monitored(step):
        step += 1
    watched = monitor(model)
    with watched.step(step):
        _backward(loss(_call(model, batch)))
        if spec.measures("gradient"):
            watched.monitor_gradients()
        if spec.measures("parameter"):
            watched.monitor_parameters()
    rows = watched.get_step_metrics()
    return {key: value for key, value in rows.items() if info_of(key).kind in _FAMILIES}


@dataclass(frozen=True)
class _Seen:
    """What hooks saw of one step, by family."""

    recordings: dict[str, Recording] = field(
        default_factory=lambda: {family: Recording() for family in _FAMILIES}
    )

    @staticmethod
    def of(
        module: torch.nn.Module, batch: object, spec: Spec, loss: Loss, eager: Collection[str]
    ) -> _Seen:
        """Run the step uncompiled; ``eager`` are the modules that no graph of tmm held."""
        seen = _Seen()
        recordings = seen.recordings
        with torch.compiler.set_stance("force_eager"):
            with eager_hooks(module, recordings["activation"]):
                # A hook that copies the outputs would be in the way of the others.
                if spec.measures("activation_gradient"):
                    with gradient_hooks(module, recordings["activation_gradient"], eager):
                        output = _call(module, batch)
                else:
                    output = _call(module, batch)
            _backward(loss(output))
        for name, owner in site_names(module).items():
            for own_name, parameter in owner.named_parameters(recurse=False):
                dotted = own_name if name == "[root module]" else f"{name}.{own_name}"
                recordings["parameter"].add(dotted, parameter)
                if parameter.grad is not None:
                    recordings["gradient"].add(dotted, parameter.grad)
        return seen

    def leaves_open(self, key: str, value: float | FloatArray) -> bool:
        """Whether hooks do not tell what a row is to be.

        Of a module that gives back its input, hooks cannot tell whose gradient is whose; outputs
        that the loss does not depend on get zeros from a compiled backward pass, and no hook runs.
        """
        family, site = info_of(key).kind, info_of(key).site
        if family != "activation_gradient":
            return False
        recording = self.recordings[family]
        if site in recording.integers:
            return True
        is_nothing = bool(np.all((np.asarray(value) == 0) | np.isnan(value)))
        return site not in recording.sites and is_nothing

    def expected(self, spec: Spec) -> Iterator[tuple[str, Expected]]:
        """Key to value, of every rule."""
        for rule in spec.rules:
            recording = self.recordings[rule.family]
            values = recording.expected(
                rule.metrics, aggregate=rule.aggregate, **dict(rule.functions)
            )
            for key, value in values.items():
                info = info_of(key)
                if self._is_asked_for(spec, rule, info.site, recording):
                    yield key_of(rule.family, info.site, metric_of(info)), value

    @staticmethod
    def _is_asked_for(spec: Spec, rule: Rule, site: str, recording: Recording) -> bool:
        name = recording.owners[site]
        owner = name if rule.subject == "modules" else name.rpartition(".")[0]
        return rule.matches(name) and not spec.excludes(owner or "[root module]")
