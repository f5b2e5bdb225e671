"""Modules that are called past the model's own forward are measured, or named and warned of."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tmm.core.failures import MonitoringWarning
from tmm.instrumentation.regions import COMPILED_CALL

SPEC = tmm.Spec(tmm.activation("rms"), tmm.activation_gradient("norm"))


class Net(nn.Module):
    """Leaves its head to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x))


class Coder(nn.Module):
    """Is called by its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.decoder = nn.Linear(8, 8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def as_it_is(net: nn.Module) -> nn.Module:
    return net


def whole(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="aot_eager")  # type: ignore[return-value]


def in_parts(net: Net) -> nn.Module:
    net.body.compile(backend="aot_eager")
    return net


def with_head(net: Net) -> nn.Module:
    net.lm_head.compile(backend="aot_eager")
    return net


def chunked(model: nn.Module, net: Net, x: torch.Tensor) -> None:
    hidden = model(x)
    for part in hidden.chunk(3):
        net.lm_head(part).square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("prepare", [as_it_is, whole, in_parts, with_head])
def test_a_head_that_the_loss_calls_in_chunks_is_measured(
    prepare: Callable[[Net], nn.Module],
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(6, 8, dtype=torch.float64)
    outputs: list[torch.Tensor] = []
    plain = copy.deepcopy(net)
    plain.lm_head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    chunked(plain, plain, x)
    model = tmm.instrument(prepare(net), SPEC)
    monitor = tmm.monitor(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitoringWarning)
        for step in range(2):
            net.zero_grad()
            with monitor.step(step):
                chunked(model, net, x)
    found = monitor.get_step_metrics()
    joined = torch.cat(outputs)
    assert found["activation/lm_head/rms"] == pytest.approx(
        joined.square().mean().sqrt().item(), rel=1e-12
    )
    assert found["activation_gradient/lm_head/norm"] == pytest.approx(
        (2 * joined).norm().item(), rel=1e-12
    )
    explanation = tmm.explain(model)
    assert not explanation.unmeasured
    assert "3 of 3 modules" in str(explanation)
    assert [part.grad is not None for part in net.parameters()] == [True] * 4
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    if prepare is not with_head:
        assert COMPILED_CALL not in vars(net.lm_head)


@pytest.mark.parametrize("prepare", [as_it_is, whole])
def test_parts_that_are_called_by_methods_are_measured(
    prepare: Callable[[nn.Module], nn.Module],
) -> None:
    torch._dynamo.reset()
    net = Coder()
    model = tmm.instrument(prepare(net), SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitoringWarning)
        with monitor.step(0):
            hidden = net.encode(x)
            for _ in range(3):  # as when tokens are generated
                hidden = net.decode(hidden)
            hidden.sum().backward()
    found = monitor.get_step_metrics()
    names = ("encoder", "encoder.0", "encoder.1", "decoder")
    assert {f"activation/{name}/rms" for name in names} <= found.keys()
    assert {f"activation_gradient/{name}/norm" for name in names} <= found.keys()
    explanation = tmm.explain(model)
    assert not explanation.unmeasured
    assert list(explanation.not_called) == ["[root module]"]
    assert "matched, no call seen: [root module]" in str(explanation)
    assert "4 of 5 modules" in str(explanation)


@pytest.mark.parametrize("way", ["whole", "blocks", "one block"])
def test_the_module_that_torch_compile_wraps_may_be_called_by_itself(way: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Coder().double()
    parts: dict[str, nn.Module] = {}
    if way == "whole":
        parts[""] = net
    else:
        for name in ("encoder", "decoder") if way == "blocks" else ("decoder",):
            parts[name] = getattr(net, name)
            setattr(net, name, torch.compile(parts[name], backend="aot_eager"))
    model = tmm.instrument(whole(net) if way == "whole" else net, SPEC)
    monitor = tmm.monitor(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitoringWarning)
        for step in range(3):
            with monitor.step(step):
                outputs = {name: [part(x)] for name, part in parts.items()}
                model(x).sum().backward()
                sum(output.square().sum() for (output,) in outputs.values()).backward()  # type: ignore[union-attr]
    found, calls = monitor.get_step_metrics(), dict[str, list[torch.Tensor]]()
    names = {part: name or "[root module]" for name, part in parts.items()}
    handles = [
        part.register_forward_hook(
            lambda module, inputs, output: calls.setdefault(names[module], []).append(output)
        )
        for part in parts.values()
    ]
    with torch.compiler.set_stance("force_eager"):
        net(x)
        for part in parts.values():
            part(x)
    for handle in handles:
        handle.remove()
    for name, seen in calls.items():
        assert len(seen) == 2
        expected = torch.cat(seen).square().mean().sqrt().item()
        assert found[f"activation/{name}/rms"] == pytest.approx(expected, rel=1e-12)
        assert f"activation_gradient/{name}/norm" in found
    assert not tmm.explain(model).unmeasured


@pytest.mark.parametrize("way", ["whole", "blocks", "not compiled"])
@pytest.mark.parametrize("count", [1, 2])
def test_other_tensors_in_the_place_of_parameters(way: str, count: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(Coder(), Coder()).double()
    prefix = ""
    if way == "blocks":
        for block in net:
            block.compile(backend="aot_eager")
    compiled: nn.Module = net
    if way == "whole":
        compiled, prefix = whole(net), "_orig_mod."
    model = tmm.instrument(compiled, SPEC)
    monitor = tmm.monitor(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    outputs: list[torch.Tensor] = []
    with monitor.step(0):
        for index in range(count):
            others = {
                prefix + name: (parameter * (2 + index)).detach().requires_grad_()
                for name, parameter in net.named_parameters()
            }
            outputs.append(torch.func.functional_call(model, others, (x,)))
            outputs[-1].square().sum().backward()
    found = monitor.get_step_metrics()
    expected = torch.cat(outputs).square().mean().sqrt().item()
    for name in ("[root module]", "1", "1.decoder"):
        assert found[f"activation/{name}/rms"] == pytest.approx(expected, rel=1e-12)
        norm = (2 * torch.cat(outputs)).norm().item()
        assert found[f"activation_gradient/{name}/norm"] == pytest.approx(norm, rel=1e-12)
    assert {f"activation/{name}/rms" for name in ("0.encoder.0", "1.encoder.1")} <= found.keys()
    assert not tmm.explain(model).unmeasured


def test_what_a_compiled_loss_calls_is_named_and_warned_of_once() -> None:
    torch._dynamo.reset()
    net = Net()
    model = tmm.instrument(whole(net), SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    compilations: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compilations.append(1)
        return module.forward

    loss = torch.compile(lambda h: net.lm_head(h).sum(), backend=backend, fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            with monitor.step(step):
                loss(model(x)).backward()
    (warning,) = (item for item in caught if item.category is MonitoringWarning)
    assert str(warning.message).startswith("lm_head: matched by a rule, but without rows")
    assert compilations == [1]  # the user's program is compiled once, whether a step is open or not
    explanation = tmm.explain(model)
    assert list(explanation.unmeasured) == ["lm_head"]
    assert "2 of 3 modules" in str(explanation)
    assert explanation.rules[0].silent == ("lm_head",)
    with monitor.step(3):
        net.lm_head(model(x)).sum().backward()
    assert not tmm.explain(model).unmeasured  # it was called where it can be seen


def test_nothing_is_measured_outside_of_steps_or_where_it_is_not_to_be() -> None:
    net = Net()
    model = tmm.instrument(net, SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with monitor.step(0):
        hidden = model(x)
        with monitor.no_monitor():
            net.lm_head(hidden * 100)
        net.lm_head(hidden)
        shown = vars(net.lm_head)[COMPILED_CALL]
        twin = copy.deepcopy(net)  # as averages of weights are made
        again = pickle.loads(pickle.dumps(net.lm_head))
        assert COMPILED_CALL not in vars(twin.lm_head)
        assert COMPILED_CALL not in vars(again)
        twin.lm_head(hidden * 100)
    once = monitor.get_step_metrics()["activation/lm_head/rms"]
    assert COMPILED_CALL not in vars(net.lm_head)
    net.lm_head(hidden * 100)
    with pytest.raises(KeyError), monitor.step(1):
        raise KeyError
    assert COMPILED_CALL not in vars(net.lm_head)
    assert once == pytest.approx(net.lm_head(hidden).square().mean().sqrt().item(), rel=1e-5)
    with monitor.step(2):
        model(x)
        net.lm_head(hidden)
        assert vars(net.lm_head)[COMPILED_CALL] is shown  # programs may have a guard on it
    tmm.remove(model)
    assert COMPILED_CALL not in vars(net.lm_head)


def test_a_repetition_for_the_backward_pass_does_not_count() -> None:
    net = Net()
    model = tmm.instrument(
        net, tmm.Spec(tmm.activation(count=lambda x: torch.ones_like(x).sum(), aggregate="sum"))
    )
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with monitor.step(0):
        checkpoint(net.lm_head, model(x), use_reentrant=False).sum().backward()
    assert monitor.get_step_metrics()["activation/lm_head/count"] == 12


def test_transformed_calls_run_as_they_did() -> None:
    net = Net()
    model = tmm.instrument(net, SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with monitor.step(0):
        hidden = model(x).detach()
        mapped = torch.func.vmap(net.lm_head)(hidden)
    torch.testing.assert_close(mapped, net.lm_head(hidden))
    assert "lm_head" in tmm.explain(model).not_called


class Healthy(nn.Module):
    """Has containers, a branch that is not taken and an attention that uses its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        x, _ = self.attention(x, x, x)
        return self.heads["a"](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("prepare", [as_it_is, whole])
def test_a_healthy_model_raises_no_warning(prepare: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    model = tmm.instrument(prepare(Healthy()), tmm.Spec(tmm.activation("rms")))
    monitor = tmm.monitor(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitoringWarning)
        with monitor.step(0):
            model(torch.randn(2, 3, 8)).sum().backward()
    assert not tmm.explain(model).unmeasured
    assert list(tmm.explain(model).not_called) == ["heads.b", "attention.out_proj"]


def test_a_repetition_by_a_reentrant_checkpoint_does_not_count() -> None:
    net = Net()
    model = tmm.instrument(
        net, tmm.Spec(tmm.activation(count=lambda x: torch.ones_like(x).sum(), aggregate="sum"))
    )
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with monitor.step(0):
        checkpoint(net.lm_head, model(x), use_reentrant=True).sum().backward()
    assert monitor.get_step_metrics()["activation/lm_head/count"] == 12


@pytest.mark.parametrize("prepare", [as_it_is, whole, in_parts])
def test_gradients_in_a_reentrant_checkpoint_are_named_as_missing(
    prepare: Callable[[Net], nn.Module],
) -> None:
    torch._dynamo.reset()
    net = Net()
    model = tmm.instrument(prepare(net), SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    with monitor.step(0):
        checkpoint(net.lm_head, model(x), use_reentrant=True).sum().backward()
    found = monitor.get_step_metrics()
    assert "activation/lm_head/rms" in found
    assert "activation_gradient/lm_head/norm" not in found
    assert "reentrant checkpoint" in tmm.explain(model).unmeasured["lm_head"]


def by_a_compiled_function(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden).square().sum()

    return torch.compile(loss, backend="aot_eager")(hidden)  # type: ignore[no-any-return]


def by_its_weight(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, head.weight, head.bias).square().sum()


@pytest.mark.parametrize("loss", [by_a_compiled_function, by_its_weight])
@pytest.mark.parametrize("prepare", [as_it_is, whole, in_parts])
def test_a_head_that_nobody_sees_is_warned_of_though_its_gradients_are_cleared(
    prepare: Callable[[Net], nn.Module],
    loss: Callable[[nn.Linear, torch.Tensor], torch.Tensor],
) -> None:
    torch._dynamo.reset()
    net = Net()
    model = tmm.instrument(prepare(net), SPEC)
    monitor, x = tmm.monitor(model), torch.randn(3, 8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    monitor.watch(optimizer)
    with pytest.warns(MonitoringWarning) as caught, monitor.step(0):
        hidden = model(x)
        for part in hidden.chunk(3):
            loss(net.lm_head, part).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    assert any(str(w.message).startswith("lm_head: matched by a rule") for w in caught)
    explanation = tmm.explain(model)
    assert list(explanation.unmeasured) == ["lm_head"]
    assert not explanation.not_called


class Attentive(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).unsqueeze(1)  # one head
        return nn.functional.scaled_dot_product_attention(x, x, x).squeeze(1)


def test_a_head_with_hooks_is_measured_in_a_model_that_is_traced_for_attention() -> None:
    torch._dynamo.reset()
    net, calls = Attentive(), []
    net.lm_head.register_forward_hook(lambda *call: calls.append(call[0]))  # as fully_shard has
    model = tmm.instrument(net, tmm.Spec(*SPEC.rules, tmm.attention("entropy")))
    monitor, x = tmm.monitor(model), torch.randn(2, 6, 8)
    for step in range(3):
        with monitor.step(step):
            chunked(model, net, x)
        found = monitor.get_step_metrics()
        assert {"activation/lm_head/rms", "activation_gradient/lm_head/norm"} <= found.keys()
    assert len(calls) == 6  # two items, in chunks of one
    assert len(tmm.explain(model).graphs) == 1
