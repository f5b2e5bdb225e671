"""``ModuleMonitor`` against torch-module-monitor itself, compiled and not."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_module_monitor as original
from torch import nn
from torch_module_monitor.refined_coordinate_check import (
    RefinedCoordinateCheck as OriginalCheck,
)

import tmm
from tests.module_monitor_loops import (
    LOOPS,
    accumulation,
    coordinate_check,
    make_model,
    together,
)
from tests.ways import Counting

Loop = Callable[..., Any]


def whole(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="aot_eager", fullgraph=True)
    return compiled


def blocks(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def as_it_is(model: nn.Module) -> nn.Module:
    return model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected(loop: Loop, **sizes: int) -> Any:
    """What torch-module-monitor records."""
    original.RefinedCoordinateCheck = OriginalCheck
    return loop(original, as_it_is, **sizes)


def mixed_up(loop: Loop, monitor: Any) -> str:
    """The keys under which torch-module-monitor mixes values of different forward passes."""
    if loop is coordinate_check:
        return "attention_entropy|reference_stat"  # with those of the passes of the check itself
    return "attention_entropy" if monitor.has_reference_module() else "$.^"


def assert_same(own: dict[Any, Any], other: dict[Any, Any], without: str = "$.^") -> None:
    assert own.keys() == other.keys()
    for step in other:
        wanted = {key: value for key, value in other[step].items() if not re.match(without, key)}
        found = {key: value for key, value in own[step].items() if not re.match(without, key)}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(float(value), rel=1e-4, abs=1e-7), (step, key)
            assert isinstance(found[key], float), key


def check_loop(loop: Loop, way: Any, folder: Path, **sizes: int) -> None:
    other = expected(loop, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        own = loop(tmm, way, **sizes)
    assert_same(own.get_all_metrics(), other.get_all_metrics(), mixed_up(loop, own))
    assert len(own.get_all_metrics()[2]) > 7 * sizes.get("blocks", 2)
    assert own.get_all_metrics()[2]
    for condensed in (True, False):
        own.storage.save_hdf5(folder / "run.h5", condensed=condensed)
        saved = tmm.StorageManager.load_hdf5(folder / "run.h5")
        kept = own.storage.condensed_log_dict() if condensed else own.storage.log_dict
        assert saved == kept
    assert set(own.module_names.values()) == set(other.module_names.values())


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_documented_loops(loop: Loop, tmp_path: Path) -> None:
    # Micro-batches of another size are compiled again, for any size, which takes long.
    check_loop(loop, as_it_is, tmp_path, blocks=1 if loop is accumulation else 2)


@pytest.mark.parametrize(
    ("loop", "way"),
    [(coordinate_check, whole), (accumulation, in_place)],
    ids=lambda function: function.__name__,
)
def test_documented_loops_with_a_reference_compiled(loop: Loop, way: Any, tmp_path: Path) -> None:
    check_loop(loop, way, tmp_path, blocks=1)


def test_the_other_documented_loops_at_once_compiled(tmp_path: Path) -> None:
    check_loop(together, whole, tmp_path, blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", [whole, blocks, in_place], ids=lambda way: way.__name__)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_documented_loops_compiled_in_every_way(loop: Loop, way: Any, tmp_path: Path) -> None:
    check_loop(loop, way, tmp_path)


def inductor(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    return compiled


def test_inductor(tmp_path: Path) -> None:
    check_loop(coordinate_check, inductor, tmp_path, blocks=0)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [coordinate_check, accumulation], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("count", [1, 2])
def test_inductor_with_attention_and_micro_batches(loop: Loop, count: int, tmp_path: Path) -> None:
    check_loop(loop, inductor, tmp_path, blocks=count)


# Single behaviours


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 2, bias=False),
        )

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.norm(self.fc1(x)).relu()) * scale
        return y


def monitor_of(model: nn.Module, **options: Any) -> tmm.ModuleMonitor:
    monitor = tmm.ModuleMonitor(**{"monitor_step_fn": lambda step: True, **options})
    monitor.set_module(model)
    return monitor


def measure(monitor: tmm.ModuleMonitor, model: nn.Module, *batches: torch.Tensor) -> dict[str, Any]:
    monitor.begin_step(0 if monitor.current_step is None else monitor.current_step + 1)
    for batch in batches:
        model(batch)
    monitor.end_step()
    return monitor.get_step_metrics()


def moved(model: nn.Module) -> nn.Module:
    """A copy with other parameters."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("compiled", [False, True])
def test_a_reference_that_was_given_other_inputs(compiled: bool) -> None:
    torch.manual_seed(0)
    own = Two()
    reference, x, y = moved(own), torch.randn(3, 4), torch.randn(3, 4)
    model, called_reference = (
        (torch.compile(m, backend="aot_eager") if compiled else m) for m in (own, reference)
    )
    monitor = monitor_of(model)
    monitor.set_reference_module(called_reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    check = tmm.RefinedCoordinateCheck(monitor)

    def step(number: int, *given: torch.Tensor) -> dict[str, Any]:
        monitor.begin_step(number)
        for batch in given:
            called_reference(batch)
        model(x)
        check.refined_coordinate_check()
        monitor.end_step()
        return monitor.get_step_metrics()

    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        same = step(0, x.clone())
        assert step(1) == same
    with pytest.warns(tmm.MonitoringWarning, match="given another x than the monitored module"):
        other = step(2, y)
    root = "activation_difference/[root module]/l2"
    with torch.no_grad():
        for found, given in ((same, x), (other, y)):
            difference = (own(x) - reference(given)).norm(dim=-1).mean()
            assert found[root] == pytest.approx(difference.item(), rel=1e-5)
            change = (x - given).norm(dim=-1).mean()
            assert found["RCC (x_t-x_0)/fc1/l2norm"] == pytest.approx(change.item(), rel=1e-5)
            term = (reference.fc1(x) - reference.fc1(given)).norm(dim=-1).mean()
            assert found["RCC W_0(x_t-x_0)/fc1/l2norm"] == pytest.approx(term.item(), rel=1e-5)
            normal = nn.functional.layer_norm(own.fc1(x), (6,))
            normal -= nn.functional.layer_norm(reference.fc1(given), (6,))
            key = "RCC W_0(x_t-x_0)/norm.weight/x_t-x_0/l2norm"
            assert found[key] == pytest.approx(normal.norm(dim=-1).mean().item(), rel=1e-4)
    assert other.keys() == same.keys()
    assert step(3, x) == same


def test_a_reference_that_cannot_be_compared_is_refused() -> None:
    for given, message in (
        (torch.randn(5, 4), r"given x = float32 of shape \(5, 4\).*\(3, 4\)"),
        (torch.randn(3, 4).double(), "given x = float64"),
        (torch.randn(3, 4), "overwritten"),
    ):
        model = Two()
        monitor = monitor_of(model)
        reference = moved(model).to(given.dtype)
        monitor.set_reference_module(reference)
        monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
        monitor.begin_step(0)
        reference(given)
        if message == "overwritten":
            given.zero_()
        with pytest.raises(ValueError, match=message):
            model(given if message == "overwritten" else torch.randn(3, 4))


def test_a_reference_that_runs_too_late_is_named() -> None:
    model = Two()
    monitor = monitor_of(model)
    reference = moved(model)
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    x = torch.randn(3, 4)
    with pytest.warns(tmm.MonitoringWarning, match="ran after the monitored module"):
        monitor.begin_step(0)
        model(x)
        reference(x)
        monitor.end_step()


def test_the_reference_is_compared_as_it_is_now() -> None:
    model = Two()
    reference = copy.deepcopy(model)
    monitor = monitor_of(model)
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    key, x = "activation_difference/fc2/l2", torch.randn(3, 4)
    assert measure(monitor, model, x)[key] == 0
    with torch.no_grad():
        reference.fc2.weight += 1
    assert measure(monitor, model, x)[key] > 0
    reference.fc2.weight = nn.Parameter(model.fc2.weight.detach().clone())
    assert measure(monitor, model, x)[key] == 0
    reference.fc2.weight.data = torch.zeros(2, 6)
    expected = model(x).norm(dim=-1).mean().item()
    assert measure(monitor, model, x)[key] == pytest.approx(expected, rel=1e-5)
    monitor.remove_reference_module()
    assert not monitor.has_reference_module()
    assert measure(monitor, model, x) == {}


def test_metrics_and_compilation_may_come_late() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model)
    assert measure(monitor, model, x) == {}
    monitor.add_activation_metric("mean", lambda x: x.mean())
    assert len(measure(monitor, model, x)) == 4
    monitor.begin_step(5)
    monitor.add_activation_metric("max", lambda x: x.max())
    model(x)
    monitor.end_step()
    assert len(monitor.get_step_metrics()) == 8
    compiled = torch.compile(model, backend="eager")
    assert len(measure(monitor, compiled, x)) == 8


def test_names() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(
        model,
        format_module_name_fn=lambda name: re.sub(r"fc\d", "fc", name) or "root",
        excluded_modules_regex="norm",
    )
    monitor.add_activation_metric("mean", lambda x: x.flatten())
    monitor.add_activation_metric("max", lambda x: x.max(), "root")
    monitor.add_parameter_metric("sum", lambda p: p.sum(), r"fc\d.weight")
    monitor.begin_step(0)
    output = model(x)
    monitor.monitor_parameters()
    monitor.end_step()
    found = monitor.get_step_metrics()
    values = torch.cat([model.fc1(x).flatten(), output.flatten()])
    sums = [model.fc1.weight.sum().item(), model.fc2.weight.sum().item()]
    assert found == {
        "activation/fc/mean": pytest.approx(values.mean().item(), rel=1e-5),
        "activation/root/mean": pytest.approx(output.mean().item(), rel=1e-5),
        "activation/root/max": pytest.approx(output.max().item()),
        "parameter/fc.weight/sum": pytest.approx(np.mean(sums), rel=1e-5),
    }
    assert monitor.module_names[model.fc1] == "fc"


def test_default_names() -> None:
    format_name = tmm.default_format_module_name_fn
    for wrapper in ("_orig_mod", "_forward_module", "_fsdp_wrapped_module"):
        assert format_name(wrapper) == "[root module]"
        assert format_name(f"{wrapper}.a.{wrapper}.b") == "a.b"
    assert format_name("") == "[root module]"
    assert format_name("my_orig_mod.fc") == "my_orig_mod.fc"


def test_functions_that_cannot_be_traced_run_eagerly() -> None:
    model, x = Two(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    monitor = monitor_of(compiled)
    monitor.add_activation_metric("branch", lambda x: x.max() if x.sum() > 0 else x.min(), "fc2")
    monitor.add_activation_metric("drawn", lambda x: torch.rand(3).to(x), "fc2", lambda v: len(v))
    torch.manual_seed(0)
    found = measure(monitor, compiled, x)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # the training's random numbers are left alone
    output = model(x)
    expected = output.max() if output.sum() > 0 else output.min()
    assert found == {
        "activation/fc2/branch": pytest.approx(expected.item(), rel=1e-5),
        "activation/fc2/drawn": 3.0,
    }


def test_a_metric_that_fails_is_named() -> None:
    model = Two()
    monitor = monitor_of(model)
    monitor.add_activation_metric("broken", lambda x: x @ x, "fc1")
    monitor.begin_step(0)
    with pytest.raises(
        RuntimeError, match=r"the metric 'broken' failed on a tensor of shape \(3, 6"
    ):
        model(torch.randn(3, 4))
    monitor = monitor_of(Two())
    monitor.add_parameter_metric("broken", lambda p: p.nothing)
    monitor.begin_step(0)
    with pytest.raises(RuntimeError, match="the metric 'broken' failed on a tensor of shape"):
        monitor.monitor_parameters()


def test_graphs_are_not_broken_and_plain_ones_hold_nothing() -> None:
    model = make_model(tmm)
    backend = Counting("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    monitor = monitor_of(compiled, monitor_step_fn=lambda step: step % 2 == 1)
    monitor.add_activation_metric("rms", lambda x: x.square().mean().sqrt())
    tokens = torch.randint(11, (2, 5))
    want = compiled(tokens)
    for step in range(6):
        monitor.begin_step(step)
        assert torch.equal(compiled(tokens), want)
        monitor.end_step()
    assert backend.graphs == 2  # the user's own, and the measured one
    assert "attention_entropy/blocks.1.head_2" in monitor.get_all_metrics()[5]
    assert sorted(monitor.get_all_metrics()) == [1, 3, 5]


def test_a_graph_that_serves_several_layers_names_each() -> None:
    model = make_model(tmm)
    blocks(model)
    monitor = monitor_of(model)
    monitor.add_activation_metric("rms", lambda x: x.square().mean().sqrt(), r".*head_0\.query")
    tokens = torch.randint(11, (2, 5))
    found = measure(monitor, model, tokens)
    torch._dynamo.reset()
    plain = make_model(tmm)
    other = monitor_of(plain)
    other.add_activation_metric("rms", lambda x: x.square().mean().sqrt(), r".*head_0\.query")
    expected = measure(other, plain, tokens)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({value for key, value in found.items() if "rms" in key}) == 2


def test_shown_outside_of_a_forward() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model)
    monitor.add_activation_metric("max", lambda x: x.max(), "mine|fc1")
    monitor.begin_step(0)
    hidden = model.fc1(x)
    monitor.monitor_activations("mine", x)
    monitor.monitor_activations(model.fc1, hidden)
    monitor.monitor_activations(model.fc1, hidden + 2)
    monitor.monitor_activations("mine", (x, x))  # type: ignore[arg-type]
    q = torch.randn(2, 3, 5, 4)
    tmm.monitor_scaled_dot_product_attention(monitor, "mine", q, q[:, :1], q[:, :1])
    with pytest.raises(ValueError, match="no part of the module"):
        monitor.monitor_activations(nn.Linear(2, 2), x)
    with monitor.no_monitor():
        monitor.monitor_activations("mine", x + 5)
    monitor.end_step()
    found = monitor.get_step_metrics()
    assert found["activation/mine/max"] == pytest.approx(x.max().item())
    of_calls = torch.stack([hidden.max(), hidden.max(), hidden.max() + 2])  # the first by itself
    assert found["activation/fc1/max"] == pytest.approx(of_calls.mean().item(), rel=1e-5)
    p = (q[:, 2] @ q[:, 0].mT / 2).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert found["attention_entropy/mine.head_2"] == pytest.approx(entropy, rel=1e-5)
    assert found["activation/mine.head_2.key/max"] == pytest.approx(q[:, 0].max().item())


def test_steps() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model, monitor_step_fn=lambda step: step != 3)
    monitor.add_activation_metric("max", lambda x: x.max(), "fc1")
    assert not monitor.is_monitoring()
    assert monitor.get_step_metrics() == {}
    with pytest.raises(RuntimeError, match="no step has begun"):
        monitor.log_scalar("a", 1, force=True)
    assert monitor.begin_step(2)
    assert monitor.is_monitoring()
    model(x)
    assert not monitor.begin_step(3)  # ends the step that was not ended
    assert monitor.get_all_metrics()[2]["activation/fc1/max"] == model.fc1(x).max()
    monitor.log_scalar("never", 1)
    monitor.log_scalars({"always": 2, "tensor": torch.tensor(3.0)}, force=True)
    model(x)
    monitor.end_step()
    monitor.end_step()
    assert monitor.get_step_metrics() == {"always": 2, "tensor": 3}
    with pytest.raises(ValueError, match="Step 1 cannot be smaller than the current step 3"):
        monitor.begin_step(1)
    monitor.begin_step(4)
    monitor.log_scalars({"a": 1, "b": 2})
    monitor.log_scalar("a", 3)
    with monitor.no_monitor(), monitor.no_monitor():
        assert not monitor.is_monitoring()
        model(10 * x)
    model(x)
    with pytest.raises(ZeroDivisionError), monitor.no_monitor():
        raise ZeroDivisionError
    monitor.end_step()
    expected = model.fc1(x).max().item()
    assert monitor.get_step_metrics() == {"a": 2, "b": 2, "activation/fc1/max": expected}


def test_gradients_without_metrics_and_parameters_without_gradient(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Two()
    model.fc1.requires_grad_(False)
    monitor = monitor_of(model, logger=logging.getLogger("mine"))
    monitor.begin_step(0)
    model(torch.randn(3, 4)).sum().backward()
    monitor.monitor_gradients()
    monitor.end_step()
    assert monitor.get_step_metrics() == {}
    assert "fc1.weight" in caplog.text
    assert "%s" not in caplog.text


def test_bad_arguments() -> None:
    for options, message in (
        ({"monitor_step_fn": None}, "monitor_step_fn"),
        ({"format_module_name_fn": "a"}, "format_module_name_fn"),
    ):
        with pytest.raises(TypeError, match=message):
            tmm.ModuleMonitor(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="excluded_modules_regex"):
        tmm.ModuleMonitor(excluded_modules_regex="(")
    monitor = tmm.ModuleMonitor()
    with pytest.raises(ValueError, match="Please set the module first"):
        monitor.begin_step(0)
    with pytest.raises(ValueError, match="Set the module to monitor"):
        tmm.RefinedCoordinateCheck(monitor)
    with pytest.raises(ValueError, match="Module cannot be None"):
        monitor.set_module(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not a torch.nn.Module"):
        monitor.set_module(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before setting the reference module"):
        monitor.set_reference_module(Two())
    model = Two()
    monitor.set_module(model)
    with pytest.raises(ValueError, match="Module has already been set"):
        monitor.set_module(model)
    with pytest.raises(ValueError, match="Set the reference module"):
        tmm.RefinedCoordinateCheck(monitor)
    with pytest.raises(ValueError, match="different names.*'0'"):
        monitor.set_reference_module(nn.Sequential(nn.Linear(2, 2)))
    monitor.set_reference_module(copy.deepcopy(model))
    check = tmm.RefinedCoordinateCheck(monitor)
    check.refined_coordinate_check()  # not in a step: nothing happens
    monitor.begin_step(0)
    with pytest.raises(ValueError, match="No inputs found"):
        check.refined_coordinate_check()
    monitor.add_gradient_metric("norm", torch.linalg.vector_norm)
    with pytest.raises(ValueError, match="'norm'.*already exists"):
        monitor.add_gradient_metric("norm", torch.linalg.vector_norm)
    with pytest.raises(ValueError, match="metric_regex"):
        monitor.add_gradient_metric("other", torch.linalg.vector_norm, "(")
    with pytest.raises(TypeError, match="metric_fn"):
        monitor.add_gradient_metric("other", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metric_aggregation_fn"):
        monitor.add_activation_metric("other", torch.mean, ".*", "mean")  # type: ignore[arg-type]


def test_training_is_undisturbed_and_nothing_is_kept() -> None:
    def weights(monitored: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        compiled = torch.compile(model, backend="aot_eager")
        monitor = monitor_of(compiled)
        monitor.set_reference_module(copy.deepcopy(model))
        monitor.add_activation_metric("all", lambda x: x)
        monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            if monitored:
                monitor.begin_step(step)
            compiled(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.end_step()
        if monitored:
            assert not monitor._steps.archive._history
            gc.collect()
        return tuple(model.parameters())

    assert all(map(torch.equal, weights(True), weights(False)))


def test_copies_and_pickles_of_a_monitored_model_are_free() -> None:
    model = make_model(tmm)
    monitor = monitor_of(model)
    monitor.add_activation_metric("max", lambda x: x.max())
    found = measure(monitor, model, torch.zeros(1, 2, dtype=torch.long))
    assert found
    other = copy.deepcopy(model)
    assert other.blocks[0].module_monitor is None
    assert pickle.loads(pickle.dumps(monitor)) is None
    other(torch.zeros(1, 2, dtype=torch.long))


def test_a_name_for_a_number_and_a_tensor_is_refused() -> None:
    model = Two()
    monitor = monitor_of(model)
    monitor.begin_step(0)
    monitor.log_scalar("a", 1)
    monitor.log_tensor("a", torch.ones(2))
    monitor.end_step()
    with pytest.raises(ValueError, match="'a' was logged as a number, and as a tensor"):
        monitor.get_step_metrics()


def test_every_way_of_calling_the_module_is_measured() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model)
    monitor.add_activation_metric("mean", lambda x: x.mean())
    compiled = torch.compile(model, backend="eager")
    gc.collect()
    other = torch.compile(model, backend="aot_eager")
    expected = None
    for callee in (compiled, model, other, compiled, model):
        found = measure(monitor, callee, x)
        assert len(found) == 4
        assert expected is None or found == pytest.approx(expected, rel=1e-5)
        expected = found
    model.compile(backend="eager")
    assert measure(monitor, model, x) == pytest.approx(expected, rel=1e-5)


def test_a_step_that_calls_parts_only_measures_them() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model)
    monitor.add_activation_metric("mean", lambda x: x.mean())
    mean = model.fc1(x).mean().item()
    assert measure(monitor, model.fc1, x) == {"activation/fc1/mean": pytest.approx(mean, rel=1e-5)}


def test_a_second_monitor_is_refused() -> None:
    model = Two()
    monitor_of(model).begin_step(0)
    with pytest.raises(ValueError, match="monitored already.*add the metrics to that one"):
        monitor_of(model).begin_step(0)


class Leaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.fc, self.drop, self.slope = nn.Linear(4, 4), nn.Dropout(0.5), slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.drop(nn.functional.leaky_relu(self.fc(x), self.slope))
        return y


def test_a_reference_that_differs_in_more_than_its_tensors_is_named() -> None:
    monitor = monitor_of(Leaky(0.1))
    with pytest.warns(tmm.MonitoringWarning, match="root module.slope is 0.5, not 0.1"):
        monitor.set_reference_module(Leaky(0.5))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    monitor = monitor_of(model)
    with pytest.warns(tmm.MonitoringWarning, match="1 is a GELU, not a ReLU"):
        monitor.set_reference_module(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    leaky = Leaky(0.1)
    monitor = monitor_of(leaky)
    monitor.set_reference_module(copy.deepcopy(leaky).eval())
    with pytest.warns(tmm.MonitoringWarning, match="its own mode is another one: drop"):
        monitor.begin_step(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 3.0}, "given scale = 3.0, that of the model 2.0"),
        ({"scale": torch.tensor(2.0)}, "given scale = Tensor, that of the model float"),
    ],
)
def test_other_arguments_of_the_reference_are_refused(given: Any, message: str) -> None:
    model = Two()
    monitor = monitor_of(model)
    reference = moved(model)
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    monitor.begin_step(0)
    x = torch.randn(3, 4)
    reference(x, **given)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(x, scale=2.0)


class WithTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        y = self.fc(x)
        return y if targets is None else (y, (y - targets).square().mean())


def test_targets_that_only_the_model_is_given() -> None:
    model = WithTargets()
    reference = moved(model)
    monitor = monitor_of(model)
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    x = torch.randn(3, 4)
    with pytest.warns(tmm.MonitoringWarning, match="was not given targets, which the monitored"):
        monitor.begin_step(0)
        reference(x)
        model(x, torch.zeros(3, 4))
        monitor.end_step()
    expected = (model(x) - reference(x)).norm(dim=-1).mean().item()
    found = monitor.get_step_metrics()
    assert found == {"activation_difference/fc/l2": pytest.approx(expected, rel=1e-5)}
    monitor = monitor_of(WithTargets())
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    assert monitor.module is not None
    monitor.begin_step(0)
    reference(x, x)
    with pytest.raises(ValueError, match="targets"):
        monitor.module(x)


class Logging(nn.Module, tmm.MonitorMixin):
    """Logs all that it is given; ``breaks`` the graph before."""

    breaks = False

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        if self.breaks:
            torch._dynamo.graph_break()
        if self.is_monitoring:
            monitor = self.get_module_monitor()
            assert monitor is not None
            monitor.log_tensor("logged", y, lambda values: {"[n]": values.numel()})
            monitor.log_scalar("scalar", y.sum())
        return y


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_coordinate_check_logs_nothing_again(breaks: bool, compiled: bool) -> None:
    model = nn.Sequential(Logging(), nn.ReLU())
    model[0].breaks = breaks
    called = torch.compile(model, backend="eager") if compiled else model
    monitor = monitor_of(called)
    monitor.set_reference_module(moved(model))
    check = tmm.RefinedCoordinateCheck(monitor)
    monitor.begin_step(0)
    called(torch.randn(3, 4))
    check.refined_coordinate_check()
    monitor.end_step()
    found = monitor.get_step_metrics()
    assert found["logged[n]"] == 12
    assert "scalar" in found
    assert found["RCC (W_t-W_0)x_t/0/l2norm"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_reference_logs_is_joined(compiled: bool) -> None:
    model = nn.Sequential(Logging(), nn.ReLU())
    reference = moved(model)
    called = torch.compile(reference, backend="eager") if compiled else reference
    monitor = monitor_of(model)
    monitor.set_reference_module(called)
    x = torch.randn(3, 4)
    monitor.begin_step(0)
    called(x)
    model(x)
    monitor.end_step()
    assert monitor.get_step_metrics()["logged[n]"] == 24


def test_differences_by_functions_that_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    reference, x = moved(model), torch.randn(3, 4)
    functions: dict[str, Any] = {
        "item": lambda a, b: torch.tensor((a - b).norm().item()),
        "branch": lambda a, b: (a - b).norm() if b.norm() > 0 else a.norm(),
        "mask": lambda a, b: (a - b)[a > 0],
        "numpy": lambda a, b: torch.tensor((a - b).numpy().sum()),
    }
    for compiled in (False, True):
        own = copy.deepcopy(model)
        called = torch.compile(own, backend="aot_eager") if compiled else own
        monitor = monitor_of(called)
        monitor.set_reference_module(reference)
        for name, function in functions.items():
            monitor.add_activation_difference_metric(name, function)
        found = measure(monitor, called, x)
        with torch.no_grad():
            for name, function in functions.items():
                expected = function(model(x), reference(x)).mean().item()
                key = f"activation_difference/[root module]/{name}"
                assert found[key] == pytest.approx(expected, rel=1e-5)


def test_metrics_leave_the_random_numbers_alone() -> None:
    def next_number(family: str | None) -> float:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        monitor = monitor_of(model)
        if family is not None:
            getattr(monitor, f"add_{family}_metric")("drawn", lambda x: torch.rand(()))
        monitor.begin_step(0)
        model(torch.ones(2, 4)).sum().backward()
        monitor.monitor_parameters()
        monitor.monitor_gradients()
        monitor.end_step()
        return torch.rand(()).item()

    assert {next_number(f) for f in (None, "activation", "parameter", "gradient")} == {
        next_number(None)
    }


def test_metrics_that_give_no_number_are_named() -> None:
    for result in (None, (1.0, 2.0), "a"):
        monitor = monitor_of(nn.Linear(2, 2))
        monitor.add_parameter_metric("odd", lambda p, result=result: result)
        monitor.begin_step(0)
        with pytest.raises(RuntimeError, match="the metric 'odd' failed.*neither a number nor"):
            monitor.monitor_parameters()


def test_references_that_were_replaced_are_given_up() -> None:
    model, x = Two(), torch.randn(3, 4)
    monitor = monitor_of(model)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    replaced = []
    for _ in range(3):
        reference = moved(model)
        replaced.append(weakref.ref(reference))
        monitor.set_reference_module(reference)
        assert len(measure(monitor, model, x)) == 4
    del reference
    monitor.remove_reference_module()
    measure(monitor, model, x)
    gc.collect()
    assert [reference() for reference in replaced] == [None, None, None]


def test_frozen_layers_may_be_shared_with_the_reference() -> None:
    model = Two()
    model.fc1.requires_grad_(False)
    reference = moved(model)
    reference.fc1 = model.fc1
    monitor = monitor_of(model)
    monitor.set_reference_module(reference)
    monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))
    found = measure(monitor, model, torch.randn(3, 4))
    assert found["activation_difference/fc1/l2"] == 0
    assert found["activation_difference/fc2/l2"] > 0


def test_what_has_no_rows_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Argmax())
    monitor = monitor_of(model, logger=logging.getLogger("mine"))
    monitor.add_activation_metric("max", lambda x: x.max())
    measure(monitor, model, torch.randn(3, 4))
    measure(monitor, model, torch.randn(3, 4))
    assert caplog.text.count("1 is not measured: int64 output") == 1


class Argmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)
