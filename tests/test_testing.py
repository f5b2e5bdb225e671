"""``tmm.testing`` passes what is right and names what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.ways import WAYS, Way
from tmm.instrumentation.eager_rows import EagerRows
from tmm.runtime import eager_functions as eager
from tmm.testing import assert_matches_hooks
from tmm.testing.eager_hooks import Recording

SPEC = tmm.Spec(
    tmm.activation("rms", "histogram"),
    tmm.activation(largest=lambda x: x.abs().amax(-1), modules=r"layers\.0", aggregate="sum"),
    tmm.activation_gradient("rms"),
    tmm.gradient("norm"),
    tmm.parameter("rms"),
    every=3,
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        hidden = self.layers(x * scale)
        return {"hidden": hidden, "out": self.head(hidden)}


BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", [w for w in WAYS.values() if w.name != "compiled step"], ids=str)
def test_every_row_of_a_right_model_agrees_and_the_model_is_left_as_it_was(way: Way) -> None:
    module = Network()
    module.head.weight.grad = torch.ones_like(module.head.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    model = way.apply(module, "aot_eager")
    rows = assert_matches_hooks(model, BATCH, SPEC)
    assert {key.partition("/")[0] for key in rows} == {rule.family for rule in SPEC.rules}
    assert torch.equal(torch.get_rng_state(), random_state)
    after = module.state_dict()
    values = {name.replace("_orig_mod.", ""): value for name, value in after.items()}
    assert all(torch.equal(before[name], value) for name, value in values.items())
    grad = module.head.weight.grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert module.head.bias.grad is None
    tmm.instrument(model, SPEC)  # it is not instrumented any more


@pytest.mark.parametrize(
    "batch", [{"x": BATCH, "scale": 0.5}, (BATCH, 0.5), (BATCH,)], ids=["mapping", "tuple", "one"]
)
def test_a_batch_is_passed_as_the_model_takes_it(batch: Any) -> None:
    assert_matches_hooks(Network(), batch, SPEC, loss=lambda output: output["out"].mean())


def test_a_value_that_is_wrong_by_more_than_the_tolerance_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = eager.reduce_eagerly
    monkeypatch.setattr(
        "tmm.instrumentation.eager_rows.reduce_eagerly",
        lambda *given: right(*given) * (1 + 1e-3),
        raising=True,
    )
    spec = tmm.Spec(tmm.activation("norm"))
    model = broken(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(AssertionError, match=r"(?s)activation/.*norm: got .* want"):
        assert_matches_hooks(model, BATCH, spec)
    assert_matches_hooks(model, BATCH, spec, tolerance=1e-2)


def broken(module: nn.Module) -> nn.Module:
    """Compiled in a way that leaves everything outside of graphs."""
    return torch.compile(Disabled(module), backend="aot_eager")  # type: ignore[return-value]


class Disabled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def run(self, x: torch.Tensor) -> Any:
        return self.inner(x)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(x)


def test_a_missing_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(*given: Any) -> None:
        return None

    monkeypatch.setattr(EagerRows, "_add", forget)
    with pytest.raises(AssertionError, match=r"missing: activation/inner\.0/norm"):
        assert_matches_hooks(
            broken(nn.Sequential(nn.Linear(4, 2))), BATCH, tmm.Spec(tmm.activation("norm"))
        )


def test_a_superfluous_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "add", lambda *given: None)
    with pytest.raises(AssertionError, match=r"superfluous|nothing was measured"):
        assert_matches_hooks(nn.Linear(4, 2), BATCH, tmm.Spec(tmm.activation("norm")))


def test_what_hooks_do_not_see_is_refused() -> None:
    spec = tmm.Spec(tmm.activation("rms"), tmm.rcc(), reference="init")
    with pytest.raises(ValueError, match=r"tmm\.rcc\(\): plain hooks do not see it"):
        assert_matches_hooks(Network(), BATCH, spec)
    with pytest.raises(TypeError, match="is not a torch.nn.Module"):
        assert_matches_hooks(torch.relu, BATCH, SPEC)  # type: ignore[arg-type]
    model = tmm.instrument(Network(), SPEC)
    with pytest.raises(ValueError, match="instrumented already"):
        assert_matches_hooks(model, BATCH, SPEC)


def test_what_runs_without_gradients_does_not_cut_them() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            with torch.no_grad():
                y = self.same(y)
            output: torch.Tensor = self.last(y)
            return output

    rows = assert_matches_hooks(
        torch.compile(Looks(), backend="aot_eager"),  # type: ignore[arg-type]
        BATCH,
        tmm.Spec(tmm.activation_gradient("rms"), tmm.gradient("norm")),
    )
    assert rows["gradient/first.weight/norm"] > 0


def test_arguments_that_cannot_be_are_named() -> None:
    model, batch = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(TypeError, match="is not a tmm.Spec"):
        assert_matches_hooks(model, batch, tmm.activation("rms"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tolerance=-1"):
        assert_matches_hooks(model, batch, tmm.Spec(tmm.activation("rms")), tolerance=-1)
