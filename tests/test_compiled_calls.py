"""What the user compiled of a module's call is what monitored steps trace: hooks stay outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao import quantization
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import assert_agrees, record_calls, tolerance
from tests.ways import Counting
from tmm.core.failures import MonitoringWarning

METRICS = ("rms", "absmax")
SPEC = tmm.Spec(tmm.activation(*METRICS))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + torch.relu(self.fc(self.norm(x)))
        return result


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def shift_outside(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook that no graph can hold, like those of FSDP."""
    return (inputs[0] * 1.5,)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def halve_outside(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * 0.5


def outside(module: nn.Module) -> None:
    module.register_forward_pre_hook(shift_outside)
    module.register_forward_hook(halve_outside)


def traceable(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def with_keywords(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def backward(module: nn.Module) -> None:
    def halve(module: nn.Module, inputs: Any, outputs: object) -> Any:
        return None if inputs[0] is None else (inputs[0] * 0.5,)

    module.register_full_backward_hook(halve)


Compile = Callable[[nn.Module, Any, bool], Any]


def in_place(module: nn.Module, backend: Any, fullgraph: bool) -> Any:
    module.compile(backend=backend, fullgraph=fullgraph)
    return module


def blocks_in_place(module: nn.Module, backend: Any, fullgraph: bool) -> Any:
    for block in module.blocks:
        block.compile(backend=backend, fullgraph=fullgraph)
    return module


def blocks_wrapped(module: nn.Module, backend: Any, fullgraph: bool) -> Any:
    for index, block in enumerate(list(module.blocks)):
        module.blocks[index] = torch.compile(block, backend=backend, fullgraph=fullgraph)
    return module


def forwards(module: nn.Module, backend: Any, fullgraph: bool) -> Any:
    for block in module.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=fullgraph)
    return module


def whole(module: nn.Module, backend: Any, fullgraph: bool) -> Any:
    return torch.compile(module, backend=backend, fullgraph=fullgraph)


def hooked(module: nn.Module, compile_it: Compile, hook: Callable[[nn.Module], None]) -> nn.Module:
    for part in [module] if compile_it in (in_place, whole) else list(module.blocks):
        hook(part)
    return module


def trajectory(module: nn.Module, model: Any, monitor: tmm.Monitor | None = None) -> list[Tensor]:
    """Losses and parameters of a short training; each other step is monitored."""
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), requires_grad=True)
        if monitor is not None and step % 2:
            monitor.begin_step(step)
        loss = model(x).square().mean()
        loss.backward()
        if monitor is not None and step % 2:
            monitor.end_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in module.parameters())]


@pytest.mark.parametrize(
    ("compile_it", "hook", "fullgraph", "backend"),
    [
        (blocks_in_place, outside, True, "eager"),
        pytest.param(blocks_in_place, traceable, False, "eager", marks=pytest.mark.slow),
        (blocks_in_place, backward, True, "aot_eager"),
        (blocks_wrapped, outside, True, "eager"),
        (blocks_wrapped, with_keywords, False, "eager"),
        (whole, outside, True, "eager"),
        pytest.param(whole, traceable, False, "eager", marks=pytest.mark.slow),
        (in_place, outside, False, "eager"),
        (in_place, backward, False, "aot_eager"),
        (forwards, outside, True, "eager"),
        (forwards, traceable, False, "aot_eager"),
    ],
)
def test_hooks_run_where_the_plain_program_runs_them(
    compile_it: Compile, hook: Callable[[nn.Module], None], fullgraph: bool, backend: str
) -> None:
    torch.manual_seed(0)
    original = Net()
    counting = Counting(backend)
    plain = hooked(copy.deepcopy(original), compile_it, hook)
    wanted = trajectory(plain, compile_it(plain, counting, fullgraph))
    torch._dynamo.reset()
    module = hooked(copy.deepcopy(original), compile_it, hook)
    model = tmm.instrument(compile_it(module, backend, fullgraph), SPEC)
    monitor = tmm.monitor(model)
    got = trajectory(module, model, monitor)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
    assert len(tmm.explain(model).graphs) <= counting.graphs

    reference = hooked(copy.deepcopy(original), compile_it, hook)
    with torch.no_grad():
        for ours, theirs in zip(reference.parameters(), got[4:], strict=True):
            ours.copy_(theirs)
    x = torch.randn(4, 8)
    with monitor.step(9):
        model(x)
    want = record_calls(reference, [lambda model: model(x)]).expected(METRICS)
    assert_agrees(monitor.get_step_metrics(), want, tolerance(backend))


class Checkpointed(Block):
    """Repeats itself in the backward pass, as layers of Hugging Face do: by its own call."""

    def __call__(self, *args: Any) -> Any:
        return checkpoint(super().__call__, *args, use_reentrant=False)


class Breaking(Block):
    """Its forward alone is compiled, and breaks."""

    @torch.compile(backend="aot_eager")
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        result: Tensor = x + torch.relu(self.fc(y))
        return result


def test_a_call_of_the_users_is_not_repeated_inside_of_itself() -> None:
    module = Net(Checkpointed)
    reference = copy.deepcopy(module)
    blocks_in_place(module, "aot_eager", fullgraph=True)
    monitor = tmm.monitor(tmm.instrument(module, SPEC))
    x = torch.randn(4, 8)
    with monitor.step(0):
        module(x).sum().backward()
    want = record_calls(reference, [lambda model: model(x)]).expected(METRICS)
    assert_agrees(monitor.get_step_metrics(), want, tolerance("aot_eager"))
    lines = [line.text for graph in tmm.explain(module).graphs for line in graph.after]
    assert lines
    assert not any("checkpoint" in line for line in lines)


def test_a_compiled_forward_is_measured_behind_its_breaks() -> None:
    module = Net(Breaking)
    tmm.instrument(module, SPEC)
    monitor = tmm.monitor(module)
    x = torch.randn(4, 8)
    with monitor.step(0):
        output = module(x)
    values = monitor.get_step_metrics()
    first = module.blocks[0]
    rms = first.fc(first.norm(x)).detach().square().mean().sqrt().item()
    assert values["activation/blocks.0.fc/rms"] == pytest.approx(rms, rel=1e-6)
    assert values["activation/[root module]/absmax"] == pytest.approx(output.detach().abs().max())
    assert len(values) == 2 * 7
    assert not tmm.explain(module).unmeasured


def test_a_hook_of_the_root_is_compared_with_that_of_the_reference() -> None:
    module = hooked(Net(), whole, outside)
    rule = tmm.activation_difference("absmax")
    model = tmm.instrument(whole(module, "aot_eager", True), tmm.Spec(rule, reference="init"))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(torch.randn(4, 8))
    values = monitor.get_step_metrics()
    assert set(values.values()) == {0.0}
    assert len(values) == 7


def whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled_first", [True, False])
def test_sharded_blocks_in_full_graphs(one_rank: None, compiled_first: bool) -> None:
    torch.manual_seed(0)
    original = Net()

    def prepared() -> nn.Module:
        module = copy.deepcopy(original)
        steps = [lambda block: block.compile(backend="aot_eager", fullgraph=True), fully_shard]
        for apply in steps if compiled_first else steps[::-1]:
            for block in module.blocks:
                apply(block)
        fully_shard(module)
        return module

    plain = prepared()
    wanted = trajectory(plain, plain)
    module = prepared()
    monitor = tmm.monitor(tmm.instrument(module, SPEC))
    got = trajectory(module, module, monitor)
    for ours, theirs in zip(map(whole_tensor, got), map(whole_tensor, wanted), strict=True):
        assert torch.equal(ours, theirs)
    assert len(monitor.get_step_metrics()) == 2 * 7


def quantized() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    module.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    prepared: nn.Module = quantization.prepare_qat(module)
    return prepared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_quantization_aware_training(backend: str) -> None:
    torch.manual_seed(0)
    original = quantized()
    x = torch.randn(6, 4)
    plain = copy.deepcopy(original)
    wanted = [torch.compile(plain, backend=backend)(x) for _ in range(2)]
    torch._dynamo.reset()
    module, reference = copy.deepcopy(original), copy.deepcopy(original)
    model = tmm.instrument(torch.compile(module, backend=backend), SPEC)
    monitor = tmm.monitor(model)
    for step in range(2):
        with monitor.step(step):
            assert torch.equal(model(x), wanted[step])
        want = record_calls(reference, [lambda model: model(x)]).expected(METRICS)
        assert_agrees(monitor.get_step_metrics(), want, tolerance(backend))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


class Normalized(nn.Module):
    """Writes to a buffer before its graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor, factor: int) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        result: Tensor = self.fc(y) * factor
        return result


def test_a_graph_that_cannot_be_measured_does_not_end_a_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module = Normalized()
    plain = copy.deepcopy(module)
    model = tmm.instrument(torch.compile(module, backend="aot_eager", dynamic=False), SPEC)
    monitor = tmm.monitor(model)

    def broken(*args: Any, **options: Any) -> None:
        raise ArithmeticError("no room")

    x = torch.randn(6, 4)
    for step in range(3):
        if step == 1:
            monkeypatch.setattr("tmm.instrumentation.backend.rewrite", broken)
            with pytest.warns(MonitoringWarning, match="step 1.*no room"), monitor.step(step):
                output = model(x, step)
        else:
            monkeypatch.undo()
            with monitor.step(step):
                output = model(x, step)
        assert torch.equal(output, plain(x, step))
        assert bool(monitor.get_step_metrics()) == (step != 1)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_first_step_says_whose_fault_it_is_and_what_to_do() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    model = tmm.instrument(torch.compile(Breaks(), backend="eager", fullgraph=True), SPEC)
    said = r"tmm.*on_error='warn'"
    with (
        pytest.raises(torch._dynamo.exc.Unsupported, match=said),
        tmm.monitor(model).step(0),
    ):
        model(torch.ones(1))
