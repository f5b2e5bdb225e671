"""Parameters, gradients and updates, against plain autograd in float64 and copies."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import builtin_values, histogram
from tests.model_zoo import noise

SCALARS = tuple(name for name in tmm.METRIC_NAMES if name != "histogram")
VECTORS = noise(12, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean() + output.abs().mean()


def instrumented(
    *rules: tmm.Rule, module: nn.Module | None = None, backend: str = "eager", **options: Any
) -> tuple[Any, tmm.Monitor]:
    module = network() if module is None else module
    model = torch.compile(module, backend=backend)
    tmm.instrument(model, tmm.Spec(*rules, **options))
    return model, tmm.monitor(model)


def values_of(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        f"{family}/{name}/{metric}": value
        for name, tensor in tensors.items()
        for metric, value in builtin_values(tensor.detach().double().numpy().reshape(-1)).items()
    }


def only(metrics: dict[str, Any], *families: str) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key.split("/")[0] in families}


def agree(got: dict[str, Any], want: dict[str, float], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        family, name, metric = key.split("/")
        scale = abs(value)
        if metric == "mean":  # as exact as the numbers that it is taken of
            scale = abs(want[f"{family}/{name}/mean_abs"])
        same = got[key] == value or (math.isnan(value) and math.isnan(got[key]))
        assert same or abs(got[key] - value) <= tolerance * scale, (key, got[key], value)


def test_every_metric_of_parameters_and_accumulated_gradients() -> None:
    rules = tmm.gradient(*SCALARS), tmm.parameter(*SCALARS)
    model, monitor = instrumented(*rules, backend="aot_eager")
    module = copy.deepcopy(model._orig_mod).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor.watch(optimizer)
    batches = (VECTORS[:3], VECTORS[3:4] * 7, VECTORS[4:] - 1)
    for step in range(2):
        with monitor.step(step):
            for batch in batches:
                (loss_of(model(batch)) / 3).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 0)
        module.zero_grad()
        sum(loss_of(module(batch.double())) / 3 for batch in batches).backward()  # type: ignore[union-attr]
        got = monitor.get_step_metrics()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        agree(only(got, "gradient"), values_of("gradient", gradients), 2e-4)
        agree(only(got, "parameter"), values_of("parameter", dict(module.named_parameters())))
        total = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert got["step/gradient_norm"] == pytest.approx(total, rel=1e-5)
        for block in "023":
            if block == "0":
                want = math.sqrt(
                    sum(gradients[f"0.{n}"].square().sum().item() for n in ("weight", "bias"))
                )
                assert got["step/gradient_norm/0"] == pytest.approx(want, rel=1e-5)
            assert f"step/gradient_norm/{block}" in got


def test_histograms_and_functions() -> None:
    model, monitor = instrumented(
        tmm.parameter("histogram", parameters="0"),
        tmm.parameter(largest=lambda p: p.abs().amax(), parameters=".*weight"),
        tmm.gradient(rows=lambda g: g.norm(dim=-1), parameters="3.weight", aggregate=torch.median),
        tmm.gradient(twice=lambda g: g.mul_(2).sum(), parameters="3.bias"),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor.watch(optimizer)
    with monitor.step(0):
        loss_of(model(VECTORS)).backward()
        gradients = {n: p.grad.clone() for n, p in model._orig_mod.named_parameters()}
        optimizer.step()
    got = monitor.get_step_metrics()
    state = model._orig_mod.state_dict()
    for name in ("0.weight", "0.bias"):
        counts = histogram(state[name].double().numpy().reshape(-1))
        assert np.array_equal(got[f"parameter/{name}/histogram"], counts)
    assert got["parameter/3.weight/largest"] == state["3.weight"].abs().max()
    rows = gradients["3.weight"].norm(dim=-1)
    assert got["gradient/3.weight/rows"] == pytest.approx(rows.median().item())
    assert got["gradient/3.bias/twice"] == pytest.approx(2 * gradients["3.bias"].sum().item())
    for name, parameter in model._orig_mod.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


def test_before_and_after_clipping() -> None:
    model, monitor = instrumented(tmm.gradient("norm", "absmax"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    with monitor.step(0):
        (100 * loss_of(model(VECTORS))).backward()
        before = {n: p.grad.clone() for n, p in model._orig_mod.named_parameters()}
        monitor.monitor_gradients(before_clip=True)
        total = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        after = {n: p.grad.clone() for n, p in model._orig_mod.named_parameters()}
        optimizer.step()
    got = monitor.get_step_metrics()
    assert got["step/gradient_norm_before_clip"] == pytest.approx(total.item(), rel=1e-6)
    assert got["step/gradient_norm"] == pytest.approx(1.0, rel=1e-4)
    for family, gradients in (("gradient_before_clip", before), ("gradient", after)):
        for name, gradient in gradients.items():
            assert got[f"{family}/{name}/norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert got[f"{family}/{name}/absmax"] == gradient.abs().max()


def adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, **options)


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: adam(p, foreach=False),
    "adam foreach": lambda p: adam(p, foreach=True),
    "adam fused": lambda p: adam(p, fused=True),
    "adamw": lambda p: adamw(p, foreach=False),
    "adamw foreach": lambda p: adamw(p, foreach=True, amsgrad=True),
    "adamw fused": lambda p: adamw(p, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_equal_differences_of_copies(name: str) -> None:
    model, monitor = instrumented(tmm.update(*SCALARS, "relative_norm"), tmm.gradient("norm"))
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor.watch(optimizer)
    module = model._orig_mod

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(VECTORS))
        loss.backward()
        return loss

    for step in range(3):
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        with monitor.step(step):
            if name == "lbfgs":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        after = {n: p.detach().clone() for n, p in module.named_parameters()}
        got = monitor.get_step_metrics()
        want = values_of("update", {n: after[n] - before[n] for n in after})
        for n in after:
            ratio = (after[n] - before[n]).double().norm() / before[n].double().norm()
            want[f"update/{n}/relative_norm"] = ratio.item()
        infinite = {k for k, v in want.items() if math.isinf(v)}
        assert all(math.isinf(got[key]) for key in infinite)
        finite = {k: v for k, v in want.items() if k not in infinite}
        agree({k: v for k, v in only(got, "update").items() if k not in infinite}, finite, 1e-4)
        for n, parameter in module.named_parameters():
            assert got[f"gradient/{n}/norm"] == pytest.approx(
                parameter.grad.norm().item(), rel=1e-5
            )


@pytest.mark.parametrize("name", ["adam", "adam fused", "adamw foreach"])
def test_the_state_of_adam(name: str) -> None:
    metrics = ("exp_avg_norm", "exp_avg_sq_norm", "effective_lr")
    model, monitor = instrumented(tmm.optimizer_state(*metrics, parameters="0"))
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor.watch(optimizer)
    for step in range(2):
        before = {n: p.detach().clone() for n, p in model._orig_mod.named_parameters()}
        with monitor.step(step):
            loss_of(model(VECTORS)).backward()
            optimizer.step()
            optimizer.zero_grad()
        got = monitor.get_step_metrics()
        assert set(got) == {
            f"optimizer_state/0.{n}/{m}" for n in ("weight", "bias") for m in metrics
        }
        for n in ("weight", "bias"):
            parameter = model._orig_mod.get_parameter(f"0.{n}")
            state = optimizer.state[parameter]
            assert got[f"optimizer_state/0.{n}/exp_avg_norm"] == pytest.approx(
                state["exp_avg"].norm().item(), rel=1e-5
            )
            assert got[f"optimizer_state/0.{n}/exp_avg_sq_norm"] == pytest.approx(
                state["exp_avg_sq"].norm().item(), rel=1e-5
            )
            if name != "adamw foreach":
                # Adam's update is the rate times exp_avg.
                update = before[f"0.{n}"] - parameter.detach()
                rate = (update.double() / state["exp_avg"].double()).mean().item()
                assert got[f"optimizer_state/0.{n}/effective_lr"] == pytest.approx(rate, rel=1e-2)


def test_an_optimizer_without_such_state_is_named() -> None:
    model, monitor = instrumented(tmm.optimizer_state("exp_avg_norm"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    with monitor.step(0):
        loss_of(model(VECTORS)).backward()
        optimizer.step()
    unmeasured = tmm.explain(model).unmeasured
    reason = "it is not known how this optimizer keeps it"
    assert unmeasured == {"optimizer_state of SGD: exp_avg_norm": reason}


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4, sparse=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.frozen(self.embedding(x))
        return output


def test_sparse_missing_and_frozen() -> None:
    """Sparse gradients count as dense ones; without a gradient there are no rows."""
    model, monitor = instrumented(tmm.gradient(*SCALARS), tmm.parameter("norm"), module=Embedded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    with monitor.step(0):
        loss_of(model(torch.tensor([1, 3, 3]))).backward()
        gradient = model._orig_mod.embedding.weight.grad
        assert gradient.is_sparse
        dense = gradient.to_dense()
        optimizer.step()
    got = monitor.get_step_metrics()
    agree(only(got, "gradient"), values_of("gradient", {"embedding.weight": dense}))
    assert {key.split("/")[1] for key in only(got, "parameter")} == {
        name for name, _ in model._orig_mod.named_parameters()
    }


def test_several_optimizers_make_one_norm() -> None:
    model, monitor = instrumented(tmm.gradient("norm"))
    module = model._orig_mod
    optimizers = [torch.optim.SGD(module[0].parameters(), lr=0.1), adamw(module[2:].parameters())]
    for optimizer in optimizers:
        monitor.watch(optimizer)
    with monitor.step(0):
        loss_of(model(VECTORS)).backward()
        total = nn.utils.get_total_norm([p.grad for p in module.parameters()])
        for optimizer in optimizers:
            optimizer.step()
    got = monitor.get_step_metrics()
    assert got["step/gradient_norm"] == pytest.approx(total.item(), rel=1e-6)
    assert len(only(got, "gradient")) == 6


def test_tied_and_excluded_parameters() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    model, monitor = instrumented(tmm.parameter("norm"), module=module, exclude="1")
    with monitor.step(0):
        monitor.monitor_parameters()
        model(VECTORS)
    assert set(only(monitor.get_step_metrics(), "parameter")) == {
        f"parameter/{name}/norm" for name in ("0.weight", "0.bias", "2.bias")
    }


def test_explicit_calls_instead_of_watching() -> None:
    model, monitor = instrumented(tmm.gradient("norm"), tmm.parameter("norm"), every=2)
    for step in range(3):
        with monitor.step(step):
            loss_of(model(VECTORS)).backward()
            monitor.monitor_gradients()
            monitor.monitor_parameters()
        got = monitor.get_step_metrics()
        assert bool(got) == (step % 2 == 0)
        if got:
            assert got["gradient/0.weight/norm"] > 0
            assert len(only(got, "parameter")) == 6


def scaled_run(enabled: bool, fused: bool, infinite: int | None = None) -> list[dict[str, Any]]:
    rules = (
        tmm.gradient("norm", "absmax"),
        tmm.update("norm"),
        tmm.activation_gradient("rms", "histogram"),
    )
    model, monitor = instrumented(*rules)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    monitor.watch(optimizer, scaler)
    found = []
    for step in range(3):
        with monitor.step(step):
            loss = loss_of(model(VECTORS))
            scaler.scale(loss * math.inf if step == infinite else loss).backward()
            monitor.monitor_gradients(before_clip=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(monitor.get_step_metrics())
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_does_not_show_in_gradients(fused: bool) -> None:
    plain, scaled = scaled_run(False, fused), scaled_run(True, fused)
    for step, (want, got) in enumerate(zip(plain, scaled, strict=True)):
        assert got.pop("step/skipped") == 0
        assert got.pop("step/grad_scale") == 2.0**10
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key.endswith("histogram"):
                assert np.array_equal(value, got[key]), (step, key)
            else:
                assert got[key] == pytest.approx(value, rel=1e-4), (step, key)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_no_explosion(fused: bool) -> None:
    steps = scaled_run(True, fused, infinite=1)
    assert [step["step/skipped"] for step in steps] == [0, 1, 0]
    assert [step["step/grad_scale"] for step in steps] == [1024, 1024, 512]
    left_out = ("gradient", "update", "activation_gradient")
    assert not only(steps[1], *left_out)
    assert all(only(steps[0], family) and only(steps[2], family) for family in left_out)
    assert steps[1].get("step/gradient_norm", 0.0) == 0.0
    for step in (steps[0], steps[2]):
        assert all(np.isfinite(value).all() for value in step.values())


def test_half_precision_with_a_scaler_against_float32() -> None:
    """Unscaled, the gradients of a run in float16 are those of one in float32, roughly."""
    rules = (tmm.gradient("norm"), tmm.activation_gradient("rms"), tmm.activation("rms"))
    found = []
    for half in (False, True):
        model, monitor = instrumented(*rules)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=half)
        monitor.watch(optimizer, scaler)
        with monitor.step(0):
            for batch in (VECTORS[:4], VECTORS[4:]):
                with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                    loss = loss_of(model(batch))
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            monitor.monitor_gradients(before_clip=True)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        found.append(monitor.get_step_metrics())
    plain, scaled = found
    assert scaled.pop("step/grad_scale") == 2.0**8
    assert scaled.pop("step/skipped") == 0
    assert scaled.keys() == plain.keys()
    for key, value in plain.items():
        assert scaled[key] == pytest.approx(value, rel=2e-2), key


def test_explicit_calls_beside_a_watched_optimizer_count_once() -> None:
    model, monitor = instrumented(tmm.gradient("norm"), tmm.parameter("norm"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    for step, early in enumerate((True, False)):
        with monitor.step(step):
            loss_of(model(VECTORS)).backward()
            total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if early:
                monitor.monitor_gradients()
            optimizer.step()
            if not early:
                monitor.monitor_gradients()
            monitor.monitor_parameters()
            with pytest.raises(RuntimeError, match="called already"):
                monitor.monitor_parameters()
            optimizer.zero_grad()
        got = monitor.get_step_metrics()
        assert got["step/gradient_norm"] == pytest.approx(total.item(), rel=1e-6)
    with monitor.step(2):
        loss_of(model(VECTORS)).backward()
        monitor.monitor_gradients(before_clip=True)
        with pytest.raises(RuntimeError, match="called already in this step"):
            monitor.monitor_gradients(before_clip=True)


def test_wrapped_modules_have_blocks() -> None:
    module = nn.Sequential(nn.DataParallel(network()), nn.DataParallel(nn.Linear(3, 2)))
    model, monitor = instrumented(tmm.gradient("norm"), module=module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    with monitor.step(0):
        loss_of(model(VECTORS)).backward()
        optimizer.step()
    got = monitor.get_step_metrics()
    blocks = {key for key in got if key.startswith("step/gradient_norm/")}
    assert blocks == {"step/gradient_norm/0", "step/gradient_norm/1"}


def test_numbers_beyond_the_range_of_squares() -> None:
    model, monitor = instrumented(tmm.parameter("std", "rms", "norm", "absmax"))
    with torch.no_grad():
        model._orig_mod[0].weight.mul_(1e21)
        model._orig_mod[3].weight.mul_(1e-24)
    with monitor.step(0):
        monitor.monitor_parameters()
    got = monitor.get_step_metrics()
    for name in ("0.weight", "3.weight"):
        weight = model._orig_mod.get_parameter(name).detach().double()
        want = {"std": weight.std(), "rms": weight.square().mean().sqrt(), "norm": weight.norm()}
        for metric, value in want.items():
            assert got[f"parameter/{name}/{metric}"] == pytest.approx(float(value), rel=1e-6)


def test_wrong_calls() -> None:
    model, monitor = instrumented(tmm.gradient("norm"), tmm.activation_gradient("rms"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="is not a torch.optim.Optimizer"):
        monitor.watch(model)
    with pytest.raises(TypeError, match="is not a torch.amp.GradScaler"):
        monitor.watch(optimizer, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter of the instrumented model"):
        monitor.watch(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    monitor.watch(optimizer)
    with pytest.raises(ValueError, match="watched already"):
        monitor.watch(optimizer)
    scaled = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with monitor.step(0):
        model(VECTORS)
        with pytest.raises(RuntimeError, match="before the forward pass of a monitored step"):
            monitor.watch(*scaled)
    monitor.watch(*scaled)  # between steps graphs are traced anew
    with pytest.raises(ValueError, match="unknown metric 'relative_norm'"):
        tmm.gradient("relative_norm")
    with pytest.raises(ValueError, match="parameters='nothing' matches none of the 6 parameters"):
        instrumented(tmm.gradient("norm", parameters="nothing"))


def test_removing_takes_the_hooks_off() -> None:
    model, monitor = instrumented(tmm.gradient("norm"))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    monitor.watch(optimizer, scaler)
    other, _ = instrumented(tmm.gradient("norm"))
    tmm.monitor(other).watch(torch.optim.SGD(other.parameters(), lr=0.1), scaler)
    for clean in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert type(clean) is torch.amp.GradScaler
        assert clean.state_dict() == scaler.state_dict()
        assert not [key for key in vars(clean) if "tmm" in key]
    tmm.remove(other)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert type(scaler) is not torch.amp.GradScaler
    tmm.remove(model)
    assert type(scaler) is torch.amp.GradScaler
    assert not [key for key in vars(scaler) if "tmm" in key]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def cosine(parameter: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(parameter.flatten(), reference.flatten(), dim=0)


@pytest.mark.parametrize("kind", ["init", "module", "state dict"])
def test_differences_from_a_reference(kind: str) -> None:
    module = network()
    start = copy.deepcopy(module)
    references = {"init": "init", "module": torch.compile(start), "state dict": start.state_dict()}
    model, monitor = instrumented(
        tmm.parameter_difference(*SCALARS, "relative_norm", "histogram"),
        tmm.parameter_difference(angle=cosine),
        module=module,
        reference=references[kind],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    with monitor.step(0):
        pass
    assert monitor.get_step_metrics()["parameter_difference/0.weight/norm"] == 0
    for step in (1, 2):
        with monitor.step(step):
            loss_of(model(VECTORS)).backward()
            optimizer.step()
        got = only(monitor.get_step_metrics(), "parameter_difference")
        zero = {n: p.detach() for n, p in start.named_parameters()}
        moved = {n: p.detach() - zero[n] for n, p in module.named_parameters()}
        want = values_of("parameter_difference", moved)
        for name, parameter in module.named_parameters():
            reference = zero[name]
            key = f"parameter_difference/{name}"
            want[f"{key}/relative_norm"] = (moved[name].norm() / reference.norm()).item()
            want[f"{key}/angle"] = cosine(parameter.detach(), reference).item()
            counts = got.pop(f"{key}/histogram")
            assert np.array_equal(counts, histogram(moved[name].double().numpy().reshape(-1)))
        infinite = {k for k, v in want.items() if not math.isfinite(v)}
        assert {k for k, v in got.items() if not math.isfinite(v)} == infinite
        agree(
            {k: v for k, v in got.items() if k not in infinite},
            {k: v for k, v in want.items() if k not in infinite},
            1e-4,
        )


def test_references_that_do_not_fit(tmp_path: Path) -> None:
    rule = tmm.parameter_difference("norm")
    with pytest.raises(ValueError, match="needs a reference: tmm.Spec"):
        tmm.Spec(rule)
    with pytest.raises(ValueError, match="reference='start' is neither 'init' nor a file"):
        tmm.Spec(rule, reference="start")
    with pytest.raises(TypeError, match="reference=3 is not .init., a module, a state"):
        tmm.Spec(rule, reference=3)  # type: ignore[arg-type]
    live = network()
    with pytest.raises(ValueError, match="0.weight is the parameter itself.*give a copy"):
        instrumented(rule, module=live, reference=live.state_dict())
    state = network().state_dict()
    state["0.weight"] = state["0.weight"][:3]
    state["0.bias"] = state["0.bias"].double()
    del state["3.bias"]
    message = (
        r"0.weight has shape \(3, 8\), not \(16, 8\); 0.bias has torch.float64.*3.bias is missing"
    )
    with pytest.raises(ValueError, match=message):
        instrumented(rule, reference=state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["compiled optimizer", "whole step"])
def test_compiled_optimizers_are_watched(way: str) -> None:
    rules = (tmm.gradient("norm"), tmm.update("norm"), tmm.activation_gradient("rms"))
    seen = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module = network()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        model: Any = torch.compile(module, backend="aot_eager")
        run = optimizer.step
        if compiled and way == "compiled optimizer":
            run = torch.compile(optimizer.step, backend="aot_eager")

        def step(x: torch.Tensor, model: Any = model, run: Any = run, o: Any = optimizer) -> None:
            loss_of(model(x)).backward()
            run()
            o.zero_grad()

        callee: Any = step
        if compiled and way == "whole step":
            callee = torch.compile(step, backend="aot_eager")
            callee = tmm.instrument(callee, tmm.Spec(*rules), module=module)
            monitor = tmm.monitor(module)
        else:
            monitor = tmm.monitor(tmm.instrument(model, tmm.Spec(*rules)))
        monitor.watch(optimizer)
        for index in range(2):
            with monitor.step(index):
                callee(VECTORS)
        seen.append(monitor.get_step_metrics())
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        assert seen[1][key] == pytest.approx(value, rel=1e-3), key


def test_norms_count_each_gradient_once() -> None:
    norm, mean_square = (lambda g: g.norm()), (lambda g: g.pow(2).mean())
    for rules in (
        (tmm.gradient("norm", own=norm),),
        (tmm.gradient("norm", own=norm, other=mean_square),),
        (tmm.gradient("absmax", own=norm, other=mean_square),),
        (tmm.gradient("norm", parameters="0.*"), tmm.gradient("rms", own=norm, parameters=".*")),
        (tmm.gradient("norm", parameters="0.*"), tmm.gradient("absmax", own=norm)),
    ):
        model, monitor = instrumented(*rules)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor.watch(optimizer)
        with monitor.step(0):
            loss_of(model(VECTORS)).backward()
            squares = {n: p.grad.double().square().sum() for n, p in model.named_parameters()}
            optimizer.step()
        got = monitor.get_step_metrics()
        for key, prefix in {"": "", "/0": "_orig_mod.0.", "/3": "_orig_mod.3."}.items():
            want = sum(square for name, square in squares.items() if name.startswith(prefix))
            assert got[f"step/gradient_norm{key}"] == pytest.approx(float(want) ** 0.5, rel=1e-6)
