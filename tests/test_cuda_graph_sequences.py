"""What is recorded and replayed where CUDA graphs are, and that nobody reads overwritten memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.simulated_cuda_graphs import SimulatedGraphs, simulated_graphs
from tmm.runtime.host_copies import HostCopies, HostCopy

ACTIVATIONS = (tmm.activation("rms", "kurtosis", "histogram"),)
GRADIENTS = (tmm.activation_gradient("rms"), tmm.gradient("norm"), tmm.update("relative_norm"))
OWN = (tmm.activation(l2=lambda x: x.norm(dim=-1)),)
COMPARED = (tmm.activation("rms"), tmm.activation_difference("rms", "l2"))
SPECS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "activations": (ACTIVATIONS, {}),
    "gradients": (GRADIENTS, {}),
    "all": ((*ACTIVATIONS, *GRADIENTS), {}),
    "own": (OWN, {}),
    "reference": (COMPARED, {"reference": "init"}),
    "moving reference": (COMPARED, {"reference": "init", "reference_dtype": torch.float64}),
    "samples": (COMPARED, {"reference": "init", "reference_samples": 2}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.norm(nn.functional.gelu(self.first(x))))
        tmm.record("logits", logits)
        return logits


@pytest.fixture(autouse=True)
def copied_in_stream_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a device are copied at once; those of a CPU would be kept as they are."""
    monkeypatch.setattr(HostCopies, "copy", lambda self, tensor: HostCopy(tensor.clone(), None))


def trained(
    backend: Any, rules: tuple[Any, ...], options: dict[str, Any], steps: int, passes: int = 1
) -> tuple[dict[int, Any], list[torch.Tensor]]:
    """What was measured, and the loss of each step."""
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend=backend)
    tmm.instrument(compiled, tmm.Spec(*rules, every=2, **options), programs=2)
    monitor = tmm.monitor(compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    losses = []
    batches = torch.randn(steps, passes, 5, 6)
    # Without these, torch keeps the first gradient in memory that the second pass overwrites.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(steps):
        with monitor.step(step):
            for batch in batches[step]:
                loss = compiled(batch).square().mean()
                loss.backward()
            losses.append(loss.detach().clone())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if isinstance(backend, SimulatedGraphs) and step == steps - 5:
            backend.settled = len(backend.events)
    found = monitor.get_all_metrics()
    tmm.remove(compiled)
    return found, losses


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_both_programs_are_recorded_once(name: str, passes: int) -> None:
    rules, options = SPECS[name]
    expected, plain_losses = trained("aot_eager", rules, options, 12, passes)
    with simulated_graphs() as graphs:
        found, losses = trained(graphs, rules, options, 12, passes)
    functions = len(graphs.manager.ids_to_funcs)
    assert functions == 4  # forward and backward of both programs
    assert graphs.count("record") <= passes * functions  # the second pass follows on the first
    assert {kind for kind, _, _ in graphs.events[graphs.settled :]} == {"replay"}
    for own, other in zip(losses, plain_losses, strict=True):
        torch.testing.assert_close(own, other)
    assert found.keys() == expected.keys() == set(range(0, 12, 2))
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for key, value in values.items():
            np.testing.assert_allclose(found[step][key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_plain_programs_are_recorded_as_torch_does_it() -> None:
    """That the simulation is one: warm-up, recording, replays, and overwritten outputs."""
    with simulated_graphs() as graphs:
        compiled = torch.compile(Net(), backend=graphs)
        kept = []
        for _ in range(4):
            kept.append(compiled(torch.randn(5, 6)))
            kept[-1].sum().backward()
        assert [kind for kind, _, _ in graphs.events] == [
            *("warm up", "warm up", "record", "record", "replay", "replay", "replay", "replay")
        ]
        assert kept[0].isnan().all()  # its memory was given back
        assert torch.equal(kept[2], kept[3])  # it was overwritten


def evaluated(prepares: bool) -> list[tuple[str, int, int | None]]:
    """An evaluation before the training, which holds on to the last output."""
    with simulated_graphs() as graphs:
        compiled = torch.compile(Net(), backend=graphs)
        tmm.instrument(compiled, tmm.Spec(*ACTIVATIONS, every=2))
        monitor = tmm.monitor(compiled)
        if prepares:
            monitor.prepare(torch.randn(5, 6))
            assert [kind for kind, _, _ in graphs.events] == ["warm up"]
            graphs.events.clear()
        with torch.no_grad(), monitor.no_monitor():
            for _ in range(4):
                output = compiled(torch.randn(5, 6))
        del output
        tmm.remove(compiled)
        return list(graphs.events)


def test_preparing_keeps_later_programs_from_nothing() -> None:
    """The backward pass of its forward pass never comes, and nothing waits for that."""
    kinds = [kind for kind, _, _ in evaluated(prepares=False)]
    assert kinds == ["warm up", "record", "replay", "replay"]
    assert [kind for kind, _, _ in evaluated(prepares=True)] == kinds


def test_preparing_leaves_nothing_alive() -> None:
    """What lived would be taken for what the first step goes on with."""
    with simulated_graphs() as graphs:
        compiled = torch.compile(Net(), backend=graphs)
        tmm.instrument(compiled, tmm.Spec(*ACTIVATIONS, *GRADIENTS, every=2))
        monitor = tmm.monitor(compiled)
        gc.collect()
        gc.disable()
        try:
            monitor.prepare(torch.randn(5, 6))
            assert graphs.manager.current_node is not None
            assert graphs.manager.current_node.all_outputs_are_dead()
        finally:
            gc.enable()
        for step in range(3):
            with monitor.step(step):
                compiled(torch.randn(5, 6)).sum().backward()
        tmm.remove(compiled)
    (_, *events) = graphs.events
    assert events[0] == ("record", 0, None)  # warmed up already, and no continuation


def test_a_backward_pass_that_is_waited_for_still_is() -> None:
    with simulated_graphs() as graphs:
        compiled = torch.compile(Net(), backend=graphs)
        tmm.instrument(compiled, tmm.Spec(*ACTIVATIONS, every=2))
        monitor = tmm.monitor(compiled)
        with monitor.no_monitor():
            loss = compiled(torch.randn(5, 6)).sum()
        assert graphs.manager.running_forwards_with_pending_backwards
        monitor.prepare(torch.randn(5, 6))
        assert graphs.manager.running_forwards_with_pending_backwards
        loss.backward()
        assert not graphs.manager.running_forwards_with_pending_backwards
        tmm.remove(compiled)


def test_looking_for_what_is_not_finite_overwrites_no_output() -> None:
    with simulated_graphs() as graphs:
        net = Net()
        compiled = torch.compile(net, backend=graphs)
        x = torch.randn(5, 6)
        for _ in range(3):
            output = compiled(x)
            output.sum().backward()
        before, calls = output.detach().clone(), len(graphs.events)
        with torch.no_grad():
            net.last.bias[1] = float("inf")
        found = tmm.find_nonfinite(compiled, x)
        assert found is not None
        assert found.own_program is None
        assert torch.equal(output, before)
        assert len(graphs.events) == calls
