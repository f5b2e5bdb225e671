"""Wrong specs fail with a message that names the rule and the fix; right ones resolve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tmm
from tmm.spec.spec import Plan

NAMES = ["[root module]", "h.0", "h.0.attn", "h.0.mlp", "h.1", "h.1.mlp", "lm_head"]


def rms() -> tmm.Rule:
    return tmm.activation("rms")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: tmm.activation("rmss"), ValueError, "unknown metric 'rmss'.*mean 'rms'.*absmax"),
        (lambda: tmm.activation(), ValueError, "measures nothing"),
        (lambda: tmm.activation("rms", "rms"), ValueError, "'rms' is given twice"),
        (lambda: tmm.activation("rms", rms=abs), ValueError, "'rms' is given twice"),
        (lambda: tmm.activation(abs), TypeError, "as a keyword"),
        (lambda: tmm.activation(mine="rms"), TypeError, "mine='rms' is not callable"),
        (lambda: tmm.activation(**{"a/b": abs}), ValueError, "contains '/'"),
        (lambda: tmm.activation("rms", modules="("), ValueError, "modules='\\('.*regular"),
        (lambda: tmm.activation("rms", aggregate="sum"), ValueError, "aggregate= belongs to"),
        (lambda: tmm.activation("rms", mine=abs, aggregate="sum"), ValueError, "built-in 'rms'"),
        (lambda: tmm.activation(mine=abs, aggregate="median"), ValueError, "'median'.*mean, sum"),
        (lambda: tmm.activation("rms", trace=False), ValueError, "trace=False belongs to"),
        (lambda: tmm.Spec(), ValueError, "no rules"),
        (lambda: tmm.Spec("rms"), TypeError, "'rms' is not a rule"),
        (lambda: tmm.Spec(rms(), every=0), ValueError, "every=0 must be at least 1"),
        (lambda: tmm.Spec(rms(), every=0.5), TypeError, "every=0.5"),
        (lambda: tmm.Spec(rms(), every=True), TypeError, "every=True"),
        (lambda: tmm.Spec(rms(), exclude="["), ValueError, "exclude='\\['"),
        (lambda: tmm.Spec(rms(), exclude=abs), TypeError, "exclude=.*regular expression"),
        (lambda: tmm.Spec(rms(), exclude=["h"]), TypeError, "exclude=.*regular expression"),
        (lambda: tmm.Spec(rms(), every=lambda: True), TypeError, "every=.*one argument"),
        (lambda: tmm.activation(["rms", "norm"]), TypeError, "one by one"),
        (lambda: tmm.activation("rms", module="h"), TypeError, "module='h'.*besides modules="),
        (lambda: tmm.activation("rms", modules=["h"]), TypeError, "one regular expression"),
        (lambda: tmm.activation("rms", modules=torch.nn.Linear), TypeError, "the class Linear"),
        (lambda: tmm.activation("rms", modules=torch.nn.ReLU()), TypeError, "the module ReLU"),
        (lambda: tmm.activation("rms", modules=lambda a, b: a), TypeError, "one argument"),
        (
            lambda: tmm.Spec(rms(), reference_dtype="float16"),
            TypeError,
            "reference_dtype='float16'",
        ),
        (lambda: tmm.Spec(rms(), reference_device="gpu"), ValueError, "reference_device='gpu'"),
        (lambda: tmm.Spec(rms(), on_alert="raise"), ValueError, "without alerts"),
    ],
)
def test_wrong_specs(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_pattern_without_a_match_names_the_nearest_modules() -> None:
    spec = tmm.Spec(tmm.activation("rms", modules=r".*mpl$"))
    with pytest.raises(ValueError, match=r"modules='\.\*mpl\$' matches none.*'h\.[01]\.mlp'"):
        Plan(spec, NAMES)


def test_a_pattern_is_matched_from_the_start_of_the_name() -> None:
    with pytest.raises(ValueError, match="from the start"):
        Plan(tmm.Spec(tmm.activation("rms", modules="mlp")), NAMES)


def test_excluding_everything_is_said() -> None:
    with pytest.raises(ValueError, match="exclude='h' drops everything"):
        Plan(tmm.Spec(tmm.activation("rms", modules="h"), exclude="h"), NAMES)


def test_two_functions_of_one_name() -> None:
    spec = tmm.Spec(tmm.activation(mine=abs), tmm.activation(mine=torch.abs, modules=r"h\.0"))
    with pytest.raises(ValueError, match="both give the metric 'mine' to module 'h.0'"):
        Plan(spec, NAMES)
    spec = tmm.Spec(tmm.activation("rms"), tmm.activation(rms=abs, modules="lm_head"))
    with pytest.raises(ValueError, match="both give the metric 'rms' to module 'lm_head'"):
        Plan(spec, NAMES)


def test_rules_join() -> None:
    spec = tmm.Spec(
        tmm.activation("rms"),
        tmm.activation("absmax", "rms", modules=r"h\.\d+\.mlp"),
        tmm.activation(mine=abs, modules="lm_head", aggregate="max"),
        exclude=r"h\.1",
    )
    plan = Plan(spec, NAMES)
    metrics = {
        name: [m for reduction in plan.select(name, torch.float32) for m in reduction.metrics]
        for name in NAMES
    }
    assert metrics == {
        "[root module]": ["rms"],
        "h.0": ["rms"],
        "h.0.attn": ["rms"],
        "h.0.mlp": ["rms", "absmax"],
        "h.1": [],
        "h.1.mlp": [],
        "lm_head": ["rms", "mine"],
    }
    assert list(plan.matched.values())[1] == ("h.0.mlp",)


def test_every() -> None:
    assert [s for s in range(7) if tmm.Spec(rms(), every=3).is_step_monitored(s)] == [0, 3, 6]
    assert tmm.Spec(rms(), every=lambda step: step in (2, 5)).is_step_monitored(5)
    assert str(tmm.Spec(rms(), every=3)) == "tmm.Spec(tmm.activation('rms'), every=3)"
