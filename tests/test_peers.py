"""The scoring of other tools, without them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from benchmarks.diagnosis.faults import FAULTS
from benchmarks.diagnosis.models import Batch, mlp
from benchmarks.diagnosis.peers import CLIPS_AT, claims, in_peace, judge, plantings, reason, watch
from benchmarks.diagnosis.tools import TOOLS, WITHOUT_ADAPTER, Statement, Tool
from benchmarks.diagnosis.training import Training


class Toy(Tool):
    """Says how large the gradient of the middle layer is, at two steps."""

    package = distribution = "a_toy_tool"
    used = "as it is"
    words: ClassVar[Mapping[str, str]] = {
        "large": "gradient_explosion gradient_scale",
        "odd": "",
    }
    entered: ClassVar[list[int]] = []

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        self.entered.append(step)
        yield

    def on_gradients(self, step: int, batch: Batch) -> None:
        assert batch[0].shape == (32, 16)
        gradient = self.model.get_submodule("2").weight.grad
        assert isinstance(gradient, torch.Tensor)
        if gradient.norm() > 100:
            self.say("large", "2.weight", step)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    monkeypatch.setitem(sys.modules, "a_toy_tool", ModuleType("a_toy_tool"))
    monkeypatch.setattr(Toy, "entered", [])
    return Toy


def trained(fault: str) -> Training:
    torch.manual_seed(0)
    training = Training(mlp(0), 0, steps=34)
    FAULTS[fault].plant(training)
    return training


def test_a_tool_sees_what_the_optimizer_gets_and_is_right_from_the_onset(toy: type[Toy]) -> None:
    training = trained("gradient_of_layer_explodes")
    said = watch(toy, training, None)
    assert min(one.step for one in said) == 30
    assert toy.entered == list(range(34))
    assert judge(said, toy, FAULTS["gradient_of_layer_explodes"], training) == (True, True)


def test_a_tool_watches_each_start_of_a_training_that_is_resumed(toy: type[Toy]) -> None:
    assert watch(toy, trained("optimizer_state_lost"), None) == []
    assert toy.entered == list(range(34))


def test_a_statement_is_true_by_kind_place_and_step(toy: type[Toy]) -> None:
    fault, training = FAULTS["gradient_of_layer_explodes"], trained("gradient_of_layer_explodes")
    right = Statement("large", "2.weight", 30)
    assert judge([], toy, fault, training) == (False, False)
    assert judge([right], toy, fault, training) == (True, True)
    assert judge([Statement("odd", "2", 3), right], toy, fault, training) == (False, True)
    assert judge([Statement("large", "4.weight", 30)], toy, fault, training) == (False, False)
    assert judge([Statement("large", "2.weight", 3)], toy, fault, training) == (False, False)
    assert judge([Statement("large", "", 30)], toy, fault, training) == (True, True)


def test_what_is_found_between_two_checks_counts_as_said_at_once(
    toy: type[Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "every", 10)
    fault, training = FAULTS["gradient_of_layer_explodes"], trained("gradient_of_layer_explodes")
    said = [Statement("odd", "2", 30), Statement("large", "2.weight", 39)]
    assert judge(said, toy, fault, training) == (True, True)


def test_words_mean_kinds_of_planted_faults_only() -> None:
    kinds = {kind for fault in FAULTS.values() for kind in fault.kinds}
    for tool in TOOLS:
        for word, meanings in tool.words.items():
            assert set(meanings.split()) <= kinds, (tool.package, word)
        assert tool.used
        assert any(claims(tool, fault) for fault in FAULTS.values())


def test_a_word_without_kinds_is_an_error(toy: type[Toy]) -> None:
    with pytest.raises(KeyError, match="has no kinds"):
        watcher = Toy.__new__(Toy)
        watcher.said = []
        watcher.say("unheard of", "", 0)


def test_a_tool_that_is_not_installed_is_left_out_with_the_reason(toy: type[Toy]) -> None:
    assert reason(toy) is None

    class Missing(Tool):
        package = distribution = "not_to_be_found"
        used = ""
        words: ClassVar[Mapping[str, str]] = {}

    assert reason(Missing) == "ModuleNotFoundError: No module named 'not_to_be_found'"
    assert all(WITHOUT_ADAPTER.values())


def test_the_reduced_set_has_all_faults_and_ten_healthy_trainings() -> None:
    assert {fault.name for fault, _ in plantings()} == set(FAULTS)
    assert len(list(plantings())) == 66
    assert len(list(in_peace())) == 10
    assert set(CLIPS_AT) <= set(FAULTS)
