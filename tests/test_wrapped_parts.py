"""Parts of a model in wrappers whose forward is where graphs begin: each has its own rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional

import tmm

SPEC = tmm.Spec(tmm.activation("rms"), tmm.activation_gradient("rms"), tmm.attention("entropy"))
BLOCKS = 4  # of which Dynamo traces two: the input of the first has no gradient


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projections(x).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.out(self.attention(x)))


def stack(wrap: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """Blocks between whose calls graphs break, as ``fully_shard`` breaks them."""
    torch.manual_seed(0)
    net = nn.Sequential(*(wrap(Block()) for _ in range(BLOCKS)))
    for block in net:
        block.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    return net


def rows(net: nn.Module) -> dict[str, object]:
    model = tmm.instrument(net, SPEC)
    monitor = tmm.monitor(net)
    with monitor.step(0):
        model(torch.arange(96.0).sin().view(2, 6, 8)).square().sum().backward()
    return dict(monitor.get_step_metrics())


@pytest.mark.parametrize("is_compiled", [False, True], ids=["traced", "compiled"])
def test_checkpointed_blocks_that_share_a_graph_have_their_own_rows(is_compiled: bool) -> None:
    expected = rows(stack(lambda block: block))
    net = stack(checkpoint_wrapper)
    if is_compiled:
        net.compile(backend="aot_eager")
    measured = rows(net)
    assert measured.keys() == expected.keys()
    assert {key for key in measured if f".{BLOCKS - 1}" in key or f"/{BLOCKS - 1}." in key}
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-5), key
