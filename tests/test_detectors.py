"""Each detector on series whose answer is known: what it finds, and what it lets pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tmm.analysis import Anomaly, RecordedSeries, find_anomalies, first_nonfinite
from tmm.analysis.detectors.activations import activation_outliers, exploding_activations
from tmm.analysis.detectors.attention import collapsed_attention, growing_logits
from tmm.analysis.detectors.dead_units import dead_units
from tmm.analysis.detectors.gradients import (
    exploding_gradients,
    idle_parameters,
    vanishing_gradients,
)
from tmm.analysis.detectors.loss import loss_divergence, loss_drops, loss_plateaus, loss_spikes
from tmm.analysis.detectors.memory import growing_memory
from tmm.analysis.detectors.nonfinite_values import nonfinite
from tmm.analysis.detectors.updates import large_updates, small_updates
from tmm.analysis.registry import BUILT_IN, found_by
from tmm.core.records import ROOT_NAME

NAN, INF = math.nan, math.inf
Values = list[float]
NOISE = np.random.default_rng(0).standard_normal(1000)


def record(series: Mapping[str, Any], first: int = 0, every: int = 1) -> RecordedSeries:
    return RecordedSeries(
        {key: (first + every * np.arange(len(v)), np.asarray(v)) for key, v in series.items()}
    )


def found(detector: Any, key: str, values: Any, **thresholds: float) -> list[Anomaly]:
    return list(detector(record({key: values}), **thresholds))


def spans(anomalies: list[Anomaly]) -> list[tuple[str, int, int]]:
    return [(anomaly.severity, anomaly.step, anomaly.last_step) for anomaly in anomalies]


# Gradients


def test_large_gradients_are_one_episode() -> None:
    values = [1.0, 200.0, 5000.0, 300.0, 1.0, 150.0]
    first, second = exploding_gradients(record({"step/gradient_norm": values}, 10, 5))
    assert (first.kind, first.severity, first.step, first.last_step) == (
        *("gradient_explosion", "critical"),
        *(15, 25),
    )
    assert (first.value, first.threshold, first.site) == (5000, 1000, "gradient_norm")
    assert "5,000" in first.text
    assert (second.severity, second.value, second.threshold) == ("high", 150, 100)


def test_a_norm_that_trembles_about_the_limit_is_one_episode() -> None:
    values = [1.0, 101.0, 99.0, 102.0, 60.0, 103.0, 49.0, 101.0]
    anomalies = found(exploding_gradients, "gradient/a.weight/norm", values)
    assert spans(anomalies) == [("high", 1, 5), ("high", 7, 7)]


@pytest.mark.parametrize(
    ("key", "severity"),
    [
        *[("step/gradient_norm", "high"), ("step/gradient_norm/blocks.1", "high")],
        *[("gradient/a.weight/norm", "medium"), ("step/gradient_norm_before_clip", "high")],
    ],
)
def test_a_jump_above_its_own_history(key: str, severity: str) -> None:
    (anomaly,) = found(exploding_gradients, key, [0.1] * 10 + [2.0, 0.1])
    assert spans([anomaly]) == [(severity, 10, 10)]
    assert anomaly.threshold == pytest.approx(1.0)
    assert "20 times" in anomaly.text
    assert found(exploding_gradients, key, [0.1] * 9 + [2.0]) == []  # too short a history
    assert found(exploding_gradients, key, [0.1] * 10 + [0.9]) == []
    noisy = 0.1 * np.exp(NOISE[:20])
    assert found(exploding_gradients, key, [*noisy, 3.0]) == []  # within its usual noise


def test_where_little_is_left_to_learn_norms_vary_by_any_factor() -> None:
    key = "gradient/a.weight/norm"
    rested = [*np.geomspace(1.0, 1e-3, 30), *[1e-4] * 150]
    assert found(exploding_gradients, key, [*rested, 2e-3]) == []
    assert spans(found(exploding_gradients, key, [*rested, 0.5])) == [("medium", 180, 180)]


@pytest.mark.parametrize("size", [30.0, 178.0, 1.4e4, -1e3])
def test_gradients_are_of_the_scale_of_the_loss(size: float) -> None:
    key, loss = "step/gradient_norm", [size] * 20
    usual = np.array([0.5 * abs(size)] * 20)
    assert list(exploding_gradients(record({key: usual, "loss": loss}))) == []
    high = np.where(np.arange(20) == 8, 15 * abs(size), usual)
    (anomaly,) = exploding_gradients(record({key: high, "loss": loss}))
    assert (anomaly.severity, anomaly.step) == ("high", 8)
    assert spans(list(exploding_gradients(record({key: [150.0] * 5, "loss": [3.0] * 5}))))


def test_a_converged_gradient_may_return_to_what_it_was() -> None:
    falling = list(np.geomspace(1, 1e-6, 100))
    assert found(exploding_gradients, "step/gradient_norm", [*falling, 1e-4]) == []
    assert found(exploding_gradients, "step/gradient_norm", [1e-9] * 20 + [1e-7]) == []


def test_a_scaler_is_no_explosion() -> None:
    norms = [1.0] * 20 + [50.0] * 5 + [1.0] * 5
    scale = [1.0] * 20 + [64.0] * 5 + [1.0] * 5
    explained = record({"step/gradient_norm": norms, "step/grad_scale": scale})
    assert list(exploding_gradients(explained)) == []
    constant = record({"step/gradient_norm": norms, "step/grad_scale": [8.0] * 30})
    assert spans(list(exploding_gradients(constant))) == [("high", 20, 24)]
    skipped = record({"step/gradient_norm": [1.0, 5000.0, 1.0], "step/skipped": [0.0, 1.0, 0.0]})
    assert list(exploding_gradients(skipped)) == []


def test_vanishing_gradients_of_all_parameters_and_of_a_module() -> None:
    small = [1.0] + [1e-9] * 4
    anomalies = list(
        vanishing_gradients(
            record({"gradient/a.weight/norm": small, "gradient/a.bias/norm": small})
        )
    )
    assert spans(anomalies) == [("medium", 1, 4)] * 2
    assert (anomalies[0].value, anomalies[0].threshold) == (1e-9, 1e-7)
    assert spans(found(vanishing_gradients, "step/gradient_norm", [0.0] * 5)) == [("medium", 0, 4)]
    assert found(vanishing_gradients, "step/gradient_norm", [1.0, 1e-9, 1e-9, 1.0]) == []


def test_idle_parameters_are_told_apart_from_vanishing_gradients() -> None:
    record_ = record(
        {
            "gradient/bn.weight/norm": [1.0] * 5,
            "gradient/bn.bias/norm": [1e-9, 2e-7, 1e-9, 1e-9, 1e-9],  # before a normalization
            "gradient/frozen.weight/norm": [0.0] * 5,
            "gradient/lora.weight/norm": [0.0] * 4 + [1.0],  # begins at zero
        }
    )
    assert list(vanishing_gradients(record_)) == []
    anomalies = list(idle_parameters(record_))
    assert [(a.site, a.severity) for a in anomalies] == [
        ("bn.bias", "low"),
        ("frozen.weight", "low"),
    ]
    assert "4 of 5" in anomalies[0].text
    assert "exactly zero" in anomalies[1].text


# Losses


def test_a_jump_after_a_constant_loss_is_a_spike() -> None:
    (spike,) = found(loss_spikes, "train/loss", [2.0] * 12 + [3.0] + [2.0] * 12)
    assert spans([spike]) == [("high", 12, 12)]
    assert spike.threshold == pytest.approx(2.0 * math.exp(15 * 0.02))
    assert (spike.value, spike.key, spike.site) == (3.0, "train/loss", "loss")
    assert spans(found(loss_spikes, "loss", [0.0] * 12 + [0.1])) == [("high", 12, 12)]
    assert found(loss_spikes, "loss", [2.0] * 12 + [2.2]) == []
    assert found(loss_spikes, "loss", [2.0] * 9 + [9.0]) == []  # too short a history


def test_spikes_of_negative_and_noisy_losses() -> None:
    negative = [*(-3 + 0.1 * NOISE[:60]), 5.0, *(-3 + 0.1 * NOISE[60:80])]
    assert spans(found(loss_spikes, "loss", negative)) == [("high", 60, 60)]
    noisy = [*(2 * np.exp(0.1 * NOISE[:60])), 5.0, 6.0]
    assert spans(found(loss_spikes, "loss", noisy)) == [("medium", 60, 61)]
    assert found(loss_spikes, "loss", 2 * np.exp(0.1 * NOISE)) == []


def test_one_value_in_a_long_tail_is_no_spike_and_two_are() -> None:
    calm = list(2 * np.exp(0.1 * NOISE[:60]))
    level = float(np.median(calm[-10:]))
    spreads = [
        s
        for s in np.arange(0.3, 1.5, 0.02)
        if found(loss_spikes, "loss", [*calm, level * np.exp(s)])
    ]
    least = level * float(np.exp(spreads[0]))
    below = 0.9 * least
    assert found(loss_spikes, "loss", [*calm, below, level]) == []
    assert spans(found(loss_spikes, "loss", [*calm, below, below, below])) == [("medium", 60, 62)]


@pytest.mark.parametrize("length", [3.0, 20.0, 300.0])
def test_a_loss_that_falls_is_neither_spike_nor_drop(length: float) -> None:
    steps = np.arange(400)
    values = (10 * np.exp(-steps / length) + 0.1) * np.exp(0.05 * NOISE[:400])
    for detector in (loss_spikes, loss_drops, loss_divergence):
        assert found(detector, "loss", values) == []
        assert found(detector, "loss", values - 5) == []


def test_a_sudden_drop() -> None:
    (drop,) = found(loss_drops, "loss", [2.0] * 20 + [0.5] * 20)
    assert spans([drop]) == [("medium", 20, 20)]
    assert "0.5" in drop.text
    assert spans(found(loss_drops, "loss", [-2.0] * 20 + [-4.0] * 20)) == [("medium", 20, 20)]
    assert found(loss_drops, "loss", [2.0] * 20 + [1.2] * 20) == []
    assert found(loss_drops, "loss", [2.0] * 20 + [9.0] * 5 + [2.0] * 20) == []  # back again


def test_a_loss_that_ends_above_where_it_began() -> None:
    rising = [1.0, 0.9, 1.1, *np.geomspace(2, 1e5, 20)]
    (anomaly,) = found(loss_divergence, "loss", rising)
    assert (anomaly.severity, anomaly.last_step, anomaly.value) == ("critical", 22, 1e5)
    assert rising[anomaly.step] > 3
    assert anomaly.step == 4
    assert spans(found(loss_divergence, "loss", [-1.0] * 5 + [4.0] * 5)) == [("high", 5, 9)]
    assert found(loss_divergence, "kl_loss", rising) == []
    assert found(loss_divergence, "loss", [1.0, 9.0, 9.0, 1.0, 1.0, 1.0]) == []


def test_a_plateau_is_low_and_needs_a_long_history() -> None:
    falling = list(np.geomspace(5, 1, 50))
    (plateau,) = found(loss_plateaus, "loss", falling + [1.0] * 200)
    assert spans([plateau]) == [("low", 50, 249)]
    assert found(loss_plateaus, "loss", [1.0] * 199) == []
    assert found(loss_plateaus, "loss", np.geomspace(5, 1, 400)) == []


# Not finite


def test_the_first_in_the_order_of_execution() -> None:
    series = {
        "activation/a/nan_count": [0, 0, 8],
        "activation/b.c/nan_count": [0, 4, 4],
        "activation/b.c/rms": [1, NAN, NAN],
        "activation/b/nan_count": [0, 4, 4],
        f"activation/{ROOT_NAME}/rms": [1, NAN, NAN],
        "gradient/a.weight/norm": [1, NAN, NAN],
        "loss": [1, NAN, NAN],
    }
    first, *others = nonfinite(record(series, 5, 10))
    assert (first.severity, first.key, first.site) == (
        "critical",
        "activation/b.c/nan_count",
        "b.c",
    )
    assert (first.step, first.last_step, first.value) == (15, 25, 4)
    assert "step 5" in first.text  # until then all was well
    assert [other.site for other in others] == ["a", "b", ROOT_NAME, "loss", "a.weight"]
    assert {other.severity for other in others} == {"high"}
    assert all("b.c at step 15" in other.text for other in others)
    assert first_nonfinite(record(series, 5, 10)) == first


@pytest.mark.parametrize(
    ("keys", "site"),
    [
        *[(["loss", "activation/a/rms"], "a"), (["gradient/a.w/norm", "loss"], "loss")],
        (["parameter/a.w/rms", "update/a.w/norm", "gradient/a.w/norm"], "a.w"),
        (["activation_gradient/a/rms", "activation_gradient/b/rms"], "b"),  # backward
        (["gradient/a.w/norm", "activation_gradient/a/rms"], "a"),
        (["step/gradient_norm", "gradient/a.w/norm"], "a.w"),
        (["activation/b/rms", "activation/b.c/rms"], "b.c"),  # the inner one
        (["attention_entropy/b.head_0", "activation/b/rms"], "b.head_0"),
    ],
)
def test_the_order_within_a_step(keys: list[str], site: str) -> None:
    first = first_nonfinite(record({key: [1.0, NAN] for key in keys}))
    assert first is not None
    assert (first.site, first.step) == (site, 1)


def test_an_earlier_step_comes_before_an_earlier_layer() -> None:
    first = first_nonfinite(record({"activation/a/rms": [1, 1, NAN], "parameter/b/rms": [1, NAN]}))
    assert first is not None
    assert (first.key, first.step) == ("parameter/b/rms", 1)


@pytest.mark.parametrize(
    "series",
    [
        {"activation/a/kurtosis": [NAN], "activation/a/std": [NAN]},
        {"update/a/relative_norm": [INF, NAN], "activation_difference/a/cosine": [NAN]},
        {"activation/a/min": [INF], "activation/a/max": [-INF]},  # of nothing
        {"activation/a/rms": [INF], "activation/a/absmax": [1e25]},  # squares that overflow
        {"activation/a/rms": [NAN], "activation/a/nan_count": [0], "activation/a/inf_count": [0]},
        {"activation/a/own": [NAN, NAN]},  # never was anything else
        {"gradient/a/norm": [1.0, INF], "step/skipped": [0, 1]},
        {"system/gpu_memory": [NAN], "accuracy": [NAN]},
    ],
)
def test_what_is_no_evidence(series: dict[str, Values]) -> None:
    assert list(nonfinite(record(series))) == []


@pytest.mark.parametrize(
    ("series", "step"),
    [
        ({"activation/a/own": [1.0, NAN]}, 1),
        ({"activation/a/max": [1.0, INF]}, 1),
        ({"activation/a/inf_count": [0, 1], "activation/a/nan_count": [0, 0]}, 1),
        ({"activation/a/inf_count": [1, 1], "loss": [1.0, NAN]}, 0),  # it reached the loss
        ({"activation/a/nan_count": [1, 1], "loss": [1.0, 1.0]}, 0),
    ],
)
def test_what_is_evidence(series: dict[str, Values], step: int) -> None:
    first = first_nonfinite(record(series))
    assert first is not None
    assert (first.site, first.step) == ("a", step)


def test_masks_are_infinite_by_design() -> None:
    (mask,) = nonfinite(record({"activation/mask/inf_count": [6, 6], "loss": [1.0, 0.9]}))
    assert (mask.severity, mask.site) == ("low", "mask")
    assert first_nonfinite(record({"activation/mask/inf_count": [6], "loss": [1.0]})) is None


# Activations and attention


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5] * 3 + [1.0] * 5, [("high", 3, 7)]),
        ([0.5] * 3 + [0.95] * 6, [("medium", 3, 8)]),
        ([0.5] * 3 + [0.95] * 2 + [1.0] * 5, [("high", 3, 9)]),
        ([1.0] * 5, [("high", 0, 4)]),  # from the start
        ([0.995, 0.996] * 4, [("high", 0, 7)]),
        ([0.999] * 9, []),  # one-hot
        ([0.9, 0.92] * 9, []),  # a dropout, or sparse by design
        ([1.0] * 4 + [0.5] * 9, []),  # begins at zero
        ([0.5, 0.95, 0.95, 0.5] * 5, []),  # not for long
        ([0.5] * 3 + [1.0] * 4, []),
    ],
)
def test_dead_units(values: Values, expected: list[tuple[str, int, int]]) -> None:
    assert spans(found(dead_units, "activation/a/zero_fraction", values)) == expected


@pytest.mark.parametrize(
    ("statistic", "values", "expected"),
    [
        ("entropy", [2.0] * 10 + [0.05] * 5, [("medium", 10, 14)]),
        ("entropy", [2.0] * 10 + [0.005] * 5, [("high", 10, 14)]),
        ("entropy", [2.0] * 10 + [0.05] * 4 + [2.0], []),
        ("entropy", [0.09] * 20, []),  # sharp from the beginning
        ("entropy", [0.0] * 20, []),
        ("normalized_entropy", [0.9] * 3 + [0.01] * 5, [("medium", 3, 7)]),
        ("normalized_entropy", [0.01] * 5, [("medium", 0, 4)]),
        ("normalized_entropy", [0.0] * 9, []),  # a single key
    ],
)
def test_collapsed_attention(
    statistic: str, values: Values, expected: list[tuple[str, int, int]]
) -> None:
    key = f"attention_{statistic}/a.head_1"
    anomalies = found(collapsed_attention, key, values)
    assert spans(anomalies) == expected
    assert all(anomaly.site == "a.head_1" for anomaly in anomalies)


def test_growing_logits() -> None:
    key = "attention_max_logit/a.head_0"
    assert spans(found(growing_logits, key, [2.0] * 9 + [60, 40, 70])) == [("medium", 9, 11)]
    assert spans(found(growing_logits, key, [-2.0] * 9 + [200])) == [("high", 9, 9)]
    assert found(growing_logits, key, [30.0] * 9 + [110]) == []


def test_outliers_and_the_scale_of_a_tensor() -> None:
    key = "activation/a/absmax"
    assert spans(found(activation_outliers, key, [1.0, 200.0])) == [("medium", 1, 1)]
    assert spans(found(activation_outliers, key, [1.0, 2000.0])) == [("high", 1, 1)]
    assert spans(found(activation_outliers, key, [200.0] * 9)) == [("low", 0, 8)]
    assert spans(found(activation_outliers, key, [2000.0] * 9)) == [("medium", 0, 8)]
    assert spans(found(activation_outliers, key, [200.0] * 9 + [900.0])) == [("medium", 0, 9)]
    tails = found(activation_outliers, "activation/a/kurtosis", [3.0, 2000.0, NAN])
    assert spans(tails) == [("medium", 1, 1)]


def test_exploding_activations() -> None:
    (anomaly,) = found(exploding_activations, "activation/a/rms", [1.0] * 10 + [30.0] * 3 + [1.0])
    assert spans([anomaly]) == [("high", 10, 12)]
    growing = np.geomspace(1, 1e4, 200)
    assert found(exploding_activations, "activation/a/rms", growing) == []
    takes_off = [*[0.1] * 18, 0.15, 0.25, 0.4, 0.7, *[1.1] * 10]
    assert found(exploding_activations, "activation/a/rms", takes_off) == []
    jumps = [*[0.1] * 18, 0.4, *[1.1] * 3, *[0.1] * 9]  # to four times, then ten
    assert found(exploding_activations, "activation/a/rms", jumps) == []
    assert spans(found(exploding_activations, "activation/a/rms", [*jumps, 2.0])) == [
        ("high", 31, 31)
    ]


def test_outputs_that_reach_large_targets() -> None:
    outputs = {"activation/a/absmax": np.linspace(1, 300, 50)}
    assert spans(list(activation_outliers(record({**outputs, "loss": [2.0] * 50}))))
    assert list(activation_outliers(record({**outputs, "loss": [1.4e4] * 50}))) == []


def test_a_sparse_output_is_not_dead() -> None:
    shares = [0.3] * 5 + [0.93] * 8

    def judged(sizes: Values) -> list[tuple[str, int, int]]:
        series = {"activation/a/zero_fraction": shares, "activation/a/rms": sizes}
        return spans(list(dead_units(record(series))))

    assert judged([1.0] * 13) == [("low", 5, 12)]
    assert judged([1.0] * 5 + [0.1] * 8) == [("medium", 5, 12)]


# Updates and memory


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.01] * 5 + [0.2] * 5, [("medium", 5, 9)]),
        ([0.01] * 5 + [0.2, 0.4, 0.08, 0.2, 0.2], [("high", 5, 9)]),
        ([0.01] * 5 + [2.0], [("critical", 5, 5)]),
        ([0.01] * 5 + [0.2] * 4, []),
        ([0.5] * 5 + [0.01] * 5, []),  # at the beginning
        ([INF, *(1 / n for n in range(1, 30))], []),  # begins at zero
        ([INF, *(1 / n for n in range(1, 30)), 2.0], [("critical", 30, 30)]),
    ],
)
def test_large_updates(values: Values, expected: list[tuple[str, int, int]]) -> None:
    assert spans(found(large_updates, "update/a.weight/relative_norm", values)) == expected
    assert found(large_updates, "update/a.bias/relative_norm", values) == []


def test_small_updates() -> None:
    key = "update/a.weight/relative_norm"
    assert spans(found(small_updates, key, [1.0] + [0.0] * 10)) == [("low", 1, 10)]
    assert found(small_updates, key, [1.0] + [0.0] * 9) == []


def test_memory_that_grows_without_a_pause() -> None:
    steady = 1e9 * (1 + np.linspace(0, 0.5, 100) + 0.01 * NOISE[:100])
    for key in ("system/process_memory", "system/gpu_0/torch_memory"):
        (anomaly,) = found(growing_memory, key, steady)
        assert (anomaly.severity, anomaly.last_step) == ("medium", 99)
        assert "MiB" in anomaly.text
    assert found(growing_memory, "system/process_memory", steady[:49]) == []
    assert found(growing_memory, "activation/a/rms", steady) == []
    (doubled,) = found(growing_memory, "system/process_memory", np.linspace(1e9, 3e9, 60))
    assert doubled.severity == "high"
    still = np.concatenate([np.linspace(1e9, 2e9, 20), np.full(200, 2e9)])
    assert found(growing_memory, "system/process_memory", still) == []
    assert found(growing_memory, "system/process_memory", [1e9] * 60 + [2e9] * 60) == []
    assert found(growing_memory, "system/process_memory", 1e9 * (1 + 0.1 * NOISE)) == []


# Anything


KEYS = (
    *("loss", "train/kl_loss", "step/gradient_norm", "step/gradient_norm/a", "step/skipped"),
    *("step/grad_scale", "gradient/a.weight/norm", "gradient/a.bias/norm", "activation/a/rms"),
    *("activation/a/absmax", "activation/a/kurtosis", "activation/a/zero_fraction"),
    *("activation/a/nan_count", "activation/a/own", "update/a.weight/relative_norm"),
    *("attention_entropy/a.head_0", "attention_max_logit/a.head_0", "system/process_memory"),
    *("attention_sink_mass/a.head_0", "step/optimizer_age", "step/started", "step/frozen/a.weight"),
    *("model_input/x/rms", "model_input/x/mean", "model_input/x/nan_count", "model_input/x/absmax"),
    *("model_input/x/elements", "model_output/output/spread", "activation/a/mean"),
    *("parameter/a.weight/rms", "parameter/b.weight/rms", "parameter/c.weight/rms"),
    *("update/b.weight/relative_norm", "activation/b/rms", "activation/c/rms"),
    *("gradient/b.weight/norm", "gradient/c.weight/norm"),
)
ANY = st.one_of(
    st.lists(st.floats(), max_size=12),
    st.lists(st.sampled_from([0.0, 1.0, NAN, INF, -INF, 1e308, -1e308, 5e-324]), max_size=80),
    st.integers(0, 80).map(lambda count: [NAN] * count),
    st.floats().map(lambda value: [value] * 60),
)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), ANY))
@example({"update/b.weight/relative_norm": [], "update/a.weight/relative_norm": [1.0]})
def test_no_series_is_too_strange(series: dict[str, Values]) -> None:
    strange = record(series)
    for name, detector in BUILT_IN:
        for anomaly in found_by(name, detector, strange):  # one that fails is warned of
            assert anomaly.key in series
            steps = strange.series(anomaly.key)[0]
            assert {anomaly.step, anomaly.last_step} <= set(steps.tolist())
            assert anomaly.step <= anomaly.last_step
            assert anomaly.text.endswith((".", "?"))
    found_ = find_anomalies(strange)
    assert found_ == find_anomalies(strange)
    assert len(set(found_)) == len(found_)


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e3, 1e3), st.integers(1, 300))
def test_a_constant_is_nothing_unusual(value: float, count: int) -> None:
    series = {"loss": [value] * count, "activation/a/mean": [value] * count}
    assert {a.severity for a in find_anomalies(record(series))} <= {"low"}
