"""Passes that trace or transform a model inside of a monitored step leave the step as it is."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import tmm
from tests.eager_hooks import assert_agrees, record_calls, tolerance
from tmm.core.failures import MonitoringWarning

METRICS = ("mean", "rms", "norm")
SPEC = tmm.Spec(tmm.activation(*METRICS))
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(x))
        return result


def uncompiled(module: nn.Module) -> Any:
    return module


def whole(module: nn.Module) -> Any:
    return torch.compile(module, backend="aot_eager")


def in_place(module: nn.Module) -> Any:
    module.compile(backend="aot_eager")
    return module


def blocks(module: Net) -> Any:
    for block in module.blocks:
        block.compile(backend="aot_eager")
    return module


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def operators(graph: torch.fx.GraphModule) -> list[str]:
    """What a traced program calls; nothing of it may be ours."""
    found = [str(node.target) for node in graph.graph.nodes]
    assert not any("tmm" in name for name in found)
    return [name for name in found if name.startswith("aten")]


def exported(model: Any) -> object:
    return operators(torch.export.export(model, (OTHER,)).graph_module)


def exported_strictly(model: Any) -> object:
    return operators(torch.export.export(model, (OTHER,), strict=True).graph_module)


def per_sample(model: Any) -> object:
    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, values, (x[None],))
        return output.sum()

    gradients = vmap(grad(loss), (None, 0))(parameters(model), OTHER)
    return [gradient.sum().item() for gradient in gradients.values()]


def forward_mode(model: Any) -> object:
    return [value.sum().item() for value in jvp(model, (OTHER,), (OTHER,))]


def jacobians(model: Any) -> object:
    return [jacrev(model)(OTHER).sum().item(), jacfwd(model)(OTHER).sum().item()]


def made(model: Any) -> object:
    return operators(make_fx(model)(OTHER))


def symbolic(model: Any) -> object:
    return len(torch.fx.symbolic_trace(model).graph.nodes)


def jit_traced(model: Any) -> object:
    traced = torch.jit.trace(model, (OTHER,), check_trace=False)
    assert "tmm" not in str(traced.inlined_graph)
    return traced(OTHER).sum().item()


def fake(model: Any) -> object:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x = mode.from_tensor(OTHER)
    outside = model(x).shape
    with mode:
        return outside, model(x).shape


def meta(model: Any) -> object:
    values = {name: value.to("meta") for name, value in parameters(model).items()}
    return functional_call(model, values, (OTHER.to("meta"),)).shape


def saved(model: Any) -> object:
    buffer = io.BytesIO()
    torch.save(getattr(model, "_orig_mod", model), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(model)
    return torch.equal(loaded(OTHER), copied(OTHER))


def compiled_by_another(model: Any) -> object:
    return torch.compile(lambda x: model(x).sum(), backend="eager")(OTHER).item()


Pass = Callable[[Any], object]
SAID = (exported, per_sample, forward_mode, jacobians, made, jit_traced, fake, meta)
SILENT = (exported_strictly, symbolic, saved, compiled_by_another)
COMPILED = (whole, in_place, blocks)
COMBINATIONS = [
    *((run, uncompiled) for run in (*SAID, saved)),
    *((run, COMPILED[index % 3]) for index, run in enumerate((*SAID, *SILENT))),
]


def outcome(run: Pass, model: Any) -> object:
    """What a pass gives, or how torch refuses it."""
    try:
        return run(model)
    except Exception as error:
        return type(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("run", "way"), COMBINATIONS)
def test_a_foreign_pass_leaves_the_step_as_it_is(run: Pass, way: Callable[..., Any]) -> None:
    original = Net()
    plain = outcome(run, way(copy.deepcopy(original)))
    torch._dynamo.reset()
    module = copy.deepcopy(original)
    model = tmm.instrument(way(module), SPEC)
    monitor = tmm.monitor(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", MonitoringWarning)
        for step in range(2):
            with monitor.step(step):
                if step == 0:
                    assert outcome(run, model) == plain
                loss = model(X).sum()
                loss.backward()
                if step == 1:
                    assert outcome(run, model) == plain
            want = record_calls(original, [lambda model: model(X)]).expected(METRICS)
            assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))
    said = [item for item in warned if item.category is MonitoringWarning]
    named = [name for name in tmm.explain(model).unmeasured if "under" in name]
    if run in SAID and (run is not made or way is uncompiled):
        assert len(said) == len(named) >= 1
    assert len(said) <= 2  # once for each kind


def test_an_export_inside_of_a_run(tmp_path: Path) -> None:
    net = nn.Linear(8, 2)
    run = tmm.start_run("exports", root=tmp_path)
    model = run.watch(net, tmm.Spec(tmm.activation("rms"), every=2))
    for _ in range(2):
        model(X).sum().backward()
        run.step()
    with pytest.warns(MonitoringWarning, match="under torch.export"):
        operators(torch.export.export(net, (X,)).graph_module)
    run.finish()
    with tmm.open_run(run.path) as recorded:
        assert recorded.steps.tolist() == [0]


def test_a_training_by_torch_func_is_measured() -> None:
    module = Net()
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), SPEC)
    monitor = tmm.monitor(model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (X,)).square().mean()

    with monitor.step(0):
        grad_and_value(loss)(parameters(model))
    want = record_calls(copy.deepcopy(module), [lambda model: model(X)]).expected(METRICS)
    assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))


class Physical(nn.Module):
    """Works with derivatives of a part of itself, of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(vmap(jacrev(self.field))(x).sum(1))
        return result


@pytest.mark.parametrize("where", ["whole", "part"])
def test_derivatives_inside_of_a_model(where: str) -> None:
    module = Physical()
    plain = copy.deepcopy(module)
    if where == "part":
        module.field.compile(backend="aot_eager")
        plain.field.compile(backend="aot_eager")
    model = tmm.instrument(whole(module) if where == "whole" else module, SPEC)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        output = model(X)
    assert torch.equal(output, plain(X))
    values = monitor.get_step_metrics()
    assert {key.split("/")[1] for key in values} == {"head", "[root module]"}
    rms = output.detach().square().mean().sqrt().item()
    assert values["activation/head/rms"] == pytest.approx(rms, rel=1e-6)
    assert any("vmap" in f"{name} {why}" for name, why in tmm.explain(model).unmeasured.items())
