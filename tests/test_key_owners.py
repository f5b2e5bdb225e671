"""Two different tensors are never joined under one key."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tmm
from tmm.core.metrics import builtin_reductions
from tmm.core.records import Measurement, PackedLayout, Site, Slot
from tmm.runtime.key_binding import KeyRegistry, single_row

(MEAN,) = builtin_reductions(("mean",), is_complex=False)


def sites_of(registry: KeyRegistry, *sites: Site, family: str = "activation") -> list[str]:
    rows = tuple(Slot.of(Measurement(family, site, MEAN)) for site in sites)
    binding = registry.bind(PackedLayout(rows, 1), lambda measurement: measurement.site)
    return [site for group in binding.groups for site in group.sites]


PAIRS = [
    (Site("m.head_0.query"), Site("m", ".head_0.query")),
    (Site("attention.query"), Site("attention", ".query")),  # as of BERT, heads pooled
    (Site("a[0]"), Site("a", "[0]")),
    (Site("m.call_1", ".head_0"), Site("m", ".call_1.head_0")),
    (Site("fc.weight"), Site("fc", ".weight")),
    (Site("fc", rank=1), Site("fc[rank 1]")),
    (Site("m.x", is_shown=True), Site("m.x")),
    (Site("[root module]", "[loss]"), Site("[root module][loss]")),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_first_owner_keeps_the_key_and_both_are_named(
    pair: tuple[Site, Site], turned: bool
) -> None:
    registry = KeyRegistry()
    first, second = reversed(pair) if turned else pair
    assert len(sites_of(registry, first, second)) == 1
    assert sites_of(registry, second) == []  # whenever it comes again
    assert len(sites_of(registry, first)) == 1
    ((name, reason),) = registry.owners.refused.items()
    assert name == f"activation/{first.named(first.module + first.path)}"
    assert reason.count("is not recorded") == 1


def test_calls_of_one_module_and_tensors_shown_under_one_name_are_one_owner() -> None:
    registry = KeyRegistry()
    assert len(sites_of(registry, Site("m"), Site("m"))) == 2
    shown = Site("m.x", is_shown=True), Site("m", ".x", is_shown=True)
    assert len(sites_of(registry, *shown)) == 2
    assert not registry.owners.refused


def test_a_recorded_value_whose_name_is_a_key() -> None:
    registry = KeyRegistry()
    assert sites_of(registry, Site("m")) == ["activation/m"]
    named = Measurement("", Site("activation/m"), MEAN)
    assert not registry.bind(single_row(named), lambda m: m.site).groups
    reason = registry.owners.refused["activation/m"]
    assert "the output of module 'm'" in reason
    assert "the model records as 'activation/m'" in reason


class Holding(nn.Module):
    """Holds a module and what is done with it."""

    def __init__(self, call: Callable[[Any, torch.Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def scaled(factor: float) -> Holding:
    return Holding(lambda _, x: x * factor)


def run(
    module: nn.Module,
    *rules: Any,
    log: Callable[[tmm.Monitor, int], None] = lambda monitor, step: None,
    steps: int = 1,
    compiled: bool = True,
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    torch._dynamo.reset()
    callee = torch.compile(module, backend="eager") if compiled else torch.compiler.disable(module)
    model = tmm.instrument(callee, tmm.Spec(*rules))
    monitor = tmm.monitor(model)
    x = torch.ones(1, 2, 3, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            with monitor.step(step):
                model(x)
                log(monitor, step)
    texts = [str(w.message) for w in said if issubclass(w.category, tmm.MonitoringWarning)]
    return monitor.get_step_metrics(), tmm.explain(model).unmeasured, texts


def attend(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.head_0["query"](x)
    return functional.scaled_dot_product_attention(x, x, x)


def test_a_module_named_like_a_part_of_an_attention() -> None:
    module = Holding(attend, head_0=nn.ModuleDict({"query": scaled(100)}))
    values, unmeasured, said = run(module, tmm.activation("mean"), tmm.attention("mean"), steps=2)
    assert values["activation/head_0.query/mean"] == 100
    assert values["activation/[root module].head_1.query/mean"] == 1
    assert not unmeasured  # the root's heads have its name

    outer = Holding(lambda net, x: net.m(x), m=module)
    values, unmeasured, said = run(outer, tmm.activation("mean"), tmm.attention("mean"), steps=2)
    assert values["activation/m.head_0.query/mean"] == 100
    assert values["activation/m.head_1.query/mean"] == 1
    reason = unmeasured["activation/m.head_0.query"]
    assert "belongs to the output of module 'm.head_0.query'" in reason
    assert "head_0.query inside of module 'm' is not recorded" in reason
    (text,) = said
    assert reason in text


@pytest.mark.parametrize("compiled", [True, False])
def test_a_module_named_like_a_tensor_of_an_output(compiled: bool) -> None:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = net.a(x)[0] + net._modules["a[0]"](x)
        return y

    module = Holding(call, a=Holding(lambda _, x: [x]), **{"a[0]": scaled(5)})
    values, unmeasured, said = run(module, tmm.activation("mean"), compiled=compiled)
    assert values == {"activation/a[0]/mean": 1, "activation/[root module]/mean": 6}
    assert "'a[0]' is not recorded" in unmeasured["activation/a[0]"]
    assert len(said) == 1


def test_a_number_that_is_logged_under_a_key_that_is_measured_ends_no_training() -> None:
    def log(monitor: tmm.Monitor, step: int) -> None:
        if step:
            monitor.log_scalar("activation/[root module]/mean", 9.0)
        monitor.log_scalar("loss", 4.0)

    values, unmeasured, said = run(scaled(2), tmm.activation("mean"), log=log, steps=3)
    assert values == {"activation/[root module]/mean": 2, "loss": 4}
    assert "log_scalar" in unmeasured["activation/[root module]/mean"]
    assert len(said) == 1


def test_a_value_that_is_recorded_under_a_key_that_was_logged() -> None:
    def call(net: Any, x: torch.Tensor) -> torch.Tensor:
        tmm.record("loss", x)
        return x * 2

    compiled = torch.compile(Holding(call), backend="eager")
    model = tmm.instrument(compiled, tmm.Spec(tmm.activation("mean"), every=2))
    monitor = tmm.monitor(model)
    with monitor.step(1):
        model(torch.ones(2))
        monitor.log_scalar("loss", 4.0, force=True)
    with pytest.warns(tmm.MonitoringWarning, match="records as 'loss' is not"), monitor.step(2):
        model(torch.ones(2))
    assert monitor.get_step_metrics() == {"activation/[root module]/mean": 2}


def test_norms_of_gradients_are_not_joined_with_what_is_logged() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 2, bias=False)
    model = tmm.instrument(torch.compile(module, backend="eager"), tmm.Spec(tmm.gradient("norm")))
    monitor = tmm.monitor(model)
    monitor.watch(torch.optim.SGD(module.parameters()))
    for step in range(2):
        with monitor.step(step):
            model(torch.ones(1, 2)).sum().backward()
            monitor.monitor_gradients()
            if step:
                monitor.log_scalar("step/gradient_norm", 9.0)
            module.zero_grad()
    values = monitor.get_step_metrics()
    assert values["step/gradient_norm"] == pytest.approx(2.0)
    assert "log_scalar" in tmm.explain(model).unmeasured["step/gradient_norm"]


def test_keys_that_an_aggregate_gives() -> None:
    values, unmeasured, _ = run(
        scaled(1),
        tmm.activation(f=lambda x: x, aggregate=lambda v: {"[min]": float(v.min()) + 10}),
        tmm.activation(**{"f[min]": lambda x: x.mean()}),
    )
    assert values == {"activation/[root module]/f[min]": 1}
    assert "aggregate of" in unmeasured["activation/[root module]/f[min]"]


class Wrapping(nn.Module):
    """A wrapper by its attribute, with a layer of its own that is named like one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._orig_mod(x) + self.fc(x)
        return y


def test_modules_and_parameters_that_only_a_wrapper_s_component_tells_apart() -> None:
    inner = Holding(
        lambda net, x: net.fc(x) + net.other(x),
        fc=nn.Linear(4, 4, bias=False),
        other=nn.Linear(4, 4, bias=False),
    )
    module = Holding(lambda net, x: net.m(x), m=Wrapping(inner))
    values, unmeasured, said = run(
        *(module, tmm.activation("norm"), tmm.parameter("norm")),
        log=lambda monitor, step: monitor.monitor_parameters(),
    )
    x = torch.ones(1, 2, 3, 4)
    for name, layer in (
        ("m._orig_mod.fc", inner.fc),
        ("m.other", inner.other),
        ("m.fc", module.m.fc),
    ):
        norm = float(layer(x).detach().norm())
        assert values[f"activation/{name}/norm"] == pytest.approx(norm, rel=1e-5)
        norm = float(layer.weight.detach().norm())
        assert values[f"parameter/{name}.weight/norm"] == pytest.approx(norm, rel=1e-5)
    assert (unmeasured, said) == ({}, [])
