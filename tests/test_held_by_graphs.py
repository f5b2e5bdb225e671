"""Modules that graphs run carry no hooks; where Dynamo leaves them to Python, they are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tmm

SPEC = tmm.Spec(tmm.activation("rms"), tmm.activation_gradient("norm"))


class Net(nn.Module):
    """Two blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.is_broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        if self.is_broken:
            torch._dynamo.graph_break()
        return self.head(x)  # type: ignore[no-any-return]


def hooks_at_each_call(net: nn.Module) -> tuple[Callable[..., Any], list[list[str]]]:
    """A backend, and the modules that carry hooks whenever one of its graphs runs."""
    seen: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        def run(*inputs: object) -> Any:
            named = net.named_modules()
            seen.append([n for n, m in named if m._forward_hooks or m._forward_pre_hooks])
            return graph(*inputs)

        return run

    return backend, seen


def expected(net: Net, x: torch.Tensor) -> dict[str, float]:
    """By hooks on a copy."""
    net, found = copy.deepcopy(net), dict[str, float]()

    def look(name: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        found[f"activation/{name}/rms"] = output.detach().square().mean().sqrt().item()

        def gradient(gradient: torch.Tensor) -> None:
            found[f"activation_gradient/{name}/norm"] = gradient.norm().item()

        output.register_hook(gradient)

    for name, module in net.named_modules():
        if not isinstance(module, nn.ModuleList):
            call = lambda *a, name=name or "[root module]": look(name, *a)  # noqa: E731
            module.register_forward_hook(call)
    with torch.compiler.set_stance("force_eager"):
        net(x).sum().backward()
    return found


def check(model: nn.Module, net: Net, step: int, rows: int = 3) -> None:
    """One monitored step agrees with hooks."""
    monitor, x = tmm.monitor(model), torch.randn(rows, 4)
    with monitor.step(step):
        model(x).sum().backward()
    assert monitor.get_step_metrics() == pytest.approx(expected(net, x), rel=1e-5)


def pass_between(model: nn.Module, step: int, rows: int = 3) -> None:
    """A step that is not monitored, in the measured program."""
    with tmm.monitor(model).step(step):
        model(torch.randn(rows, 4)).sum().backward()


def in_one_program(net: nn.Module, **options: Any) -> nn.Module:
    """Compiled, and monitored in even steps."""
    spec = tmm.Spec(*SPEC.rules, every=2)
    return tmm.instrument(torch.compile(net, **options), spec, programs=1)


def test_modules_of_a_whole_graph_carry_no_hooks_once_it_has_run() -> None:
    net = Net()
    backend, seen = hooks_at_each_call(net)
    model = tmm.instrument(torch.compile(net, backend=backend), SPEC)
    for step in range(3):
        check(model, net, step)
    assert [len(names) for names in seen] == [9, 1, 1]
    assert seen[1:] == [[""]] * 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_blocks_that_are_compiled_on_their_own_hold_their_parts() -> None:
    net = Net()
    backend, seen = hooks_at_each_call(net)
    for block in net.blocks:
        block.compile(backend=backend)
    model = tmm.instrument(net, SPEC)
    for step in range(2):
        check(model, net, step)
    # The root and the head run outside of graphs, and a block may come to.
    assert [set(names) for names in seen[2:]] == [
        {"", "blocks", "blocks.0", "blocks.1", "head"}
    ] * 2


def test_a_broken_program_is_watched() -> None:
    net = Net()
    net.is_broken = True
    backend, seen = hooks_at_each_call(net)
    model = tmm.instrument(torch.compile(net, backend=backend), SPEC)
    for step in range(3):
        check(model, net, step)
    assert {len(names) for names in seen} == {9}


@pytest.mark.parametrize("parts", [False, True])
def test_what_dynamo_leaves_to_python_for_a_while_is_measured(parts: bool) -> None:
    net = Net()
    if parts:
        for block in net.blocks:
            block.compile(backend="aot_eager")
        model: Any = net
    else:
        model = torch.compile(net, backend="aot_eager")
    model = tmm.instrument(model, SPEC)
    for step in range(2):
        check(model, net, step)
    with torch.compiler.set_stance("force_eager"):
        check(model, net, 2)
    check(model, net, 3)


def test_a_program_that_breaks_later_is_measured() -> None:
    net = Net()
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), SPEC)
    for step in range(2):
        check(model, net, step)
    net.is_broken = True
    for step in range(2, 4):
        check(model, net, step)
    net.is_broken = False
    check(model, net, 4)


@pytest.mark.filterwarnings("ignore")
def test_shapes_beyond_the_recompile_limit_are_measured() -> None:
    net = Net()
    options: dict[str, Any] = {"backend": "aot_eager", "dynamic": False}
    model = tmm.instrument(torch.compile(net, **options), SPEC)
    for step in range(2 * torch._dynamo.config.recompile_limit + 4):
        check(model, net, step, rows=2 + step)
    check(model, net, 100, rows=2)  # a graph that is there


def test_hooks_of_the_user_run_in_the_graph_that_is_there() -> None:
    net = Net()
    net.blocks[0].register_forward_hook(lambda module, inputs, output: output * 2)
    net.head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    backend, seen = hooks_at_each_call(net)
    model = tmm.instrument(torch.compile(net, backend=backend), SPEC)
    for step in range(3):
        check(model, net, step)
    assert len(tmm.explain(model).graphs) == 1
    assert seen[1:] == [["", "blocks.0", "head"]] * 2


def test_a_module_that_takes_the_place_of_another_is_measured() -> None:
    net = Net()
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), SPEC)
    for step in range(2):
        check(model, net, step)
    net.head = nn.Linear(4, 3)
    check(model, net, 2)
    with torch.compiler.set_stance("force_eager"):
        check(model, net, 3)


def test_a_model_that_is_compared_is_watched() -> None:
    net = Net()
    backend, seen = hooks_at_each_call(net)
    spec = tmm.Spec(tmm.activation_difference("rms"), reference="init")
    model = tmm.instrument(torch.compile(net, backend=backend), spec)
    monitor = tmm.monitor(model)
    for step in range(2):
        with monitor.step(step):
            model(torch.randn(3, 4)).sum().backward()
    assert len(seen[-1]) == 9


def test_passes_in_between_need_no_hook_where_graphs_hold_all() -> None:
    net = Net()
    backend, seen = hooks_at_each_call(net)
    model = in_one_program(net, backend=backend)
    for step in (2, 4):
        check(model, net, step)
        pass_between(model, step + 1)
    assert [len(names) for names in seen] == [9, 0, 1, 0]


@pytest.mark.parametrize("begins", [0, 1])
def test_hooks_of_the_user_run_in_one_graph_of_all_steps(begins: int) -> None:
    net = Net()
    net.blocks[0].register_forward_hook(lambda module, inputs, output: output * 2)
    net.head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model = in_one_program(net, backend="aot_eager")
    for step in range(begins, 6):
        (pass_between if step % 2 else lambda *a: check(a[0], net, a[1]))(model, step)
    assert len(tmm.explain(model).graphs) == 1


def test_what_breaks_in_a_pass_in_between_is_measured() -> None:
    net = Net()
    model = in_one_program(net, backend="aot_eager")
    check(model, net, 2)
    pass_between(model, 3)
    net.is_broken = True
    pass_between(model, 5)
    check(model, net, 6)
    net.is_broken = False
    pass_between(model, 7)
    check(model, net, 8)


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_to_python_in_a_pass_in_between_is_measured() -> None:
    net = Net()
    model = in_one_program(net, backend="aot_eager", dynamic=False)
    check(model, net, 0)
    for step in range(torch._dynamo.config.recompile_limit + 4):
        pass_between(model, 2 * step + 1, rows=2 + step)
    check(model, net, 100)
    check(model, net, 102, rows=40)
    pass_between(model, 103, rows=41)
    with torch.compiler.set_stance("force_eager"):
        pass_between(model, 105)
        check(model, net, 106)
    check(model, net, 108)


def test_what_changes_in_a_pass_in_between_is_measured() -> None:
    net = Net()
    model = in_one_program(net, backend="aot_eager")
    check(model, net, 2)
    net.head = nn.Linear(4, 3)
    pass_between(model, 3)
    check(model, net, 4)
    net.blocks[1] = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    pass_between(model, 5)
    check(model, net, 6)
