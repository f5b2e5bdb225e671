"""One program for all steps or two: the same training, the same rows, one compilation less."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import assert_agrees, backward, record_calls, tolerance
from tests.model_zoo import BREAKING, PAUSES, noise
from tmm.core.failures import MonitoringWarning
from tmm.kernels.dropped_rows import rows_dropped
from tmm.runs.instrument import steps_of
from tmm.spec.program_choice import LARGE, Programs, choose_programs

CHEAP = (tmm.activation("rms", "absmax"), tmm.activation_gradient("rms"), tmm.gradient("norm"))
STEPS = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(512, 512), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.fc(x)))


class Wide(nn.Module):
    """Tensors of more than 2^16 elements, a dropout, and a part that may be compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 512)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Checkpointed(Wide):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Interrupted(Wide):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = x + block(x)
        return self.last(x)


class Refusing(Wide):
    """Raises an error of its own for batches of 7."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 7:
            raise ArithmeticError("seven")
        return super().forward(x)


class RefusingLate(nn.Module):
    """Raises an error of its own for batches of 7, behind what has been computed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 7:
            raise ArithmeticError("seven")
        return x * 2


def whole(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="aot_eager")


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


def by_blocks(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        block.compile(backend="aot_eager")
    return net


WAYS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "whole": (Wide, whole),
    "in place": (Wide, in_place),
    "block by block": (Wide, by_blocks),
    "checkpointed": (Checkpointed, whole),
    "checkpointed, block by block": (Checkpointed, by_blocks),
    "interrupted": (Interrupted, whole),
}


def train(
    kind: type[nn.Module],
    compiled: Callable[[nn.Module], nn.Module],
    programs: Programs | None,
    *,
    first: int = 0,
    every: int = 2,
) -> tuple[list[Tensor], dict[int, dict[str, float]], nn.Module]:
    """The losses and parameters of a training, its rows by step, and the model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = kind()
    model: nn.Module = compiled(net)
    if programs is not None:
        model = tmm.instrument(model, tmm.Spec(*CHEAP, every=every), programs=programs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    if programs is not None:
        tmm.monitor(model).watch(optimizer)
    torch.manual_seed(1)
    seen, rows = [], {}
    for step in range(first, first + STEPS):
        x = torch.randn(160, 16)
        if programs is not None:
            tmm.monitor(model).begin_step(step)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if programs is not None:
            tmm.monitor(model).end_step()
            if step % every == 0:
                rows[step] = tmm.monitor(model).get_step_metrics()
        seen.append(loss.detach())
    return [*seen, *(p.detach().clone() for p in net.parameters())], rows, model


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_training_and_rows_are_those_of_two_programs(way: str, first: int) -> None:
    """And one program is compiled, where two are else."""
    trainings, graphs = [], []
    for programs in (None, 2, 1):
        counters.clear()
        trainings.append(train(*WAYS[way], programs, first=first))
        graphs.append(counters["stats"]["unique_graphs"])
    (plain, _, _), (two, rows_of_two, _), (one, rows_of_one, model) = trainings
    assert all(map(torch.equal, plain, two))
    assert all(map(torch.equal, plain, one))
    assert rows_of_one == rows_of_two
    assert len(rows_of_one) >= 2
    assert all(len(rows) > 15 for rows in rows_of_one.values())
    assert "one program, as programs= asks for" in str(tmm.explain(model))
    assert graphs[0] > 0
    assert graphs == [graphs[0], 2 * graphs[0], graphs[0]]


@pytest.mark.parametrize("pause", ["graph_break", "print"])
@pytest.mark.parametrize("name", BREAKING)
def test_models_with_breaks_give_what_they_give_by_themselves(name: str, pause: str) -> None:
    """Each second step is measured, as eager hooks measure it."""
    module = BREAKING[name](PAUSES[pause]).train()
    alone = copy.deepcopy(module)
    spec = tmm.Spec(tmm.activation("rms", "absmax"), every=2)
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), spec, programs=1)
    for step in range(1, 5):
        x = noise(4, 8, seed=step)
        torch.manual_seed(step)
        with tmm.monitor(model).step(step):
            found = model(x)
            backward(found)
        recording = record_calls(alone, [lambda m, x=x: m(x)], seed=step)  # type: ignore[misc]
        torch.manual_seed(step)
        torch.testing.assert_close(found, alone(x))
        if step % 2 == 0:
            expected = recording.expected(("rms", "absmax"))
            assert_agrees(tmm.monitor(model).get_step_metrics(), expected, tolerance("aot_eager"))


def test_nothing_changes_before_a_first_step() -> None:
    model = tmm.instrument(whole(Wide()), tmm.Spec(tmm.activation("rms"), every=2), programs=1)
    model(torch.randn(160, 16)).sum().backward()
    assert not steps_of(model).twin.graphs


def test_nothing_is_gathered_of_other_steps() -> None:
    _, _, model = train(*WAYS["interrupted"], 1)
    steps = steps_of(model)
    steps.begin_step(101)
    model(torch.randn(160, 16)).sum().backward()
    collector = steps.timeline.open
    assert collector is not None
    assert not collector.holds_values
    steps.end_step()


def test_tensors_are_read_in_monitored_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[bool] = []

    @contextlib.contextmanager
    def noted(drops: bool) -> Iterator[None]:
        dropped.append(drops)
        with rows_dropped(drops):
            yield
            x = torch.ones(2)
            assert bool(torch.ops.tmm.summarize(x, "sum").isnan()) == drops

    monkeypatch.setattr("tmm.instrumentation.twin.rows_dropped", noted)
    train(*WAYS["whole"], 1)
    assert dropped == [False, True, False, True, False]


def test_passes_without_gradients_run_the_models_own_program() -> None:
    _, _, model = train(Wide, whole, 1)
    counters.clear()
    with torch.no_grad(), tmm.monitor(model).step(101):
        model(torch.randn(160, 16))
    assert counters["stats"]["unique_graphs"] == 1
    model(torch.randn(160, 16))  # outside of steps; of the training, it has gradients
    assert counters["stats"]["unique_graphs"] == 1


def test_shapes_may_change_between_monitored_steps() -> None:
    """A graph that is first traced where its rows are dropped measures later."""
    torch.manual_seed(0)
    net = Interrupted()
    model = tmm.instrument(
        torch.compile(net, backend="aot_eager"),
        tmm.Spec(tmm.activation("rms"), every=4),
        programs=1,
    )
    for step, size in enumerate((160, 200, 240, 200, 240, 200, 160, 7, 7)):
        x = torch.randn(size, 16)
        net.eval()
        with tmm.monitor(model).step(step):
            output = model(x)
        torch.testing.assert_close(output, net(x))
        if step % 4 == 0:
            found = tmm.monitor(model).get_step_metrics()
            expected = output.detach().double().square().mean().sqrt()
            assert found["activation/last/rms"] == pytest.approx(expected.item(), rel=1e-5)
            assert len(found) == sum(1 for _ in net.modules()) - 1  # a list is never called


def test_which_is_chosen() -> None:
    def chosen(*rules: Any, **options: Any) -> int:
        return choose_programs("auto", tmm.Spec(*rules, **options), own_is_compiled=True).count

    assert chosen(*CHEAP, tmm.update("relative_norm")) == 1
    assert chosen(tmm.activation("kurtosis")) == 1
    assert chosen(tmm.gradient(own=torch.norm)) == 1  # not in the graph
    assert chosen(tmm.attention("entropy")) == 2
    assert chosen(tmm.activation("histogram")) == 2
    assert chosen(tmm.activation(own=torch.linalg.svdvals)) == 2
    assert chosen(tmm.activation_gradient(own=torch.linalg.svdvals)) == 2
    assert chosen(tmm.rcc(), reference="init") == 2
    assert chosen(tmm.activation_difference("l2"), reference="init") == 2
    assert chosen(tmm.parameter_difference("l2"), reference="init") == 1  # runs no branch
    assert choose_programs("auto", tmm.Spec(*CHEAP), own_is_compiled=False).count == 2
    for rule, count in ((tmm.activation("rms"), 1), (tmm.activation_gradient("rms"), 2)):
        choice = choose_programs("auto", tmm.Spec(rule), own_is_compiled=True, shares_tensors=True)
        assert choice.count == count


@pytest.mark.parametrize("programs", [0, 3, True, "one", None, 1.5, [1]])
def test_anything_else_is_refused(programs: Any) -> None:
    with pytest.raises(ValueError, match="programs="):
        tmm.instrument(torch.compile(Wide()), tmm.Spec(*CHEAP), programs=programs)


@pytest.mark.parametrize(("batch", "count"), [(LARGE // 512 + 1, 1), (4, 2)])
def test_small_tensors_have_two(batch: int, count: int) -> None:
    model = tmm.instrument(
        torch.compile(Wide(), backend="aot_eager"), tmm.Spec(tmm.activation("rms"), every=2)
    )
    counters.clear()
    for step in range(4):
        with tmm.monitor(model).step(step):
            model(torch.randn(batch, 16)).sum().backward()
    assert counters["stats"]["unique_graphs"] == count
    assert steps_of(model).recorder.shared.choice.count == count
    assert ("one program" if count == 1 else "two programs") in str(tmm.explain(model))


def test_model_that_is_not_compiled_runs_its_own() -> None:
    net = Wide()
    for programs in (1, 2, "auto"):
        model = tmm.instrument(net, tmm.Spec(*CHEAP, every=2), programs=programs)
        for step in range(3):
            with tmm.monitor(model).step(step):
                model(torch.randn(160, 16)).sum().backward()
        assert tmm.explain(model).programs == ""
        tmm.remove(model)


def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A compiler that has a fault where anything is measured."""
    if any("summarize" in str(node.target) for node in graph.graph.nodes):
        raise RuntimeError("a fault of the compiler")
    return graph.forward


def test_fault_of_the_measured_program_ends_no_step_that_is_not_monitored() -> None:
    torch.manual_seed(0)
    net = Wide()
    model = tmm.instrument(
        torch.compile(net, backend=failing), tmm.Spec(tmm.activation("rms"), every=4), programs=1
    )
    for step in (1, 2, 3):
        x = torch.randn(160, 16)
        torch.manual_seed(step)
        with tmm.monitor(model).step(step):
            output = model(x)
        torch.manual_seed(step)
        assert torch.equal(output, Wide.forward(net, x))
    with pytest.raises(Exception, match="a fault of the compiler"), tmm.monitor(model).step(4):
        model(torch.randn(160, 16))


def test_fault_around_the_program_leads_back_to_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net = Wide()
    model = tmm.instrument(
        torch.compile(net, backend="aot_eager"),
        tmm.Spec(tmm.activation("rms"), every=2),
        programs=1,
    )
    twin = steps_of(model).twin

    def fail(*_: Any, **__: Any) -> None:
        torch.rand(3)  # what it has drawn is given back
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(twin, "run", fail)
        x = torch.randn(160, 16)
        torch.manual_seed(5)
        warned = pytest.warns(MonitoringWarning, match="programs=2.*a fault of ours")
        with warned, tmm.monitor(model).step(1):
            output = model(x)
    torch.manual_seed(5)
    assert torch.equal(output, Wide.forward(net, x))
    assert "two programs, as the measured one failed" in str(tmm.explain(model))
    with tmm.monitor(model).step(2):
        model(x)
    assert tmm.monitor(model).get_step_metrics()


def test_errors_of_the_model_are_its_own() -> None:
    model = tmm.instrument(
        torch.compile(Refusing(), backend="aot_eager"), tmm.Spec(*CHEAP, every=2), programs=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", MonitoringWarning)
        with pytest.raises(ArithmeticError, match="seven"), tmm.monitor(model).step(1):
            model(torch.randn(7, 16))
    assert steps_of(model).recorder.shared.is_used


@pytest.mark.parametrize("programs", [1, 2])
def test_step_function_that_raises_has_trained_once(programs: Programs) -> None:
    """Its optimizer has stepped: whether the step is monitored or not, it is not run again."""
    net, steps = Wide(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step(x: Tensor, is_refused: bool) -> Tensor:
        loss = net(x).square().mean()
        loss.backward()
        torch._dynamo.graph_break()
        optimizer.step()
        steps.append(1)
        torch._dynamo.graph_break()
        if is_refused:
            raise ArithmeticError("such a batch is left out")
        return loss.detach()

    compiled = torch.compile(step, backend="aot_eager")
    spec = tmm.Spec(tmm.activation("rms"), every=2)
    model = tmm.instrument(compiled, spec, module=net, programs=programs)
    for number, is_refused in enumerate((False, False, False, True, True)):
        try:
            with tmm.monitor(model).step(number):
                model(torch.randn(160, 16), is_refused)
        except ArithmeticError:
            assert is_refused
        assert len(steps) == number + 1


def test_module_that_raises_has_written_once() -> None:
    net = nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), RefusingLate())
    model = tmm.instrument(
        torch.compile(net, backend="aot_eager"),
        tmm.Spec(tmm.activation("rms"), every=4),
        programs=1,
    )
    for number, size in enumerate((160, 160, 7)):
        with contextlib.suppress(ArithmeticError), tmm.monitor(model).step(number):
            model(torch.randn(size, 16))
    assert net[1].num_batches_tracked == 3


def test_scaler_may_be_watched_after_steps_that_were_not_monitored() -> None:
    torch.manual_seed(0)
    net = Wide().eval()
    spec = tmm.Spec(tmm.activation_gradient("rms"), every=2)
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), spec, programs=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    monitor = tmm.monitor(model)
    x = torch.randn(160, 16)
    with monitor.step(1):
        model(x).square().mean().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor.watch(optimizer, scaler)
    with monitor.step(2):
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    output = net(x)
    expected = (output / output.numel() * 2).square().mean().sqrt()
    found = monitor.get_step_metrics()["activation_gradient/last/rms"]
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_function_of_the_user_that_is_compiled_around_it_is_not_broken() -> None:
    net = Wide()
    model = tmm.instrument(
        torch.compile(net, backend="aot_eager"), tmm.Spec(*CHEAP, every=2), programs=1
    )

    @torch.compile(backend="aot_eager", fullgraph=True)
    def around(x: Tensor) -> Tensor:
        result: Tensor = model(x) * 2
        return result

    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(torch.randn(160, 16)).sum().backward()
    with monitor.step(1):
        around(torch.randn(160, 16)).sum().backward()


def test_step_function_runs_in_one_program() -> None:
    torch.manual_seed(0)
    net = Wide()

    def step(x: Tensor) -> Tensor:
        return net(x).square().mean()

    compiled = torch.compile(step, backend="aot_eager")
    model = tmm.instrument(compiled, tmm.Spec(*CHEAP[:2], every=2), module=net, programs=1)
    counters.clear()
    for number in range(4):
        with tmm.monitor(model).step(number):
            model(torch.randn(160, 16)).backward()
        if number % 2 == 0:
            assert len(tmm.monitor(model).get_step_metrics()) > 15
    assert counters["stats"]["unique_graphs"] == 1
