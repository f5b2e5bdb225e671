"""What is known of each kind of trouble: what it can bring about, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Knowledge:
    """Of a kind: its ``place`` among causes of one step, whether it ``spreads``, what to ``try_``.

    The places are those in which a step comes about: the data, what was done before the step, the
    forward pass, the loss, the backward pass, the update. What does not spread explains only the
    ``consequences`` that are named, of its own layer.
    """

    place: int
    try_: str
    spreads: bool = True
    consequences: frozenset[str] = frozenset()


_STILL = frozenset(("gradient_idle", "gradient_vanishing", "update_small"))
_DATA, _BEFORE, _SETUP, _START, _RATE, _FORWARD, _LOSS, _LATER, _BACKWARD, _UPDATE, _REST = range(
    11
)

KNOWLEDGE: Mapping[str, Knowledge] = {
    "input_jump": Knowledge(
        _DATA, "look at the batch of that step: its file, its decoding, its scale"
    ),
    "input_scale": Knowledge(_DATA, "normalise the inputs to mean 0 and standard deviation 1"),
    "data_repeated": Knowledge(
        _DATA, "keep the state of the data loader, or skip what was seen, when a run is resumed"
    ),
    "nonfinite": Knowledge(
        _DATA, "tmm.find_nonfinite names the operation; look at its inputs in that step"
    ),
    "optimizer_reset": Knowledge(
        _BEFORE, "load the state of the optimizer from the checkpoint, after the model's"
    ),
    "replicas_differ": Knowledge(
        _BEFORE,
        "look for what ranks do differently: a parameter that nobody averages, a seed, a skipped"
        " step, a device; go back to a checkpoint of a step at which they agreed",
    ),
    "parameter_jump": Knowledge(
        _BEFORE,
        "look for what writes to the parameter: a checkpoint, an initialisation, a callback",
    ),
    "parameter_untied": Knowledge(
        *(_BEFORE, "nothing, if it is meant; else tie the weights before the state is loaded"),
        spreads=False,
    ),
    "steps_skipped": Knowledge(
        _SETUP, "find what is not finite in the backward pass; scale the loss less, or use bfloat16"
    ),
    "parameter_without_optimizer": Knowledge(
        _SETUP, "hand model.parameters() to the optimizer", spreads=False, consequences=_STILL
    ),
    "parameter_without_gradient": Knowledge(
        *(_SETUP, "look for detach(), no_grad() or a branch that is not used"),
        spreads=False,
        consequences=_STILL,
    ),
    "parameter_frozen": Knowledge(
        _SETUP, "nothing, if it is meant; else requires_grad_(True)", False, _STILL
    ),
    "initialisation": Knowledge(
        _START, "initialise the layer as its neighbours, such as with a gain of about 1"
    ),
    "signal_growth": Knowledge(
        _START, "scale the initialisation by 1 / sqrt(fan_in), or normalise between layers"
    ),
    "signal_decay": Knowledge(
        _START, "scale the initialisation by 1 / sqrt(fan_in), or normalise between layers"
    ),
    "update_large": Knowledge(_RATE, "lower the learning rate, or warm it up"),
    "update_small": Knowledge(
        _UPDATE, "raise the learning rate", spreads=False, consequences=frozenset(("loss_plateau",))
    ),
    "dead_units": Knowledge(
        _FORWARD, "look at the bias of the layer before; lower the learning rate, use a leaky unit"
    ),
    "saturation": Knowledge(
        _FORWARD, "make the inputs of the unit smaller: initialisation, normalisation, another unit"
    ),
    "activation_explosion": Knowledge(
        _FORWARD, "look at what the layer got in that step, and at the update before"
    ),
    "activation_outlier": Knowledge(
        _FORWARD, "compare the layer with its neighbours; normalise, or decay its weights"
    ),
    "attention_collapse": Knowledge(
        _FORWARD, "normalise queries and keys, lower the learning rate, or warm it up"
    ),
    "attention_logit_growth": Knowledge(
        _FORWARD, "normalise queries and keys, or decay the weights that make them"
    ),
    "attention_sink": Knowledge(
        _FORWARD, "nothing, if the model is well; else a mask, or a head that may attend to nothing"
    ),
    "output_collapse": Knowledge(
        _FORWARD, "find the layer whose output is the same for all items; lower the learning rate"
    ),
    "loss_spike": Knowledge(_LOSS, "look at the batch and the labels of that step; clip gradients"),
    "loss_drop": Knowledge(_LOSS, "look at the targets of that step, and at masks of the loss"),
    "loss_divergence": Knowledge(_LATER, "lower the learning rate, warm it up, clip gradients"),
    "gradient_scale": Knowledge(
        _BACKWARD, "divide the loss by the number of micro-batches, take means, look at its factor"
    ),
    "gradient_explosion": Knowledge(_BACKWARD, "clip gradients; look at the loss of that step"),
    "gradient_vanishing": Knowledge(
        _BACKWARD, "look at what comes after the layer: saturation, masks, detach(), half precision"
    ),
    "gradient_clipped": Knowledge(
        _REST, "nothing, if it is meant; else clip at a larger norm", spreads=False
    ),
    "gradient_idle": Knowledge(
        _BACKWARD, "nothing, if it is meant", spreads=False, consequences=_STILL
    ),
    "parameter_decay": Knowledge(
        _REST, "lower weight_decay; leave biases and gains of normalisations out of it"
    ),
    "loss_plateau": Knowledge(_REST, "nothing, if it is learned", spreads=False),
    "memory_growth": Knowledge(_REST, "look for tensors that are kept, such as losses", False),
}

OTHERWISE = Knowledge(_FORWARD, "")
"""Of kinds of other packages."""

SELDOM_MEANT = frozenset(("gradient_idle", "loss_plateau"))
"""What is seldom the trouble that somebody looks for: it comes last of what is as grave."""

OVERFLOWS = frozenset(("input_jump", "parameter_jump", "initialisation", "signal_growth"))
"""What comes before a NaN of the same step: finite numbers that were too large."""

NEVER_EXPLAINED = frozenset(
    (
        *("parameter_without_optimizer", "parameter_frozen", "data_repeated", "optimizer_reset"),
        *("parameter_untied", "replicas_differ"),
        *("input_jump", "input_scale", "memory_growth", "gradient_clipped"),
    )
)
"""What no other trouble brings about."""


def known_of(kind: str) -> Knowledge:
    """What is known of a kind."""
    return KNOWLEDGE.get(kind, OTHERWISE)
