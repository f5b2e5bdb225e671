"""Sequences that several processes have parts of, against the same model on one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.fx import Graph

from tests.context_parallel_trainings import alone
from tests.interpreters import Interpreters
from tests.test_distributed import _noise, launch, result
from tmm.passes.attention.found import FoundAttention
from tmm.passes.attention.head_rows import why_unreadable


def test_activations_and_attention_join_over_the_sequence(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    names = ("in_parts", "in_parts_compiled")
    done = launch(interpreters, 2, tmp_path, names, "tests.context_parallel_trainings")
    assert done.returncode == 0, done.stderr[-5000:]
    expected = alone()
    del expected[-1]
    assert "attention_entropy/3.head_1" in expected[0]
    # Of collectives in a model that is not compiled no graph is made.
    attention = {key for key in expected[0] if key.startswith("attention_")}
    for name, missing in (("in_parts_compiled", set()), ("in_parts", attention)):
        found = result(tmp_path, name)
        for step, values in expected.items():
            assert found[step].keys() == values.keys() - missing
            for key in values.keys() - missing:
                np.testing.assert_allclose(
                    *(found[step][key], values[key]),
                    rtol=1e-5,
                    atol=_noise(key, values),
                    err_msg=key,
                )
        reasons = [text for name, text in found[-1].items() if "attention" in name]
        assert bool(reasons) == bool(missing)


@pytest.mark.parametrize("sharded", range(3), ids=["query", "key", "value"])
def test_rings_are_refused_with_the_reason(sharded: int) -> None:
    """Of an attention whose sequence ranks have parts of, each sees some of the keys."""
    with one_process():
        mesh = init_device_mesh("cpu", (1,))
        found = traced(mesh, [Shard(2) if place == sharded else Shard(1) for place in range(3)])
        assert "parts of its sequence (context parallel)" in (why_unreadable(found) or "")
        heads = traced(mesh, [Shard(1), Shard(1), Replicate()])
        assert "make them local ones" in (why_unreadable(heads) or "")


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def traced(mesh: DeviceMesh, placements: Sequence[Placement]) -> FoundAttention:
    """An attention of DTensors in a graph."""
    graph = Graph()
    nodes = []
    for place, placement in enumerate(placements):
        node = graph.placeholder(f"input_{place}")
        node.meta["example_value"] = DTensor.from_local(torch.ones(1, 2, 4, 3), mesh, [placement])
        nodes.append(node)
    query, key, value = nodes
    call = graph.call_function(torch.nn.functional.scaled_dot_product_attention, tuple(nodes))
    return FoundAttention(call, call, query, key, value, call)
