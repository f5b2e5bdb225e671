"""Reductions over ranks, of any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from tests.interpreters import ROOT, Interpreters
from tmm.runtime.ranks import gloo
from tmm.runtime.ranks.gloo import ProcessGroup

SIZES = (0, 1, 1000, 40_000)


def values_of(rank: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers of all magnitudes, some of them infinite."""
    random = np.random.default_rng((rank, size))
    values = random.normal(size=size) * 10.0 ** random.uniform(-300, 300, size)
    values[random.random(size) < 0.01] = -np.inf
    return values


def test_ranks_that_do_not_reach_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Connection refused, remote=[127.0.0.1]:29400")

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", fails)
    monkeypatch.setattr(gloo, "default_patience", lambda: 60.0)
    with pytest.raises(RuntimeError, match="not all 2 ranks.*set GLOO_SOCKET_IFNAME to the net"):
        ProcessGroup(start_seconds=1.0)


def reduce(folder: str) -> None:
    """What one process does: it keeps its results."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = ProcessGroup()
    found = {}
    for size in SIZES:
        own = values_of(rank, size)
        found[f"maximum {size}"] = group.maximum(own)
        found[f"total {size}"] = group.total(own)
        np.testing.assert_array_equal(own, values_of(rank, size))
    for distinct in (gloo._DISTINCT, 1):
        gloo._DISTINCT = distinct  # of more, all are gathered
        for value in (lambda rank: "same", lambda rank: {"rank": rank}, lambda rank: rank % 2):
            assert group.everything(value(rank)) == [value(other) for other in range(ranks)]
        assert group.everything(None if rank else b"") == [b"", *[None] * (ranks - 1)]
    np.savez(Path(folder, f"{ranks}-{rank}.npz"), **found)
    dist.barrier()
    group.close()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4, 6, 8))]
)
def test_reductions_over_ranks(tmp_path: Path, ranks: int, interpreters: Interpreters) -> None:
    program = "import sys; from tests.test_process_group import reduce; reduce(sys.argv[1])"
    done = interpreters.run_ranks(ranks, program, tmp_path, folder=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    found = [np.load(tmp_path / f"{ranks}-{rank}.npz") for rank in range(ranks)]
    for size in SIZES:
        values = np.stack([values_of(rank, size) for rank in range(ranks)])
        np.testing.assert_array_equal(found[0][f"maximum {size}"], values.max(axis=0))
        expected, sizes = values.sum(axis=0), np.abs(values).sum(axis=0)
        total, finite = found[0][f"total {size}"], np.isfinite(expected)
        difference = np.abs(total[finite] - expected[finite])
        assert (difference <= 1e-15 * ranks * sizes[finite]).all()
        np.testing.assert_array_equal(total[~finite], expected[~finite])
        for other in found[1:]:
            for name in (f"maximum {size}", f"total {size}"):
                assert other[name].tobytes() == found[0][name].tobytes()
