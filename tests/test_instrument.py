"""Attaching, finding and taking off; bad input is answered with the fix."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tmm

RMS = tmm.Spec(tmm.activation("rms"))


def compiled(module: nn.Module | None = None, **options: object) -> nn.Module:
    torch._dynamo.reset()
    if module is None:
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return torch.compile(module, **{"backend": "aot_eager", **options})  # type: ignore[call-overload, no-any-return]


def measured(model: nn.Module, x: torch.Tensor) -> dict[str, object]:
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(x)
    return dict(monitor.get_step_metrics())


def test_it_gives_back_the_same_object() -> None:
    model = compiled()
    assert tmm.instrument(model, RMS) is model
    assert isinstance(model, torch._dynamo.eval_frame.OptimizedModule)
    x = torch.randn(2, 4)
    assert set(measured(model, x)) == {
        "activation/0/rms",
        "activation/1/rms",
        "activation/[root module]/rms",
    }
    assert tmm.remove(model) is model
    with pytest.raises(ValueError, match="not instrumented"):
        tmm.monitor(model)
    model(x)
    tmm.instrument(model, RMS)
    assert measured(model, x)


def step(x: torch.Tensor) -> torch.Tensor:
    return x


MODULE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (None, {}, TypeError, "model=None is neither a module nor a function"),
        (torch.compile(step), {}, ValueError, "say whose modules to measure.*module=model"),
        (step, {"module": step}, TypeError, "module=.* is not a torch.nn.Module"),
        (MODULE, {"module": MODULE}, ValueError, "module= goes with a step function"),
        (MODULE, {"parts": [MODULE]}, ValueError, "parts= goes with a step function"),
        (MODULE, {"backend": "fast"}, ValueError, "backend='fast' is not known; there are .*eager"),
        (torch.compile(MODULE), {"backend": "eager"}, ValueError, "this one is, or a part of it"),
        (
            torch.compile(step),
            {"backend": "eager", "module": MODULE},
            ValueError,
            "this one is, or a part of it",
        ),
    ],
)
def test_what_cannot_be_instrumented(
    model: nn.Module, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tmm.instrument(model, RMS, **options)
    with pytest.raises(ValueError, match="not instrumented"):
        tmm.monitor(MODULE)


def test_twice_says_so() -> None:
    model = tmm.instrument(compiled(), RMS)
    with pytest.raises(ValueError, match="instrumented already"):
        tmm.instrument(model, RMS)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="not a tmm.Spec"):
        tmm.instrument(compiled(), tmm.activation("rms"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error='ignore'"):
        tmm.instrument(compiled(), RMS, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches none of the 3 modules"):
        tmm.instrument(compiled(), tmm.Spec(tmm.activation("rms", modules="attn")))
    for call in (tmm.monitor, tmm.remove, tmm.explain):
        with pytest.raises(ValueError, match="call tmm.instrument"):
            call(compiled())


def test_a_wrong_spec_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches none"):
        tmm.instrument(compiled(), tmm.Spec(tmm.activation("rms", modules="x")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_whose_compilation_is_disabled_is_measured_eagerly() -> None:
    model = tmm.instrument(torch.compiler.disable(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), RMS)
    assert len(measured(model, torch.randn(2, 4))) == 3
    assert set(tmm.explain(model).eager) == {"[root module]", "0", "1"}
    assert not tmm.explain(model).graphs


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None


class Integers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Sequential()])
def test_modules_without_parameters(module: nn.Module) -> None:
    model = tmm.instrument(compiled(module), RMS)
    x = torch.randn(3, 4)
    expected = module(x).square().mean().sqrt().item()
    assert measured(model, x) == {"activation/[root module]/rms": pytest.approx(expected)}


def test_modules_without_anything_to_measure() -> None:
    model = tmm.instrument(compiled(Nothing()), RMS)
    assert measured(model, torch.randn(3, 4)) == {}
    model = tmm.instrument(compiled(Integers()), RMS)
    assert measured(model, torch.randn(3, 4)) == {}
    assert tmm.explain(model).unmeasured == {"[root module]": "int64 output"}
    assert "[root module]: int64 output" in str(tmm.explain(model))


def test_copies_and_pickles_are_clean() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = tmm.instrument(compiled(module), RMS)
    keys = list(torch.compile(module).state_dict())
    assert list(model.state_dict()) == keys
    measured(model, torch.randn(2, 4))
    for clean in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="not instrumented"):
            tmm.monitor(clean)
        with torch.no_grad():
            clean._orig_mod[0].weight.zero_()
            clean._orig_mod[0].bias.fill_(7)
        assert clean(torch.ones(1, 4)).tolist() == [[7] * 4]
    assert pickle.loads(pickle.dumps(module))[0].weight.ne(0).any()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_options_of_the_user_reach_the_twin() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(len(graph.graph.output_node().args[0]))
        return graph.forward

    model = compiled(backend=backend, fullgraph=True, dynamic=True)
    tmm.instrument(model, RMS)
    for length in (2, 3, 5):
        model(torch.randn(length, 4))
        measured(model, torch.randn(length, 4))
    assert seen == [1, 2]


def test_fullgraph_stays_fullgraph() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    model = tmm.instrument(compiled(Breaks(), fullgraph=True), RMS)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        measured(model, torch.randn(1))


def test_a_step_in_parts_runs_as_it_stands() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    traced = []

    def train(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return module[1](module[0](x))

    step = tmm.instrument(train, RMS, module=module, parts=[module[0]])
    x = torch.randn(4, 2)
    with tmm.monitor(step).step(0):
        output = step(x)
    assert traced == [False]
    metrics = tmm.monitor(step).get_step_metrics()
    assert metrics["activation/1/rms"] == pytest.approx(output.detach().square().mean().sqrt())
    assert "activation/0/rms" in metrics
    assert not tmm.explain(step).graphs
    assert tmm.remove(step) is train
