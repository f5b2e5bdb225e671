"""Real small trainings: those that fail are told, with layer and step; the healthy are left alone.

The models are not compiled, but for one: what is recorded is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tmm
from tmm.analysis import Anomaly, find_anomalies, find_stories, first_nonfinite

SPEC = tmm.Spec(
    tmm.activation("rms", "absmax", "zero_fraction", "kurtosis", "nan_count", "inf_count"),
    tmm.gradient("norm", "nan_count"),
    tmm.update("relative_norm"),
    tmm.parameter("rms", "nan_count"),
)
ATTENTION_SPEC = tmm.Spec(*SPEC.rules, tmm.attention("entropy", "max_logit"))
TOKENS, LENGTH = 16, 16
Batch = Callable[[Any], Tensor]
"""The loss of a model on a new batch."""


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        result: Tensor = x + self.mlp(x)
        return result


class Language(nn.Module):
    """A transformer of two blocks; biases begin at zero, weights are small, as in GPT-2."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, TOKENS))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.05)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


class FailsAtCall(nn.Module):
    """Gives its input back, until the call of that number, which makes one element NaN."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        fails = self.calls == self.call
        self.calls += 1
        mask = torch.zeros_like(x)
        mask[..., 0] = 1.0
        return torch.where(fails & mask.bool(), torch.nan, x)


def perceptron(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), *middle, nn.Tanh(), nn.Linear(32, 1))
    )


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 4)),
    )


def regression(model: Any) -> Tensor:
    x = torch.randn(32, 8)
    target = torch.sin(x @ torch.linspace(-1, 1, 8)[:, None]) + 0.1 * torch.randn(32, 1)
    return functional.mse_loss(model(x), target)


def classification(model: Any) -> Tensor:
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    classes = torch.randint(4, (32,))
    return functional.cross_entropy(model(patterns[classes] + torch.randn(32, 1, 8, 8)), classes)


def language(model: Any) -> Tensor:
    """Each token says which comes next, in four cases of five."""
    tokens = [torch.randint(TOKENS, (16,))]
    for _ in range(LENGTH):
        noise = torch.randint(TOKENS, (16,))
        tokens.append(torch.where(torch.rand(16) < 0.8, (3 * tokens[-1] + 1) % TOKENS, noise))
    text = torch.stack(tokens, 1)
    return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train(
    run: Path,
    model: Any,
    loss_of: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 60,
    spec: tmm.Spec = SPEC,
    at: int = -1,
    happens: Callable[[Any], object] = lambda model: None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Anomaly, ...]:
    """Record a training to which something ``happens`` before a step, and look at it."""
    tmm.instrument(model, spec, run=run)
    monitor = tmm.monitor(model)
    monitor.watch(optimizer, scaler=scaler)
    for step in range(steps):
        if step == at:
            with torch.no_grad():
                happens(getattr(model, "_orig_mod", model))
        with monitor.step(step):
            loss = loss_of(model)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            monitor.log_scalar("loss", loss, force=True)
    tmm.remove(model)
    with tmm.open_run(run) as recorded:
        anomalies = find_anomalies(recorded)
        assert anomalies == find_anomalies(recorded)
        first = first_nonfinite(recorded)
        assert first == next((a for a in anomalies if a.kind == "nonfinite"), None)
    return anomalies


def alarms(anomalies: tuple[Anomaly, ...]) -> list[Anomaly]:
    return [anomaly for anomaly in anomalies if anomaly.severity != "low"]


def only(anomalies: tuple[Anomaly, ...], kind: str) -> list[Anomaly]:
    return [anomaly for anomaly in anomalies if anomaly.kind == kind]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several would spend their time waiting for each other, on models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Healthy

SEEDS = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])


@SEEDS
def test_a_healthy_regression(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    assert alarms(train(tmp_path, model, regression, optimizer, steps=100)) == []


@SEEDS
def test_a_healthy_classification(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    anomalies = train(tmp_path, model, classification, optimizer, steps=80)
    assert alarms(anomalies) == []
    idle = {anomaly.site for anomaly in only(anomalies, "gradient_idle")}
    assert "4.bias" in idle <= {"0.bias", "4.bias"}  # before a batch norm


@SEEDS
def test_a_healthy_language_model(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    anomalies = train(tmp_path, model, language, optimizer, steps=80, spec=ATTENTION_SPEC)
    assert alarms(anomalies) == []
    idle = {anomaly.site for anomaly in only(anomalies, "gradient_idle")}
    assert idle <= {f"blocks.{n}.attention.key.bias" for n in range(2)}  # a softmax ignores it


def test_a_scaler_that_skips_steps_is_healthy(tmp_path: Path) -> None:
    model = perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    anomalies = train(
        *(tmp_path, model, lambda model: 8 * regression(model), optimizer), steps=20, scaler=scaler
    )
    with tmm.open_run(tmp_path) as run:
        assert run.series("step/skipped")[1].sum() > 0
    assert alarms(anomalies) == []


# Failing


def test_a_learning_rate_a_hundred_times_too_high(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 5.0, momentum=0.9)
    anomalies = train(tmp_path, model, regression, optimizer, steps=40)
    exploded = only(anomalies, "gradient_explosion")
    assert exploded[0].severity == "critical"
    assert exploded[0].step <= 5
    assert {"gradient_norm", "gradient_norm/5"} & {anomaly.site for anomaly in exploded}
    (diverged,) = only(anomalies, "loss_divergence")
    assert diverged.severity == "critical"
    assert diverged.step <= 5
    first = only(anomalies, "nonfinite")[0]
    assert first.severity == "critical"
    assert first.step > exploded[0].step


def test_a_language_model_with_such_a_learning_rate(tmp_path: Path) -> None:
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), 0.3)
    anomalies = train(tmp_path, model, language, optimizer, steps=40, spec=ATTENTION_SPEC)
    assert anomalies[0].severity in ("high", "critical")
    kinds = {anomaly.kind for anomaly in alarms(anomalies)}
    assert "update_large" in kinds
    assert {"attention_logit_growth", "attention_collapse"} & kinds


@pytest.mark.parametrize("layer", ["blocks.0.attention.value", "blocks.1.mlp.1"])
def test_a_parameter_that_becomes_nan(tmp_path: Path, layer: str) -> None:
    model = Language()

    def happens(model: Any) -> None:
        model.get_submodule(layer).weight[3, 5] = torch.nan

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    anomalies = train(
        *(tmp_path, model, language, optimizer),
        steps=20,
        spec=ATTENTION_SPEC,
        at=13,
        happens=happens,
    )
    first, *others = only(anomalies, "nonfinite")
    assert anomalies[0] == first
    assert (first.severity, first.site, first.step) == ("critical", layer, 13)
    assert (first.key, first.last_step) == (f"activation/{layer}/nan_count", 19)
    assert first.text.startswith(f"{16 * LENGTH} NaN elements")  # one of each position
    assert {"loss", "[root module]", "head.1.weight"} <= {other.site for other in others}
    assert all(layer in other.text for other in others)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_fails_at_a_step(tmp_path: Path, compiled: bool) -> None:
    model = perceptron(FailsAtCall(17))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    network = torch.compile(model, backend="aot_eager") if compiled else model
    anomalies = train(tmp_path, network, regression, optimizer, steps=20)
    first = anomalies[0]
    assert (first.kind, first.severity, first.site, first.step) == (
        "nonfinite",
        "critical",
        "3",
        17,
    )
    assert first.text.startswith("32 NaN elements")


def test_a_layer_that_dies(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    anomalies = train(
        *(tmp_path, model, regression, optimizer),
        steps=40,
        at=23,
        happens=lambda model: model[0].bias.fill_(-100.0),
    )
    (dead,) = only(anomalies, "dead_units")
    assert (dead.severity, dead.site, dead.step, dead.last_step) == ("high", "1", 23, 39)
    vanished = only(anomalies, "gradient_vanishing")
    assert {anomaly.site for anomaly in vanished} == {"0.weight", "0.bias", "gradient_norm/0"}
    assert {anomaly.step for anomaly in vanished} == {23}


def test_a_layer_that_is_dead_from_the_start(tmp_path: Path) -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    anomalies = train(tmp_path, model, regression, optimizer, steps=20)
    with tmm.open_run(tmp_path) as run:
        (dead,) = alarms(tuple(story.cause for story in find_stories(run)))
    assert (dead.kind, dead.site, dead.step) == ("dead_units", "1", 0)
    idle = {anomaly.site for anomaly in only(anomalies, "gradient_idle")}
    assert {"0.weight", "0.bias", "2.weight"} <= idle
    assert not [a for a in only(anomalies, "update_small") if a.severity != "low"]


def test_a_head_that_collapses(tmp_path: Path) -> None:
    model = Language()

    def happens(model: Any) -> None:
        attention = model.blocks[1].attention
        for part in (attention.query, attention.key):  # of the second of two heads
            part.weight[16:] *= 50

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    anomalies = train(
        *(tmp_path, model, language, optimizer),
        steps=50,
        spec=ATTENTION_SPEC,
        at=30,
        happens=happens,
    )
    (collapsed,) = only(anomalies, "attention_collapse")
    assert collapsed.site == "blocks.1.attention.head_1"
    assert (collapsed.step, collapsed.last_step) == (30, 49)
    (grown,) = only(anomalies, "attention_logit_growth")
    assert (grown.site, grown.step, grown.severity) == (collapsed.site, 30, "high")
    jumped = {anomaly.site for anomaly in only(anomalies, "activation_explosion")}
    assert jumped == {"blocks.1.attention.query", "blocks.1.attention.key"}
