"""Detectors that judge several series together, on series whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tmm.analysis import Anomaly, RecordedSeries
from tmm.analysis.detectors.attention import attention_sinks, collapsed_attention
from tmm.analysis.detectors.gradient_norms import (
    clipped_gradients,
    lost_gradients,
    multiplied_gradients,
)
from tmm.analysis.detectors.initialisation import initial_scales
from tmm.analysis.detectors.learning_rate import large_rates, small_rates
from tmm.analysis.detectors.loss import loss_drops, loss_spikes
from tmm.analysis.detectors.model_inputs import input_scales, repeated_data, strange_inputs
from tmm.analysis.detectors.not_trained import (
    optimizer_resets,
    skipped_optimizer_steps,
    untrained_parameters,
)
from tmm.analysis.detectors.saturation import alike_outputs, saturated_units
from tmm.analysis.detectors.untied import untied_parameters
from tmm.analysis.detectors.weights import decaying_parameters, jumping_parameters

NOISE = np.random.default_rng(0).standard_normal(1000)


def record(series: Mapping[str, Any]) -> RecordedSeries:
    return RecordedSeries({key: (np.arange(len(v)), v) for key, v in series.items()})


def told(found: list[Anomaly]) -> list[tuple[str, str, str, int]]:
    return [(a.kind, a.severity, a.site, a.step) for a in found]


def noisy(level: float, count: int = 60, seed: int = 0) -> np.ndarray:
    return level * np.exp(0.05 * NOISE[seed : seed + count])


# Learning rates


def updates(*levels: Any) -> dict[str, Any]:
    return {f"update/{place}.weight/relative_norm": level for place, level in enumerate(levels)}


def test_a_rate_above_one_needs_no_step_before() -> None:
    found = list(large_rates(record(updates([40.0], [90.0], [60.0]))))
    assert told(found) == [("update_large", "critical", "all parameters", 0)]
    assert "6,000 %" in found[0].text


def test_what_begins_at_zero_is_the_smaller_part() -> None:
    zero = [np.inf, 1.0, 0.5, 0.1]
    assert not list(large_rates(record(updates(zero, [0.01] * 4, [0.02] * 4))))


def test_a_rate_that_is_high_for_the_first_steps_lacks_a_warm_up() -> None:
    values = [0.8] * 5 + [0.01] * 20
    (found,) = large_rates(record(updates(values, values)))
    assert (found.severity, found.last_step) == ("high", 4)
    assert "warm-up" in found.text


def test_a_rate_is_too_low_where_nothing_moves_and_the_loss_stands() -> None:
    slow = updates(noisy(1e-6, 40), noisy(3e-6, 40))
    still = {"loss": 2.0 + 0.01 * NOISE[:40]}
    (found,) = small_rates(record(slow | still))
    assert told([found]) == [("update_small", "medium", "all parameters", 0)]
    falling = {"loss": 2.0 - 0.02 * np.arange(40)}
    assert not list(small_rates(record(slow | falling)))
    fast = updates(noisy(1e-3, 40), noisy(3e-3, 40))
    assert not list(small_rates(record(fast | still)))
    assert list(small_rates(record(updates(noisy(1e-8, 40)))))  # no loss is logged


def test_a_rate_is_not_too_low_where_there_are_no_gradients() -> None:
    slow = updates(*([noisy(1e-6, 40)] * 3)) | {"loss": 2.0 + 0.01 * NOISE[:40]}

    def gradients(*sizes: float) -> dict[str, Any]:
        return {f"gradient/{n}.weight/norm": [size] * 40 for n, size in enumerate(sizes)}

    assert not list(small_rates(record(slow | gradients(0.0, 0.0, 0.1))))  # a layer is dead
    assert not list(small_rates(record(slow | gradients(0.0, 0.0, 0.0))))
    assert list(small_rates(record(slow | gradients(0.0, 0.1, 0.1))))
    assert list(small_rates(record(slow | gradients(0.1, 0.1, 0.1))))


# Initialisation


def layers(gains: list[float], weights: list[float]) -> dict[str, Any]:
    series: dict[str, Any] = {"model_input/x/rms": [1.0], "model_input/x/nan_count": [0.0]}
    size = 1.0
    for place, (gain, weight) in enumerate(zip(gains, weights, strict=True)):
        size *= gain
        series[f"activation/{place}/rms"] = [size]
        series[f"parameter/{place}.weight/rms"] = [weight]
        series[f"update/{place}.weight/relative_norm"] = [0.01]
    return series


def test_one_layer_that_is_initialised_too_large() -> None:
    usual = layers([0.6, 0.6, 0.6, 0.6], [0.1] * 4)
    assert not list(initial_scales(record(usual)))
    found = list(initial_scales(record(layers([0.6, 60.0, 0.6, 0.6], [0.1, 10.0, 0.1, 0.1]))))
    assert told(found) == [("initialisation", "high", "1", 0)]
    tiny = layers([0.6, 1e-5, 0.6, 0.6], [0.1, 1e-5, 0.1, 0.1])
    assert told(list(initial_scales(record(tiny)))) == [("initialisation", "medium", "1", 0)]


def test_a_normalisation_and_an_embedding_of_unit_scale_are_none() -> None:
    # Its weights are one, and so is its output, however small its input.
    series = layers([0.02, 50.0, 0.6, 0.6], [0.02, 1.0, 0.1, 0.1])
    assert not list(initial_scales(record(series)))


@pytest.mark.parametrize(("gain", "kind"), [(6.0, "signal_growth"), (0.01, "signal_decay")])
def test_all_layers(gain: float, kind: str) -> None:
    (found,) = initial_scales(record(layers([gain] * 4, [gain / 6] * 4)))
    assert found.kind == kind


def test_a_layer_is_judged_by_what_it_was_before_a_large_update() -> None:
    series = layers([0.6, 0.6, 0.6], [0.1] * 3)
    for place in range(3):  # each is 50 times as large after the first step
        series[f"parameter/{place}.weight/rms"] = [5.0]
        series[f"update/{place}.weight/relative_norm"] = [50.0]
    assert not list(initial_scales(record(series)))


# Inputs


def inputs(rms: Any, **metrics: Any) -> dict[str, Any]:
    series = {"model_input/x/rms": rms, "model_input/x/nan_count": np.zeros(len(rms))}
    return series | {f"model_input/x/{name}": values for name, values in metrics.items()}


def test_one_corrupt_batch() -> None:
    values = noisy(1.0)
    values[37] *= 1000
    (found,) = strange_inputs(record(inputs(values, absmax=3 * values)))
    assert told([found]) == [("input_jump", "high", "x", 37)]
    values[37] = 1e-4
    assert told(list(strange_inputs(record(inputs(values))))) == [("input_jump", "high", "x", 37)]
    assert not list(strange_inputs(record(inputs(noisy(1.0)))))
    empty = np.where(np.arange(60) == 20, 1.0, 0.05)
    (found,) = strange_inputs(record(inputs(noisy(1.0), zero_fraction=empty)))
    assert "nothing but zeros at step 20" in found.text


def test_inputs_that_are_not_normalised() -> None:
    (found,) = input_scales(record(inputs(noisy(140.0))))
    assert told([found]) == [("input_scale", "medium", "x", 0)]
    assert not list(input_scales(record(inputs(noisy(2.0)))))
    assert not list(input_scales(record({"model_input/tokens/rms": noisy(2e4)})))  # integers


def test_data_that_begin_anew_with_a_resume() -> None:
    rms, mean = noisy(1.0, 20), 0.1 * NOISE[:20]
    starts = ([0, 20], [1.0, 1.0])

    def found(again: np.ndarray) -> list[Anomaly]:
        steps = np.arange(40)
        series = {
            "model_input/x/rms": (steps, np.concatenate([rms, again])),
            "model_input/x/mean": (steps, np.concatenate([mean, 0.1 * again])),
            "step/started": starts,
        }
        series["model_input/x/mean"][1][20:] = mean if again is rms else 0.1 * again
        return list(repeated_data(RecordedSeries(series)))

    assert told(found(rms)) == [("data_repeated", "medium", "x", 20)]
    assert not found(noisy(1.0, 20, seed=100))
    assert not list(repeated_data(record(inputs([1.0] * 40, mean=[0.0] * 40))))


# What is not trained


def test_parameters_that_nothing_trains_are_told_by_reason() -> None:
    series = {
        "activation/1/rms": [1.0],
        "step/frozen/0.weight": [1.0],
        "step/frozen/0.bias": [1.0],
        "step/without_optimizer/1.weight": [1.0],
        "step/without_gradient/2.weight": [1.0],
        "step/without_gradient/1.bias": [1.0],
    }
    assert sorted(told(list(untrained_parameters(record(series))))) == [
        ("parameter_frozen", "low", "0", 0),
        ("parameter_without_gradient", "medium", "2", 0),
        ("parameter_without_optimizer", "medium", "1", 0),
    ]


def _cut(steps: np.ndarray, late: np.ndarray, **more: Any) -> list[tuple[str, str, str, int]]:
    """Gradients of 0.0 at some steps, of 1 at all."""
    everywhere = np.arange(60)
    series = {
        "activation/0.0/rms": (late, np.ones(len(late))),
        "activation/1/rms": (everywhere, np.ones(60)),
        "gradient/0.0.weight/norm": (steps, np.ones(len(steps))),
        "gradient/0.0.bias/norm": (steps, np.ones(len(steps))),
        "gradient/1.weight/norm": (everywhere, np.ones(60)),
    }
    return told(list(untrained_parameters(RecordedSeries(series | more))))


def test_a_gradient_that_is_lost_on_the_way() -> None:
    everywhere = np.arange(60)
    lost = [("parameter_without_gradient", "medium", "0.0", 40)]
    assert _cut(everywhere[:40], everywhere) == lost
    assert not _cut(everywhere[:55], everywhere)  # not for long
    assert not _cut(everywhere[:40:3], everywhere)  # an expert that is chosen now and then
    assert not _cut(everywhere[:40], everywhere[:40])  # a network whose turn is over
    assert not _cut(everywhere, everywhere)
    frozen = {
        f"step/frozen/0.0.{name}": (np.array([40]), np.ones(1)) for name in ("weight", "bias")
    }
    assert [kind for kind, *_ in _cut(everywhere[:40], everywhere, **frozen)] == [
        "parameter_frozen"
    ]


def test_weights_that_a_resume_untied() -> None:
    steps, late = np.arange(40), np.arange(20, 40)
    series: dict[str, Any] = {
        **{f"parameter/{n}.weight/rms": (steps, np.ones(40)) for n in range(3)},
        "parameter/head.weight/rms": (late, np.ones(20)),
        "activation/head/rms": (steps, np.ones(40)),
        "step/started": ([0, 20], [1.0, 1.0]),
    }

    def found(series: dict[str, Any]) -> list[Anomaly]:
        return list(untied_parameters(RecordedSeries(series)))

    assert told(found(series)) == [("parameter_untied", "medium", "head.weight", 20)]
    assert not found(series | {"activation/head/rms": (late, np.ones(20))})  # a new layer
    assert not found(series | {"step/frozen/head.weight": ([0], [1.0])})
    assert not found(series | {"step/started": ([0], [1.0])})
    more = {f"parameter/{n}.bias/rms": (late, np.ones(20)) for n in range(3)}  # another spec
    assert not found(series | more)


def test_skipped_steps() -> None:
    some = [1.0] * 3 + [0.0] * 20
    assert not list(skipped_optimizer_steps(record({"step/skipped": some})))
    (found,) = skipped_optimizer_steps(record({"step/skipped": [1.0] * 40}))
    assert (found.severity, found.step, found.last_step) == ("high", 0, 39)


def test_a_state_that_was_lost() -> None:
    ages = {"step/optimizer_age": [*range(1, 31), *range(1, 11)]}
    assert told(list(optimizer_resets(record(ages)))) == [
        ("optimizer_reset", "medium", "optimizer_age", 30)
    ]
    assert not list(optimizer_resets(record({"step/optimizer_age": range(1, 41)})))


# Units and outputs


def test_saturated_units() -> None:
    def found(rms: Any, mean: Any, absmax: Any) -> list[Anomaly]:
        count = len(rms)
        metrics = {"rms": rms, "mean": mean, "absmax": absmax}
        series = {f"activation/0/{name}": values for name, values in metrics.items()}
        series |= {"activation/1/rms": np.ones(count), "parameter/1.weight/rms": np.ones(count)}
        return list(saturated_units(record(series)))

    one = np.ones(20)
    half = 0.5 + 0.01 * NOISE[:20]
    assert told(found(np.sqrt(half - 1e-4), half, one)) == [("saturation", "high", "0", 0)]
    assert told(found(0.995 * one, 0.01 * NOISE[:20], one)) == [("saturation", "medium", "0", 0)]
    assert not found(0.55 * one, half, 0.8 * one)  # an open sigmoid
    assert not found(0.4 * one, 0.16 + 0.01 * NOISE[:20], one)  # a hyperbolic tangent
    assert not found(np.sqrt(0.1) * one, 0.1 * one, one)  # one of ten, always


def test_outputs_that_became_alike() -> None:
    spreads = np.concatenate([noisy(0.6, 30), noisy(0.004, 30)])
    (found,) = alike_outputs(record({"model_output/output/spread": spreads}))
    assert told([found]) == [("output_collapse", "high", "output", 30)]
    assert not list(alike_outputs(record({"model_output/output/spread": noisy(0.01)})))


# Weights


def test_all_weights_that_shrink_together() -> None:
    steps = np.arange(60)
    series = {f"parameter/{n}.weight/rms": 0.1 * 0.97**steps for n in range(4)}
    (found,) = decaying_parameters(record(series))
    assert (found.kind, found.severity, found.step) == ("parameter_decay", "medium", 4)
    mixed = series | {f"parameter/{n}.weight/rms": 0.1 * 1.01**steps for n in (1, 2)}
    assert not list(decaying_parameters(record(mixed)))
    gains = {f"parameter/norm{n}.weight/rms": 0.97**steps for n in range(3)}
    (found,) = decaying_parameters(record(mixed | gains))
    assert "gains of normalisations" in found.text


def test_something_else_writes_to_a_parameter() -> None:
    sizes = np.where(np.arange(40) < 20, 0.1, 30.0)
    moves = np.full(40, 0.01)
    series = {"parameter/0.weight/rms": sizes, "update/0.weight/relative_norm": moves}
    assert told(list(jumping_parameters(record(series)))) == [
        ("parameter_jump", "high", "0.weight", 20)
    ]
    moves[20] = 400.0  # its optimizer did
    assert not list(jumping_parameters(record(series)))


def test_a_bias_that_changes_its_sign_was_written_to_by_its_optimizer() -> None:
    values = np.linspace(0.1, -0.1, 40) + 2e-3  # it passes through zero in one step
    moves = np.abs(np.diff(values, prepend=0.107)) / np.abs(np.append(0.107, values[:-1]))
    for every in (1, 2, 3, 10):
        for first in range(every):
            sizes = np.abs(values)[first::every]
            series = {
                "parameter/0.bias/rms": sizes,
                "update/0.bias/relative_norm": moves[first::every],
            }
            steps = np.arange(40)[first::every]
            recorded = RecordedSeries({key: (steps, some) for key, some in series.items()})
            assert not list(jumping_parameters(recorded))
    moves = np.full(40, 0.02)
    sizes = np.where(np.arange(40) < 20, 0.1, 0.001)
    series = {"parameter/0.bias/rms": sizes, "update/0.bias/relative_norm": moves}
    assert [found.step for found in jumping_parameters(record(series))] == [20]


@pytest.mark.parametrize("left", [0.0, 1e-3])
def test_weights_that_were_zeroed(left: float) -> None:
    """They are measured after the step that follows, whose update is all that there is."""
    sizes = np.where(np.arange(40) < 20, 0.2, left * (np.arange(40) - 19))
    moves = np.full(40, 0.01)
    if left:
        moves[20:] = [np.inf, *1 / np.arange(1, 20)]
    series = {"parameter/0.weight/rms": sizes, "update/0.weight/relative_norm": moves}
    assert told(list(jumping_parameters(record(series)))) == [
        ("parameter_jump", "high", "0.weight", 20)
    ]
    growing = {key: values[20:] for key, values in series.items()}  # a layer that begins at zero
    assert not list(jumping_parameters(record(growing)))


# Gradients


def test_gradients_that_are_always_clipped() -> None:
    (found,) = clipped_gradients(record({"step/gradient_norm": [0.5] * 40}))
    assert (found.kind, found.severity) == ("gradient_clipped", "low")
    assert not list(clipped_gradients(record({"step/gradient_norm": noisy(0.5)})))
    assert not list(clipped_gradients(record({"step/gradient_norm": [0.5, 0.2] * 20})))


def test_gradients_that_were_not_divided() -> None:
    after = np.arange(60) >= 30
    series = {
        f"gradient/{n}.weight/norm": noisy(1.0, seed=n) * np.where(after, 5.0, 1.0)
        for n in range(4)
    }
    loss = {"loss": noisy(2.0, seed=9)}
    more = {"model_input/x/elements": np.where(after, 800.0, 100.0)}
    (found,) = multiplied_gradients(record(series | loss | more))
    assert told([found]) == [("gradient_scale", "medium", "all parameters", 30)]
    assert "8 times as many items" in found.text
    (found,) = multiplied_gradients(record(series | loss))
    assert "the loss is multiplied" in found.text
    risen = {"loss": np.where(after, 10.0, 2.0)}
    assert not list(multiplied_gradients(record(series | risen)))
    assert not list(multiplied_gradients(record({key: v[:30] for key, v in series.items()})))


@pytest.mark.parametrize(
    "norms",
    [
        [0.32, 0.31, 0.62, 1.27, 2.89, 2.43, 15.9, 5.43, 5.04],
        [0.32, 0.47, 2.44, 11.6, 3.78, 2.46, 3.89, 5.45, 4.1],
        [0.3, 0.31, 0.3, 0.32, 0.3, 0.31, 1.0, 2.9, 2.4, 5.0, 5.4],
    ],
)
def test_gradients_of_a_training_that_takes_off_were_not_multiplied(norms: list[float]) -> None:
    norms = [*norms, *noisy(4.0, 40)]
    series = {f"gradient/{n}.weight/norm": noisy(1.0, len(norms), seed=n) * norms for n in range(4)}
    loss = {"loss": np.linspace(5.5, 3.5, len(norms))}
    assert not list(multiplied_gradients(record(series | loss)))


def test_gradients_that_are_lost_on_their_way_down() -> None:
    after = np.arange(40) >= 20
    series: dict[str, Any] = {}
    for n in range(4):
        series[f"activation/{n}/rms"] = np.ones(40)
        series[f"parameter/{n}.weight/rms"] = np.full(40, 0.1)
    for n in range(4):
        lost = np.where(after & (n < 2), 1e-6, 1.0)
        series[f"gradient/{n}.weight/norm"] = noisy(0.1, 40, seed=n) * lost
    assert told(list(lost_gradients(record(series)))) == [
        ("gradient_vanishing", "medium", "1.weight", 20)
    ]


# Attention and losses


def test_a_head_that_comes_to_give_all_to_the_first_key() -> None:
    masses = np.concatenate([noisy(0.1, 20), np.full(20, 0.99)])
    (found,) = attention_sinks(record({"attention_sink_mass/a.head_0": masses}))
    assert told([found]) == [("attention_sink", "medium", "a.head_0", 20)]
    assert not list(attention_sinks(record({"attention_sink_mass/a.head_0": [0.99] * 40})))


def test_a_collapse_that_comes_gradually_becomes_high() -> None:
    entropies = np.concatenate([np.full(10, 2.0), 2.0 * 0.7 ** np.arange(40)])
    (found,) = collapsed_attention(record({"attention_entropy/a.head_0": entropies}))
    assert found.severity == "high"
    (found,) = collapsed_attention(record({"attention_entropy/a.head_0": entropies[:25]}))
    assert found.severity == "medium"


def test_what_is_left_of_a_loss_may_vary() -> None:
    learned = np.concatenate([noisy(2.0, 20), noisy(1e-3, 40)])
    spike, drop = learned.copy(), learned.copy()
    spike[50], drop[50] = 0.05, 1e-5
    assert not list(loss_spikes(record({"loss": spike})))
    assert [a.step for a in loss_drops(record({"loss": drop}))] in ([], [20])
