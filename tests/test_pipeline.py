"""Pipelines on several processes against the same model on one, with the whole batch."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tmm
from tests.interpreters import Interpreters
from tests.pipeline_trainings import EVERY, STEPS, Metrics, alone, entropy, spec, without_functions
from tests.test_distributed import check, launch, result
from tmm.core.module_names import parameter_names, relative_names
from tmm.spec.stages import Stages

SCHEDULES = ("gpipe", "one_f_one_b", "interleaved", "zero_bubble", "interleaved_traced")
NAMES = (*SCHEDULES, "attention", "undisturbed_interleaved")
OTHERS = ("of_whole", "without_whole", "evaluated", "counted", "told", "differences", "recorded")
COMPILED = ("compiled", "interleaved_compiled", "blocks_compiled")
MORE = ("summed", "exported", "attention_compiled", "zero_bubble_traced")
LONGER = ("undisturbed", "undisturbed_compiled")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    return launched(tmp_path_factory, interpreters, 2, *NAMES, *OTHERS)


def launched(
    factory: pytest.TempPathFactory, interpreters: Interpreters, ranks: int, *names: str
) -> Path:
    folder = factory.mktemp("pipeline")
    done = launch(interpreters, ranks, folder, names, "tests.pipeline_trainings")
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def whole() -> Metrics:
    return alone()


def measured(folder: Path, name: str) -> Metrics:
    return {step: values for step, values in result(folder, name).items() if step >= 0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_are_those_of_the_whole_model_and_batch(two: Path, whole: Metrics, name: str) -> None:
    check(measured(two, name), whole)


def test_attention_has_the_names_of_the_whole_model(two: Path) -> None:
    check_attention(measured(two, "attention"))


def check_attention(found: Metrics) -> None:
    expected = alone(tmm.Spec(entropy(), every=EVERY))
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        assert "attention_entropy/layers.3.head_1" in values
        for key, value in values.items():
            assert found[step][key] == pytest.approx(value, rel=1e-5), key


def test_the_training_is_not_disturbed(two: Path) -> None:
    """Losses, gradients, parameters and random state are those without tmm, bit for bit."""
    check_undisturbed(two, "undisturbed_interleaved")


def check_undisturbed(folder: Path, name: str) -> None:
    for of_rank in result(folder, name)[0]["equal"]:
        for same, count in of_rank:
            assert same
            assert count > 100


def test_stages_made_of_the_modules_of_a_model(two: Path, whole: Metrics) -> None:
    check(measured(two, "of_whole"), whole)


def test_stages_whose_names_tell_nothing(two: Path, whole: Metrics) -> None:
    found = result(two, "without_whole")
    values = found[0]
    pairs = {"stages.0.2": "layers.1", "stages.1.0": "layers.2", "stages.1.3": "head"}
    for name, known in pairs.items():
        key = f"activation/{name}/rms"
        assert values[key] == pytest.approx(whole[0][f"activation/{known}/rms"], rel=1e-5)
    key = "gradient/stages.1.0.mix.weight/norm"
    assert values[key] == pytest.approx(whole[0]["gradient/layers.2.mix.weight/norm"], rel=1e-5)
    assert "step/gradient_norm/stages.1" in values
    assert "module=model gives them those of a model" in found[-1]["explained"]


def test_evaluations_of_the_schedule_are_kept_apart(two: Path, whole: Metrics) -> None:
    check(measured(two, "evaluated"), whole)


def test_collectives_of_a_step(two: Path) -> None:
    found = result(two, "counted")
    assert found[1] == found[3] == {}
    assert found[2] == {"maximum": 1, "total": 2, "payloads": 1}
    assert found[0] == {"maximum": 2, "total": 2, "payloads": 1, "everything": 1}


def test_parameters_against_those_of_the_beginning(two: Path) -> None:
    rule = tmm.parameter_difference("norm")
    expected = alone(tmm.Spec(rule, reference="init", every=EVERY))
    for found in result(two, "differences").values():
        for step, values in expected.items():
            assert found[step].keys() == values.keys()
            for key, value in values.items():
                assert found[step][key] == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_what_users_are_told(two: Path) -> None:
    texts = result(two, "told")[0]
    assert "give the schedule of torch.distributed.pipelining" in texts["stages without schedule"]
    assert "matches none of the 37 modules" in texts["no such module"]
    assert "stage 0 of the schedule holds scale, which is no parameter" in texts["another model"]
    assert "a stage of a pipeline has no inputs of the reference" in texts["reference"]
    assert "parts= goes with a step function" in texts["parts"]
    assert "the model is not instrumented" in texts["monitor"]
    assert "the model is instrumented already" in texts["twice"]
    assert texts["clean"]


def test_one_run_has_the_rows_of_all_stages(two: Path, whole: Metrics) -> None:
    (record,) = (record for record in tmm.list_runs(two) if record.project == "pipeline")
    assert record.status == "finished"
    with tmm.open_run(record.path) as run:
        assert run.info["model"].startswith("Model in 4 stages of 37 modules and 8,987 parameters")
        for key in ("activation/head/rms", "gradient/layers.2.mix.weight/norm", "loss"):
            expected = [whole[step][key] for step in range(0, STEPS, EVERY)]
            np.testing.assert_allclose(run.series(key)[1], expected, rtol=1e-5, err_msg=key)
        outputs = [key for key in run.keys("activation/") if key.endswith("/rms")]  # in their order
        layers = [key.split(".")[1][0] for key in outputs if key.startswith("activation/layers")]
        assert layers == sorted(layers)
        assert outputs[-1] == "activation/[root module]/rms"
        keys = set(run.keys())
        assert {"model_input/x/rms", "model_output/output/spread"} <= keys
        assert not [key for key in keys if "stage" in key]


def test_a_rank_that_dies_leaves_the_steps_before(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    begun = time.monotonic()
    done = launch(interpreters, 2, tmp_path, ["killed"], "tests.pipeline_trainings")
    assert done.returncode != 0
    assert time.monotonic() - begun < 120
    (record,) = tmm.list_runs(tmp_path)
    assert record.status in ("crashed", "failed")
    with tmm.open_run(record.path) as run:
        for step in (0, 1):
            assert {"activation/embedding/rms", "activation/head/rms"} <= set(run.at(step))


@pytest.mark.slow
def test_a_frozen_rank_is_waited_for_as_long_as_the_training_would(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    launch(interpreters, 2, tmp_path, ["frozen"], "tests.pipeline_trainings")
    assert "Timed out waiting 12000ms" in torch.load(tmp_path / "frozen-0.pt")["error"]
    (record,) = tmm.list_runs(tmp_path)
    assert record.status == "failed"
    with tmm.open_run(record.path) as run:
        for step in (0, 1):
            assert {"activation/embedding/rms", "activation/head/rms"} <= set(run.at(step))
        partial = [event.step for event in run.events if event.kind == "partial"]
        assert set(partial) <= {2}


@pytest.mark.slow
def test_further_ways(
    tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters, whole: Metrics
) -> None:
    folder = launched(tmp_path_factory, interpreters, 2, *COMPILED, *MORE, *LONGER)
    for name in LONGER:
        check_undisturbed(folder, name)
    check_attention(measured(folder, "attention_compiled"))
    for name in ("summed", *COMPILED):
        check(measured(folder, name), whole)
    # What graphs cannot give is missing, and not wrong.
    found, expected = measured(folder, "zero_bubble_traced"), alone(spec(entropy()))
    gradients = {key for key in expected[0] if key.startswith("activation_gradient/")}
    check(
        {
            step: {k: v for k, v in values.items() if k not in gradients}
            for step, values in found.items()
        },
        expected,
        expected[0].keys() - gradients,
    )
    explained = result(folder, "zero_bubble_traced")[-1]["explained"]
    assert "backward passes in two parts" in explained
    # torch.export keeps no lists of layers, which norms of blocks go by.
    blocks = {key for key in whole[0] if key.startswith("step/gradient_norm/layers")}
    exported = {
        step: {key: value for key, value in values.items() if key not in blocks}
        for step, values in measured(folder, "exported").items()
    }
    check(exported, whole, whole[0].keys() - blocks)


@pytest.mark.slow
def test_four_ranks(
    tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters, whole: Metrics
) -> None:
    """Four stages, and two whose ranks have parts of the batch, or of the layers."""
    names = ("one_f_one_b", "compiled", "ddp", "fsdp")
    folder = launched(tmp_path_factory, interpreters, 4, *names, "tensor_parallel")
    for name in names:
        check(measured(folder, name), whole)
    check(measured(folder, "tensor_parallel"), alone(without_functions()))


# Names, without processes


class Listed(nn.Module):
    """A list of layers that is called as a whole, and a module that all stages have."""

    def __init__(self, layers: Mapping[str, nn.Module], **further: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(layers))
        self.rotary = nn.Identity()
        for name, module in further.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(self.rotary(x))
        return result


def stages_of(
    parts: Mapping[int, nn.Module], rank: list[int], whole: nn.Module | None = None
) -> Stages:
    """Those of a rank, which has the stages of these numbers."""
    told: list[Any] = []

    def exchange(own: object) -> list[Any]:
        return [own, *told]

    others = {index: part for index, part in parts.items() if index not in rank}
    if others:
        Stages(others, len(parts), whole, lambda own: told.append(own) or [own])  # type: ignore[func-returns-value]
    return Stages({index: parts[index] for index in rank}, len(parts), whole, exchange)


def lists() -> dict[int, nn.Module]:
    return {
        0: Listed({"0": nn.Linear(2, 2), "1": nn.ReLU()}),
        1: Listed({"2": nn.Linear(2, 2)}, head=nn.Linear(2, 2)),
    }


def test_a_list_that_is_cut_is_whole_in_its_last_part() -> None:
    first, last = stages_of(lists(), [0]), stages_of(lists(), [1])
    names = ["[root module]", "layers", "layers.0", "layers.1", "rotary", "layers.2", "head"]
    for stages in (first, last):
        assert sorted(stages.modules_of_all()) == sorted(names)
        assert not stages.are_apart
    assert first.unnamed() == {"[stage 0]", "layers[stage 0]"}
    assert last.unnamed() == frozenset()
    own = {"layers.0.weight", "layers.0.bias"}
    assert {name for name, _ in parameter_names(first).values()} == own
    assert set(first.parameters_of_all()) - own == {
        name for name, _ in parameter_names(last).values()
    }
    assert [first.stage_of(f"activation/{name}") for name in ("layers.1[0]", "head")] == [0, 1]
    assert first.stage_of("activation/[root module][1]") == 1
    assert first.stage_of("step/gradient_norm") == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: {0: nn.Sequential(nn.Linear(2, 2)), 1: nn.Sequential(nn.Linear(2, 2))},
        lambda: {0: nn.Linear(2, 2), 1: nn.Linear(2, 2)},
        lambda: {
            0: nn.Sequential(nn.ReLU(), nn.Linear(2, 2)),
            1: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        },
    ],
    ids=["lists", "layers", "other places"],
)
def test_equal_names_of_several_stages(make: Callable[[], dict[int, nn.Module]]) -> None:
    """Rows of different modules are never joined."""
    parts = make()
    stages = stages_of(parts, [0, 1])
    assert stages.are_apart
    names = list(relative_names(stages).values())
    assert len(names) == len(set(names))
    assert all(name.startswith(("stages.0", "stages.1")) for name in names)
    assert not stages.unnamed()
    assert len(stages.parameters_of_all()) == 4
    assert all(name.startswith("stages.") for name, _ in parameter_names(stages).values())


def test_names_of_a_whole_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.ReLU()})
    parts = {0: nn.Sequential(model["a"]), 1: nn.Sequential(model["b"], model["c"], model["a"])}
    stages = stages_of(parts, [0, 1], model)
    assert not stages.are_apart
    assert {name for name, _ in parameter_names(stages).values()} == {
        *("a.weight", "a.bias", "b.weight", "b.bias")
    }
    assert set(relative_names(stages).values()) == {"[stage 0]", "a", "b", "c", ""}
    with pytest.raises(ValueError, match="stage 1 of the schedule holds 0.weight, which is no"):
        stages_of({0: model["a"], 1: nn.Sequential(nn.Linear(2, 2))}, [0, 1], model)
