"""The twin keeps to itself, and every row goes to the module that ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.callback import callback_handler

import tmm
from tmm.instrumentation.compile_settings import HAS_ISOLATION

RMS = tmm.Spec(tmm.activation("rms"))


def rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def instrumented(module: nn.Module, **options: object) -> tuple[nn.Module, tmm.Monitor]:
    torch._dynamo.reset()
    model = torch.compile(module, **{"backend": "eager", **options})  # type: ignore[call-overload]
    model = tmm.instrument(model, RMS)
    return model, tmm.monitor(model)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.a.register_forward_hook(lambda module, inputs, output: output * 10)
        self.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.b(self.a(x))
        return output


def test_hooks_of_the_user_run_first_and_do_not_recompile() -> None:
    module = Hooked()
    model, monitor = instrumented(module)
    for step in range(4):
        x = torch.randn(2, 4)
        plain = model(x)
        with monitor.step(step):
            assert torch.equal(model(x), plain)
        assert monitor.get_step_metrics() == pytest.approx(
            {
                "activation/a/rms": rms(module.a(x)),
                "activation/b/rms": rms(plain),
                "activation/[root module]/rms": rms(plain),
            },
            rel=1e-6,
        )
    assert len(tmm.explain(model).graphs) == 1


class Scaled(nn.Module):
    """Recompiles for each new factor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        output: torch.Tensor = self.fc(x) * factor
        return output


@pytest.mark.filterwarnings("ignore")
def test_over_the_recompile_limit_it_measures_eagerly() -> None:
    module = Scaled()
    model, monitor = instrumented(module, dynamic=False)
    limit = torch._dynamo.config.recompile_limit * (1 if HAS_ISOLATION else 2)
    for step in range(limit + 3):
        x, factor = torch.randn(2, 4), 1.5 + step
        with monitor.step(step):
            output = model(x, factor)
        expected = {
            "activation/fc/rms": rms(module.fc(x)),
            "activation/[root module]/rms": rms(output),
        }
        assert monitor.get_step_metrics() == pytest.approx(expected, rel=1e-6)
    explanation = tmm.explain(model)
    assert len(explanation.graphs) == limit
    assert set(explanation.eager) == {"[root module]", "fc"}
    assert "recompile limit" in explanation.eager["[root module]"]
    assert "recompile limit" in explanation.eager["fc"]


class Block(nn.Module):
    """Breaks its graph in the middle; equal blocks share the graphs of both halves."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.activation = nn.Tanh()
        self.second = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.second.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        output: torch.Tensor = self.second(self.activation(y))
        return output


class Shuffled(nn.Module):
    """Runs its blocks in the order that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(10.0**i) for i in range(4))
        self.order = list(range(4))

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        return {index: self.blocks[index](x) for index in self.order}


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_rows_go_to_the_block_that_ran(backend: str) -> None:
    module = Shuffled()
    model, monitor = instrumented(module, backend=backend)
    for step, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 3])):
        module.order = order
        x = torch.randn(2, 4)
        with monitor.step(step):
            model(x)
        expected = {}
        for index in order:
            block, name = module.blocks[index], f"activation/blocks.{index}"
            first = block.first(x)
            second = block.second(first.tanh())
            expected |= {
                f"{name}.first/rms": rms(first),
                f"{name}.activation/rms": rms(first.tanh()),
                f"{name}.second/rms": rms(second),
                f"{name}/rms": rms(second),
                f"activation/[root module][{index}]/rms": rms(second),
            }
        assert monitor.get_step_metrics() == pytest.approx(expected, rel=1e-6)
    # Blocks share graphs: fewer than two for each of them.
    assert len(tmm.explain(model).graphs) < 2 * len(module.blocks)


class Numbered(nn.Module):
    """Each instance needs a version of its own of the frame after its graph break."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        torch._dynamo.graph_break()
        return y * self.number


@pytest.mark.parametrize("order", [("plain", "twin"), ("twin", "plain")])
def test_neither_program_uses_up_the_other_ones_recompilations(order: tuple[str, ...]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    module = nn.Sequential(*[Numbered(i) for i in range(7)])
    assert len(module) < torch._dynamo.config.recompile_limit < 2 * len(module)
    model, monitor = instrumented(module, backend=backend)
    counts = []
    for step, program in enumerate((*order, *order)):
        with monitor.step(step) if program == "twin" else monitor.no_monitor():
            model(torch.randn(2, 4))
        counts.append(len(graphs))
    assert counts == [9, 18, 18, 18]


@pytest.mark.skipif(not HAS_ISOLATION, reason="torch before 2.13 has one limit for all")
@pytest.mark.filterwarnings("ignore")
def test_a_recompile_limit_of_the_users_holds_for_the_twin() -> None:
    model, monitor = instrumented(Scaled(), dynamic=False, recompile_limit=2)
    for step in range(4):
        with monitor.step(step):
            model(torch.randn(2, 4), 1.5 + step)
    assert len(tmm.explain(model).graphs) == 2


def test_a_rule_for_some_blocks_holds_where_blocks_share_graphs() -> None:
    torch._dynamo.reset()
    module = Shuffled()
    rule = tmm.activation("rms", modules=r"blocks\.[13]\.second")
    other = tmm.activation("absmax", modules=r"blocks\.2\.first")
    model = tmm.instrument(torch.compile(module, backend="eager"), tmm.Spec(rule, other))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(torch.randn(2, 4))
    assert set(monitor.get_step_metrics()) == {
        "activation/blocks.1.second/rms",
        "activation/blocks.2.first/absmax",
        "activation/blocks.3.second/rms",
    }


class Bad(nn.Module):
    """Fails outside of any graph."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("bad")


class Failing(nn.Module):
    """An inner module fails and the outer one goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = Bad()
        self.good = Block(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            self.bad(x)
        except KeyError:
            x = x + 1
        output: torch.Tensor = self.good(x)
        return output


def test_an_exception_that_the_model_catches_does_not_shift_rows() -> None:
    module = Failing()
    model, monitor = instrumented(module)
    x = torch.randn(2, 4)
    with monitor.step(0):
        output = model(x)
    metrics = monitor.get_step_metrics()
    assert "activation/bad/rms" not in metrics
    assert metrics["activation/good.first/rms"] == pytest.approx(rms(module.good.first(x + 1)))
    assert metrics["activation/[root module]/rms"] == pytest.approx(rms(output))


def test_nothing_is_left_on_the_modules() -> None:
    module = Shuffled()
    model, monitor = instrumented(module)
    before = [list(getattr(m, "_forward_hooks")) for m in module.modules()]  # noqa: B009
    with monitor.step(0):
        model(torch.randn(2, 4))
    with pytest.raises(RuntimeError), monitor.step(1):
        model(torch.randn(2, 5))
    assert [list(m._forward_hooks) for m in module.modules()] == before
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert callback_handler.start_callbacks == callback_handler.end_callbacks == []


def test_modules_that_are_added_later_are_measured() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    model, monitor = instrumented(module)
    x = torch.randn(2, 4)
    with monitor.step(0):
        model(x)
    module.append(nn.Linear(4, 2))
    with monitor.step(1):
        model(x)
    assert "activation/1/rms" in monitor.get_step_metrics()


def test_two_instrumented_models_that_share_a_module() -> None:
    shared = nn.Linear(4, 4)
    first, first_monitor = instrumented(nn.Sequential(shared, nn.ReLU()))
    second = tmm.instrument(torch.compile(nn.Sequential(nn.Tanh(), shared), backend="eager"), RMS)
    second_monitor = tmm.monitor(second)
    x = torch.randn(2, 4)
    with first_monitor.step(0), second_monitor.step(0):
        first(x)
        second(x)
    assert first_monitor.get_step_metrics()["activation/0/rms"] == pytest.approx(rms(shared(x)))
    expected = rms(shared(x.tanh()))
    assert second_monitor.get_step_metrics()["activation/1/rms"] == pytest.approx(expected)


def test_sizes_of_one_model_are_not_dynamic_in_the_next() -> None:
    sizes: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        sizes.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph

    for width in (3, 4, 5):
        model = nn.Sequential(nn.Linear(width, 2), nn.ReLU())
        measured = tmm.instrument(
            torch.compile(model, backend=backend), tmm.Spec(tmm.activation("rms"))
        )
        with tmm.monitor(measured).step(0):
            measured(torch.randn(width, width))
    assert sizes == [[], [], []]  # a dynamic size would be an input
