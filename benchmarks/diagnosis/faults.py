"""Faults: how each is planted, and what a true diagnosis of it is, whatever the detectors say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.diagnosis.models import Attention
from benchmarks.diagnosis.training import Training, adam

ONSET = 30
"""The step at which a fault begins that does not begin with the training."""

INPUT = "model_input"
"""Stands for the inputs of the model in places."""


@dataclass(frozen=True)
class Fault:
    """A fault.

    ``kinds`` are right words for its cause. ``places`` are prefixes of sites that are right, None
    where it is of the whole model. It begins in ``steps``, both included. ``without`` gives, by
    model, why it has no meaning there.
    """

    name: str
    plant: Callable[[Training], None]
    kinds: frozenset[str]
    places: Callable[[Training], tuple[str, ...]] | None
    steps: tuple[int, int]
    without: Mapping[str, str]
    attention: bool = False


FAULTS: dict[str, Fault] = {}

NOT_TOLD: Mapping[str, str] = {
    "weights_never_tied": "many healthy models have untied weights, also such as begin equal",
    "labels_always_wrong": "a loss that does not fall says the same of a task that is too hard",
}
"""Faults that are not planted, since what is recorded of them is recorded of healthy trainings."""

_AT_ONCE = (0, 3)
_LATER = (ONSET - 1, ONSET + 6)
_TOKENS = "its inputs are tokens"
_NO_NORM = "it has no normalisation"
_NO_ATTENTION = "it has no attention"


def fault(
    kinds: str,
    steps: tuple[int, int],
    places: Callable[[Training], tuple[str, ...]] | None = None,
    *,
    attention: bool = False,
    **without: str,
) -> Callable[[Callable[[Training], None]], Callable[[Training], None]]:
    """Enter a function that plants a fault."""

    def enter(plant: Callable[[Training], None]) -> Callable[[Training], None]:
        left = dict(without)
        if attention:
            left |= dict.fromkeys(("mlp", "cnn", "rnn", "mixer"), _NO_ATTENTION)
        FAULTS[plant.__name__] = Fault(
            *(plant.__name__, plant, frozenset(kinds.split()), places, steps, left, attention)
        )
        return plant

    return enter


def module(training: Training, name: str) -> nn.Module:
    """A module of the model by its name."""
    return training.task.model.get_submodule(name)


def scale(training: Training, name: str, factor: float) -> None:
    """Multiply the weights of a layer."""
    with torch.no_grad():
        module(training, name).weight.mul_(factor)  # type: ignore[operator, union-attr]


def _of(*attributes: str) -> Callable[[Training], tuple[str, ...]]:
    return lambda training: tuple(getattr(training.task, name) for name in attributes)


def _norms(training: Training) -> tuple[str, ...]:
    return training.task.norms


def _attention(training: Training) -> tuple[str, ...]:
    return training.task.attentions


def _until_middle(training: Training) -> tuple[str, ...]:
    """All layers up to the end of the second block: all that learns less."""
    last = training.task.blocks[1]
    names = [name for name, _ in training.task.model.named_modules() if name]
    inside = [i for i, name in enumerate(names) if name == last or name.startswith(f"{last}.")]
    return (*names[: max(inside) + 1], "positions")


# The optimizer


@fault("update_large", _AT_ONCE)
def learning_rate_too_high(training: Training) -> None:
    training.lr = 300 * training.task.lr


@fault("update_large", _AT_ONCE)
def sgd_rate_too_high(training: Training) -> None:
    training.optimize, training.lr = (lambda p, lr: torch.optim.SGD(p, lr=lr)), 300.0


@fault("update_small", (0, 60))
def learning_rate_too_low(training: Training) -> None:
    training.lr = 1e-5 * training.task.lr


@fault("update_large", _AT_ONCE)
def no_warm_up(training: Training) -> None:
    training.schedule = lambda step: 100.0 if step < 6 else 0.3


@fault("update_large learning_rate_jump", _LATER)
def learning_rate_jumps(training: Training) -> None:
    training.schedule = lambda step: 200.0 if step >= ONSET else 1.0


@fault("parameter_decay", (0, 60))
def weight_decay_too_strong(training: Training) -> None:
    training.optimize = lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.05 / lr)


@fault("parameter_decay", (0, 60), _norms, mlp=_NO_NORM, rnn=_NO_NORM)
def norms_decay(training: Training) -> None:
    norms = {p for name in training.task.norms for p in module(training, name).parameters()}

    def optimize(parameters: object, lr: float) -> torch.optim.Optimizer:
        others = [p for p in training.task.model.parameters() if p not in norms]
        groups = [
            {"params": others, "weight_decay": 0.0},
            {"params": list(norms), "weight_decay": 0.03 / lr},
        ]
        return torch.optim.AdamW(groups, lr=lr)

    training.optimize = optimize


@fault("gradient_clipped", (0, 60))
def clipping_always_clips(training: Training) -> None:
    parameters = list(training.task.model.parameters())

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_(parameters, 1e-3)

    training.gradients.append(clip)


@fault("gradient_scale gradient_explosion", _LATER)
def accumulation_without_division(training: Training) -> None:
    training.accumulate = lambda step: 16 if step >= ONSET else 1


@fault("parameter_without_optimizer", _AT_ONCE, _of("middle"))
def layer_without_optimizer(training: Training) -> None:
    start = training.task.middle + "."
    training.left_out = lambda name: name.startswith(start)


@fault("parameter_frozen", _AT_ONCE, _of("middle"))
def layer_frozen(training: Training) -> None:
    module(training, training.task.middle).requires_grad_(False)


@fault("optimizer_reset", _LATER)
def optimizer_state_lost(training: Training) -> None:
    training.resumes_at, training.loses_state = ONSET, True


@fault(
    "parameter_untied",
    _LATER,
    _of("last"),
    **dict.fromkeys(("mlp", "cnn", "vit", "rnn", "mixer"), "it has no embedding to tie"),
)
def weights_untied_by_resume(training: Training) -> None:
    model, made = training.task.model, []
    head, embedding = module(training, "head"), module(training, "wte")
    head.weight = embedding.weight
    assert training.task.last == "head"

    def optimize(parameters: object, lr: float) -> torch.optim.Optimizer:
        made.append(adam(model.parameters(), lr))
        return made[-1]

    def untie() -> None:
        head.weight = nn.Parameter(embedding.weight.detach().clone())  # type: ignore[operator, union-attr]
        made[-1].add_param_group({"params": [head.weight]})

    training.optimize, training.resumes_at, training.on_resume = optimize, ONSET, untie


# Initialisation


@fault("initialisation", _AT_ONCE, _of("middle"))
def layer_initialised_too_large(training: Training) -> None:
    scale(training, training.task.middle, 100)


@fault("initialisation", _AT_ONCE, _of("last"))
def head_initialised_too_large(training: Training) -> None:
    scale(training, training.task.last, 100)


@fault("initialisation signal_decay gradient_vanishing", _AT_ONCE, _of("middle"))
def layer_initialised_too_small(training: Training) -> None:
    scale(training, training.task.middle, 1e-4)


def _all(training: Training, factor: float) -> None:
    with torch.no_grad():
        for parameter in training.task.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


@fault("signal_growth initialisation", _AT_ONCE)
def all_initialised_too_large(training: Training) -> None:
    _all(training, 20.0)


@fault("signal_growth initialisation", _AT_ONCE, mlp=_NO_NORM, rnn=_NO_NORM)
def normalisation_missing(training: Training) -> None:
    """Without normalisation, in a model whose initialisation needs it."""
    _all(training, 10.0)
    for name in training.task.norms:
        parent, _, child = name.rpartition(".")
        setattr(training.task.model.get_submodule(parent), child, nn.Identity())
    training.task.norms = ()


# Layers


@fault("dead_units initialisation", _AT_ONCE, _of("middle", "activation"))
def units_dead_from_the_first(training: Training) -> None:
    name = "4" if training.task.name == "cnn" else training.task.middle
    with torch.no_grad():
        module(training, name).bias.sub_(60.0)  # type: ignore[operator, union-attr]
    training.task.middle = name


@fault("dead_units parameter_jump", _LATER, _of("middle", "activation"))
def units_die(training: Training) -> None:
    layer = module(training, training.task.middle)

    def die() -> None:
        with torch.no_grad():
            layer.bias.sub_(60.0)  # type: ignore[operator, union-attr]
            if training.task.name == "cnn":  # whose normalisation would bring it back
                module(training, "4").bias.sub_(60.0)  # type: ignore[operator, union-attr]

    training.at[ONSET] = die
    if training.task.name == "cnn":
        training.task.activation = "4"


@fault("saturation initialisation", _AT_ONCE, _of("middle", "activation"))
def sigmoids_saturate(training: Training) -> None:
    name = training.task.activation
    parent, _, child = name.rpartition(".")
    setattr(training.task.model.get_submodule(parent), child, nn.Sigmoid())
    before = "4" if training.task.name == "cnn" else training.task.middle
    with torch.no_grad():
        layer = module(training, before)
        layer.weight.mul_(100)  # type: ignore[operator, union-attr]
    if before == "4":
        training.task.middle = before


@fault("gradient_explosion gradient_scale", _LATER, _of("middle"))
def gradient_of_layer_explodes(training: Training) -> None:
    parameter = module(training, training.task.middle).weight

    def enlarge(step: int) -> None:
        if step >= ONSET:
            parameter.grad.mul_(1e4)  # type: ignore[operator, union-attr]

    training.gradients.append(enlarge)


@fault("gradient_vanishing", _LATER, _until_middle)
def gradients_vanish(training: Training) -> None:
    is_on = []
    training.at[ONSET] = lambda: is_on.append(True)

    def weaken(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output if not is_on else output * 1e-7 + (output * (1 - 1e-7)).detach()

    module(training, training.task.blocks[1]).register_forward_hook(weaken)


@fault("gradient_vanishing parameter_without_gradient", _AT_ONCE, _until_middle)
def layers_detached(training: Training) -> None:
    module(training, training.task.blocks[1]).register_forward_hook(lambda m, i, o: o.detach())


@fault("parameter_jump activation_explosion activation_outlier", _LATER, _of("middle"))
def weights_corrupted(training: Training) -> None:
    training.at[ONSET] = lambda: scale(training, training.task.middle, 300)


@fault("output_collapse", _LATER)
def representations_collapse(training: Training) -> None:
    is_on = []
    training.at[ONSET] = lambda: is_on.append(True)

    def collapse(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        if not is_on:
            return output
        dims = (0, 1) if training.task.attentions else (0,)
        return output.mean(dims, keepdim=True).expand_as(output) + 1e-3 * output

    module(training, training.task.blocks[-1]).register_forward_hook(collapse)


@fault("nonfinite", _LATER, _of("middle", "activation"))
def float16_overflows(training: Training) -> None:
    is_on = []
    training.at[ONSET] = lambda: is_on.append(True)

    def overflow(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return (output * 1e7).half().float() / 1e7 if is_on else output

    module(training, training.task.middle).register_forward_hook(overflow)


@fault("gradient_vanishing gradient_idle", _LATER)
def float16_underflows(training: Training) -> None:
    def underflow(step: int) -> None:
        for parameter in training.task.model.parameters() if step >= ONSET else ():
            parameter.grad = (parameter.grad * 1e-9).half().float()  # type: ignore[operator]

    training.gradients.append(underflow)


@fault("steps_skipped", _AT_ONCE)
def scaler_skips(training: Training) -> None:
    training.scaler = torch.amp.GradScaler("cpu")
    training.losses.append(lambda step, loss: loss * 1e38)


# Attention


def _attention_of(training: Training, name: str) -> Attention:
    found = module(training, name)
    assert isinstance(found, Attention)
    return found


@fault("attention_logit_growth attention_collapse", (10, 50), _attention, attention=True)
def attention_logits_grow(training: Training) -> None:
    def sharpen() -> None:
        for name in training.task.attentions:
            _attention_of(training, name).sharpness.mul_(1.6)

    training.at |= dict.fromkeys(range(10, 40), sharpen)


@fault("attention_collapse attention_logit_growth", _LATER, _attention, attention=True)
def attention_collapses(training: Training) -> None:
    name = training.task.attentions[0]
    training.at[ONSET] = lambda: _attention_of(training, name).sharpness.fill_(3e4)


@fault("attention_sink attention_collapse", _LATER, _attention, attention=True)
def attention_sinks(training: Training) -> None:
    name = training.task.attentions[-1]
    training.at[ONSET] = lambda: _attention_of(training, name).sink.fill_(12.0)


# Data


def _inputs(training: Training) -> tuple[str, ...]:
    return (INPUT, training.task.first)


@fault("input_jump loss_spike", (ONSET, ONSET), lambda t: (INPUT, "loss"))
def batch_corrupt(training: Training) -> None:
    def corrupt(step: int, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs, targets = batch
        if step != ONSET:
            return batch
        return (inputs * 1000 if inputs.is_floating_point() else inputs * 0), targets

    training.batches.append(corrupt)  # type: ignore[arg-type]


@fault("nonfinite", (ONSET, ONSET), _inputs, gpt=_TOKENS)
def nan_in_data(training: Training) -> None:
    def spoil(step: int, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if step == ONSET:
            batch[0].view(-1)[3] = float("nan")
        return batch

    training.batches.append(spoil)  # type: ignore[arg-type]


@fault("input_scale", _AT_ONCE, _inputs, gpt=_TOKENS)
def inputs_not_normalised(training: Training) -> None:
    training.batches.append(lambda step, batch: (batch[0] * 64 + 128, batch[1]))


@fault("loss_spike loss_divergence", (80, 81), lambda t: ("loss",))
def labels_noisy_for_a_while(training: Training) -> None:
    def shuffle(step: int, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs, targets = batch
        if 80 <= step < 85:
            targets = (targets + 1 + step % 3) % (int(targets.max()) + 1)
        return inputs, targets

    training.steps = 100  # until then it has learned something
    training.batches.append(shuffle)  # type: ignore[arg-type]


@fault("data_repeated", _LATER)
def data_repeat_after_resume(training: Training) -> None:
    training.resumes_at, training.repeats_data = ONSET, True
