"""CUDA graphs copy what may move: a monitored program's parameters do not, as the plain one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend

import tmm
from tmm.instrumentation.compile_settings import settings_of


def counting(counts: list[tuple[int, int]]) -> Callable[..., Any]:
    """A backend that notes how many inputs of each forward graph are static, of how many."""

    def forward(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        context = torch._guards.TracingContext.get()
        assert context.fw_metadata is not None
        counts.append((len(context.fw_metadata.static_input_indices), len(inputs)))
        return make_boxed_func(module.forward)

    def backward(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return make_boxed_func(module.forward)

    backend: Callable[..., Any] = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    return backend


@pytest.mark.parametrize("rules", [(), (tmm.activation_gradient("rms"),)])
def test_parameters_are_static_inputs(rules: tuple[tmm.spec.rules.Rule, ...]) -> None:
    counts: list[tuple[int, int]] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    compiled = torch.compile(model, backend=counting(counts))
    tmm.instrument(compiled, tmm.Spec(tmm.activation("rms"), *rules, every=2))
    monitor = tmm.monitor(compiled)
    for step in range(2):
        with monitor.step(step):
            compiled(torch.randn(5, 4)).sum().backward()
    monitored, plain = counts
    assert plain == (9, 10)  # all but the batch
    assert monitored[0] == plain[0]
    tmm.remove(compiled)


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({}, 0),
        ({"reference_dtype": torch.float64}, 6),  # brought over anew in each step
        ({"reference_samples": 3}, 0),
    ],
)
def test_what_a_reference_keeps_in_place_is_static(options: dict[str, Any], differ: int) -> None:
    """Those of both layers and of the normalization; its statistics are kept in place as well."""
    counts: list[tuple[int, int]] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    compiled = torch.compile(model, backend=counting(counts))
    spec = tmm.Spec(tmm.activation_difference("rms"), reference="init", **options)
    tmm.instrument(compiled, spec)
    monitor = tmm.monitor(compiled)
    for step in range(3):
        with monitor.step(step):
            compiled(torch.randn(5, 4)).sum().backward()
    (monitored,) = counts
    static, inputs = monitored
    assert inputs >= 6 + 1 + 6
    assert static == 6 + 6 - differ
    assert all(len(values) for values in monitor.get_all_metrics().values())
    tmm.remove(compiled)


def test_what_lies_elsewhere_moves() -> None:
    from tmm.spec.gathering import Gathering
    from tmm.spec.module_state import ModelState
    from tmm.spec.reference import Reference

    module = nn.Linear(2, 3)
    own = dict(module.named_parameters())
    kept = {"weight": own["weight"].detach().clone(), "bias": torch.ones(3, device="meta")}
    reference = Reference(ModelState(module, everything=False), kept, Gathering(module))
    assert reference.stays(own["weight"])
    assert not reference.stays(own["bias"])  # as with reference_device="cpu" of a model on a GPU
    assert not reference.stays(torch.ones(3))
    assert not reference.stays(None)


@pytest.mark.parametrize(
    ("given", "is_global", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"mode": "reduce-overhead"}, False, True),
        ({"mode": "max-autotune"}, False, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False, False),
        ({"options": {"triton.cudagraphs": True}}, False, True),
        ({"options": {"triton.cudagraphs": False}}, True, False),
        ({"backend": "cudagraphs"}, False, True),
        ({"backend": lookup_backend("cudagraphs")}, False, True),
        ({"backend": "eager"}, True, False),
        ({"backend": "aot_eager"}, True, False),
    ],
)
def test_programs_whose_outputs_are_overwritten(
    given: dict[str, Any], is_global: bool, expected: bool
) -> None:
    from torch._inductor import config

    with config.patch({"triton.cudagraphs": is_global}):
        settings = settings_of(torch.compile(nn.Linear(1, 1), **given))
        assert settings is not None
        assert settings.uses_cuda_graphs is expected


def test_random_states_of_all_accelerators_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from tmm.core.rng import RandomState

    states = {"xpu": torch.tensor([1]), "mps": torch.tensor([2])}
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_rng_state_all", lambda: [states["xpu"].clone()])
    monkeypatch.setattr(torch.xpu, "set_rng_state_all", lambda s: states.update(xpu=s[0]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda s: states.update(mps=s))
    before = RandomState.capture()
    states.update(xpu=torch.tensor([3]), mps=torch.tensor([4]))
    before.restore()
    assert (states["xpu"].item(), states["mps"].item()) == (1, 2)
