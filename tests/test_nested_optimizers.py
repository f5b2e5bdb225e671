"""Optimizers inside others, and wrappers of optimizers, against gradients and copies by hand."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, _apply_optimizer_in_backward
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

import tmm
from tests.lazily import Lazily
from tests.model_zoo import noise
from tmm.runs.find_optimizer import OptimizerFinder
from tmm.runs.instrument import steps_of

accelerate = Lazily("accelerate.optimizer")
VECTORS = noise(6, 4)
RULES = (tmm.gradient("norm", own=lambda g: g.sum()), tmm.update("norm", "histogram"))

State = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:no forward pass of the instrumented model")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(module: nn.Module, scale: float = 1.0) -> Tensor:
    """Without the monitored forward pass, of which nothing is measured here."""
    loss: Tensor = module.forward(VECTORS).square().mean() * scale
    loss.backward()
    return loss


def gradients(module: nn.Module) -> State:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def values(module: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def check(got: dict[str, Any], before: State, after: State, seen: State) -> None:
    """The rows are those of one step with these gradients."""
    for name, gradient in seen.items():
        update = after[name] - before[name]
        assert got[f"gradient/{name}/norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert got[f"gradient/{name}/own"] == pytest.approx(gradient.sum().item(), rel=1e-4)
        assert got[f"update/{name}/norm"] == pytest.approx(update.norm().item(), rel=1e-5)
        assert got[f"update/{name}/histogram"].sum() == update.numel()
    total = torch.stack([gradient.norm() for gradient in seen.values()]).norm().item()
    assert got["step/gradient_norm"] == pytest.approx(total, rel=1e-5)
    assert len([key for key in got if key.startswith("gradient/")]) == 2 * len(seen)


class Lookahead(Optimizer):
    """Every second step goes back half of the way to where it was two steps ago."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        super().__init__(inner.param_groups, {})
        self.slow = [p.detach().clone() for p in self.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.parameters(), strict=True):
                p.data.lerp_(slow, 0.5)
                slow.copy_(p)
        return result


class Sharpness(Optimizer):
    """SAM: the gradient where the loss is highest nearby is applied here."""

    def __init__(self, parameters: Any, inner: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(parameters, options)
        self.base_optimizer = inner(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.5)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Clipping(Optimizer):
    """Changes the gradients of another optimizer, whose parameters it does not hold."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.inner = list(inner)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.data.mul_(0.25)
                    p.data.mul_(0.5)
            optimizer.step()


class Halving(SGD):
    """Calls the step that it inherits, whose class calls hooks as well."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        return super().step(closure)


def lookahead(module: nn.Module) -> list[Any]:
    inner = SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [Lookahead(inner), inner]


def sharpness(module: nn.Module) -> list[Any]:
    outer = Sharpness(module.parameters(), SGD, lr=0.1)
    return [outer, outer.base_optimizer]


def clipping(module: nn.Module) -> list[Any]:
    parts = [SGD(module[0].parameters(), lr=0.1), Adam(module[2].parameters())]  # type: ignore[index]
    return [Clipping(*parts), *parts]


def twice_inside(module: nn.Module) -> list[Any]:
    found = lookahead(module)
    return [Lookahead(found[0]), *found]


def halving(module: nn.Module) -> list[Any]:
    SGD([torch.zeros(1)], lr=0.1)  # from now on its class calls hooks
    return [Halving(module.parameters(), lr=0.1)]


WAYS = {way.__name__: way for way in (lookahead, sharpness, clipping, twice_inside, halving)}


@pytest.mark.parametrize("watched", ["outer", "inner", "both", "found"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_inside_a_step_is_one_step(way: str, watched: str) -> None:
    """The gradient is the one that is applied, the update what the outermost optimizer did."""
    module = network()
    optimizers = WAYS[way](module)
    outer, inner = optimizers[0], optimizers[1:] or optimizers
    seen: State = {}

    def applied(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        seen.update({n: p.grad.clone() for n, p in module.named_parameters() if p in held})

    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    finder = None
    if watched == "found":
        finder = OptimizerFinder(steps_of(model), None)
    for optimizer in {"outer": [outer], "inner": inner, "both": optimizers}.get(watched, []):
        monitor.watch(optimizer)
    for optimizer in inner:
        optimizer.register_step_pre_hook(applied)
    for step in range(4):
        before = values(module)
        with monitor.step(step):
            model.zero_grad()
            backward(model)
            outer.step(*([lambda: backward(model)] if way == "sharpness" else []))
        check(monitor.get_step_metrics(), before, values(module), seen)
    if finder is not None:
        finder.stop()
    tmm.remove(model)
    for optimizer in optimizers:
        hooks = (*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks)
        assert len(hooks) == (optimizer in inner)


def test_the_two_steps_of_sam_by_hand() -> None:
    module = network()
    outer = Sharpness(module.parameters(), SGD, lr=0.1)
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(outer)
    for step in range(2):
        before = values(module)
        with monitor.step(step):
            model.zero_grad()
            backward(model)
            outer.first_step()
            backward(model)
            seen = gradients(module)
            outer.second_step()
        check(monitor.get_step_metrics(), before, values(module), seen)


def test_a_closure_that_both_get() -> None:
    """Gradients are those of its last evaluation, also where the outer step clears them."""
    module = network()
    inner = torch.optim.LBFGS(module.parameters(), max_iter=3)
    outer = Lookahead(inner)
    seen: State = {}

    def closure() -> Tensor:
        module.zero_grad()
        loss = backward(model)
        seen.update(gradients(module))
        return loss

    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(outer)
    outer.register_step_post_hook(lambda *_: outer.zero_grad())
    for step in range(2):
        before = values(module)
        with monitor.step(step):
            outer.step(closure)
        check(monitor.get_step_metrics(), before, values(module), seen)


def test_steps_one_after_the_other_are_joined() -> None:
    """Those that are not inside of each other count as before, also in a hook of another one."""
    module = network()
    first, second = SGD(module[0].parameters(), lr=0.1), SGD(module[2].parameters(), lr=0.2)
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    for optimizer in (first, second):
        monitor.watch(optimizer)
    first.register_step_post_hook(lambda *_: second.step())
    before = values(module)
    with monitor.step(0):
        backward(model)
        seen = gradients(module)
        first.step()
    check(monitor.get_step_metrics(), before, values(module), seen)
    with monitor.step(1):
        for _ in range(2):
            first.step()
    got = monitor.get_step_metrics()
    norm = seen["0.weight"].norm().item()
    assert got["gradient/0.weight/norm"] == pytest.approx(2**0.5 * norm, rel=1e-5)
    assert got["update/0.weight/norm"] == pytest.approx(2**0.5 * 0.1 * norm, rel=1e-5)


def test_hooks_that_users_add_belong_to_the_step() -> None:
    module = network()
    optimizer = SGD(module.parameters(), lr=0.1)
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(module.parameters(), 0.01) and None
    )
    optimizer.register_step_post_hook(lambda *_: module[0].weight.data.clamp_(-0.1, 0.1))
    before = values(module)
    with monitor.step(0):
        backward(model)
        optimizer.step()
    check(monitor.get_step_metrics(), before, values(module), gradients(module))


class Failing(Optimizer):
    """Fails after the step inside, or before it."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.failure = inner, ""

    def step(self, closure: Any = None) -> None:
        if self.failure == "inside":
            with pytest.raises(RuntimeError):
                self.inner.step(self.fail)
        if self.failure == "before":
            self.fail()
        self.inner.step()
        if self.failure == "after":
            self.fail()

    def fail(self) -> Any:
        raise RuntimeError("no step")


@pytest.mark.parametrize("failure", ["before", "inside", "after"])
def test_a_step_that_fails_is_none(failure: str) -> None:
    """The next one, from the same or another depth of the stack, is measured as if alone."""
    module = network()
    outer = Failing(SGD(module.parameters(), lr=0.1))
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(outer)
    with monitor.step(0):
        backward(model)
        seen = gradients(module)
        outer.failure = failure
        if failure != "inside":
            with pytest.raises(RuntimeError, match="no step"):
                outer.step()
            outer.failure = ""
        before = values(module)
        (lambda: outer.step())()
    check(monitor.get_step_metrics(), before, values(module), seen)


def test_the_state_of_the_optimizer_inside() -> None:
    module = network()
    inner = Adam(module.parameters(), lr=0.01)
    metrics = ("exp_avg_norm", "effective_lr")
    found = []
    for outer in (inner, Lookahead(inner)):
        model = tmm.instrument(module, tmm.Spec(tmm.optimizer_state(*metrics)))
        tmm.monitor(model).watch(outer)
        with tmm.monitor(model).step(0):
            backward(model)
            outer.step()
        found.append(tmm.monitor(model).get_step_metrics())
        norm = inner.state[module[0].weight]["exp_avg"].norm().item()
        assert found[-1]["optimizer_state/0.weight/exp_avg_norm"] == pytest.approx(norm, rel=1e-5)
        assert not tmm.explain(model).unmeasured
        tmm.remove(model)
    assert found[0].keys() == found[1].keys()


@pytest.mark.parametrize("unscaled", ["", "outer", "inner"])
@pytest.mark.parametrize("watched", ["outer", "inner"])
def test_a_scaler_around_an_optimizer_around_another(watched: str, unscaled: str) -> None:
    module = network()
    inner = Adam(module.parameters(), lr=0.01)
    outer = Lookahead(inner)
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    monitor.watch(outer if watched == "outer" else inner, scaler)
    for step in range(3):
        before = values(module)
        with monitor.step(step):
            module.zero_grad()
            backward(model, 64.0)
            scaler.scale(torch.ones(()))
            if step == 0:
                module[0].weight.grad[0, 0] = torch.inf
            if unscaled and step:
                scaler.unscale_(outer if unscaled == "outer" else inner)
            if unscaled == "inner" and step:
                outer.step()
            else:
                scaler.step(outer)
            if step == 0:
                scaler._per_optimizer_states.clear()
            else:
                scaler.update()
        got = monitor.get_step_metrics()
        if step == 0:
            assert got["step/skipped"] == 1
            assert not [key for key in got if key.startswith(("gradient", "update"))]
        else:
            check(got, before, values(module), gradients(module))


def test_steps_in_several_threads_are_not_inside_of_each_other() -> None:
    module = network()
    optimizers = [SGD(module[place].parameters(), lr=0.1) for place in (0, 2)]  # type: ignore[index]
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    together = threading.Barrier(2)
    for optimizer in optimizers:
        monitor.watch(optimizer)
        optimizer.register_step_pre_hook(lambda *_: (together.wait(10), None)[1])
    before = values(module)
    with monitor.step(0):
        backward(model)
        threads = [threading.Thread(target=optimizer.step) for optimizer in optimizers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    check(monitor.get_step_metrics(), before, values(module), gradients(module))


def test_optimizers_that_step_in_the_backward_pass() -> None:
    module, twin = network(), network()
    _apply_optimizer_in_backward(SGD, module.parameters(), {"lr": 0.1})
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    finder = OptimizerFinder(steps_of(model), None)
    before = values(module)
    with monitor.step(0):
        backward(model)
    finder.stop()
    backward(twin)
    check(monitor.get_step_metrics(), before, values(module), gradients(twin))
    assert not tmm.explain(model).unmeasured


def test_a_scaler_is_known_before_the_optimizer_is_found(tmp_path: Path) -> None:
    module = network()
    optimizer = SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    spec = tmm.Spec(*RULES, tmm.activation_gradient("norm"))
    with tmm.start_run("scaled", root=tmp_path, system_seconds=None) as run:
        model = run.watch(module, spec, scaler=scaler)
        output = model(VECTORS)
        output.retain_grad()
        scaler.scale(output.square().mean()).backward()
        scaler.step(optimizer)
        run.step()
    with tmm.open_run(run.path) as recorded:
        found = recorded.at(0)
    norm = output.grad.norm().item() / 64
    assert found["activation_gradient/2/norm"] == pytest.approx(norm, rel=1e-5)
    want = module[0].weight.grad.norm().item()  # type: ignore[index]
    assert found["gradient/0.weight/norm"] == pytest.approx(want, rel=1e-5)


class OldLookahead:
    """As before there were hooks: only looks like an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        """Only that of the other one."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Unfinished(Optimizer):
    """Keeps what it wraps under a name of its own, and does not initialize its class."""

    def __init__(self, *inner: Any) -> None:
        self._parts = dict(enumerate(inner))

    def step(self, closure: Any = None) -> None:
        for part in self._parts.values():
            part.step()


class Never(ModelAverager):
    """Averages nothing."""

    def __init__(self) -> None:
        """There are no other processes."""

    def average_parameters(self, params: Any) -> None:
        """Not yet."""


def by_parts(optimizer: Optimizer) -> Unfinished:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return Unfinished(*(OldLookahead(SGD([p], lr=0.1)) for p in parameters))


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "accelerate": lambda o: accelerate.AcceleratedOptimizer(o),
    "local SGD": lambda o: PostLocalSGDOptimizer(o, Never()),
    "old": OldLookahead,
    "old twice": lambda o: OldLookahead(OldLookahead(o)),  # type: ignore[arg-type]
    "parts": by_parts,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_of_optimizers_are_unwrapped(kind: str) -> None:
    if kind == "accelerate":
        Lazily("accelerate").Accelerator(cpu=True)
    module = network()
    wrapper = WRAPPERS[kind](SGD(module.parameters(), lr=0.1))
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(wrapper)
    with pytest.raises(ValueError, match="watched already"):
        monitor.watch(wrapper)
    before = values(module)
    with monitor.step(0):
        backward(model)
        wrapper.step()
    check(monitor.get_step_metrics(), before, values(module), gradients(module))


def test_what_wraps_no_optimizer_is_refused() -> None:
    model = tmm.instrument(network(), tmm.Spec(*RULES))
    for wrong in (Unfinished(), Unfinished(Unfinished()), 3):
        with pytest.raises(TypeError, match="hand over the optimizer whose step"):
            tmm.monitor(model).watch(wrong)


def test_an_optimizer_that_takes_the_place_of_a_watched_one() -> None:
    """It is measured, and may be watched by name later."""
    module = network()
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(SGD(module.parameters(), lr=0.1))
    second = SGD(module.parameters(), lr=0.2)
    other = SGD(network().parameters(), lr=0.1)
    for step in range(2):
        before = values(module)
        with monitor.step(step):
            module.zero_grad()
            backward(model)
            other.step()
            second.step()
        check(monitor.get_step_metrics(), before, values(module), gradients(module))
        assert not other._optimizer_step_pre_hooks
        if step == 0:
            monitor.watch(second)


def test_nothing_keeps_a_model_alive() -> None:
    hooks = _global_optimizer_pre_hooks
    before = set(hooks)
    module = network()
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    monitor.watch(SGD(module.parameters(), lr=0.1))
    known = weakref.ref(monitor)
    del model, module, monitor
    gc.collect()
    assert known() is None
    assert set(hooks) <= before
