"""What fails in ``tmm.instrument`` on one rank fails on all of them, and none waits for it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tmm
from tests.interpreters import ROOT, Interpreters
from tmm.runs import instrument as instrument_module
from tmm.runtime.ranks.gloo import ProcessGroup

RANKS, FAILING = 3, 1
SPEC = tmm.Spec(tmm.activation("rms"))


class Other(nn.Module):
    """Has names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


def rule_that_matches_nothing(folder: Path, *, fails: bool) -> object:
    model = Other() if fails else nn.Sequential(nn.Linear(2, 2))
    return tmm.instrument(model, tmm.Spec(tmm.activation("rms", modules="0")))


def reference_that_is_broken(folder: Path, *, fails: bool) -> object:
    state = folder / ("broken.pt" if fails else "state.pt")
    spec = tmm.Spec(tmm.activation_difference("rms"), reference=state)
    return tmm.instrument(nn.Sequential(nn.Linear(2, 2)), spec)


def trace_that_cannot_be_written(folder: Path, *, fails: bool) -> object:
    trace = folder / "file" / "trace" if fails else folder / f"trace-{dist.get_rank()}"
    return tmm.instrument(nn.Linear(2, 2), SPEC, trace=trace)


def placements_of_no_module(folder: Path, *, fails: bool) -> object:
    placements = {"elsewhere": "shard"} if fails else None
    return tmm.instrument(nn.Linear(2, 2), SPEC, placements=placements)


WAYS: dict[str, tuple[Callable[..., object], str]] = {
    "rule": (rule_that_matches_nothing, "ValueError: .*matches"),
    "reference": (reference_that_is_broken, "broken.pt"),
    "trace": (trace_that_cannot_be_written, "file"),
    "placements": (placements_of_no_module, "elsewhere"),
}


def instrument(folder: str) -> None:
    """What one process does: it keeps what it was told."""
    dist.init_process_group("gloo")
    rank, told = dist.get_rank(), {}
    for name, (way, _) in WAYS.items():
        begun = time.monotonic()
        try:
            way(Path(folder), fails=rank == FAILING)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}", time.monotonic() - begun
    # Nothing of the ranks is out of step: they train together afterwards.
    model = tmm.instrument(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), SPEC)
    with (monitor := tmm.monitor(model)).step(0):
        model(torch.full((1, 2), float(rank))).sum().backward()
    told["rows"] = (str(len(monitor.get_step_metrics())), 0.0)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    tmm.remove(model)
    dist.barrier()
    dist.destroy_process_group()


def test_a_fault_of_one_rank_ends_all_at_once(tmp_path: Path, interpreters: Interpreters) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), tmp_path / "state.pt")
    (tmp_path / "file").touch()
    (tmp_path / "broken.pt").write_bytes(b"no state")
    program = "import sys; from tests.test_failing_ranks import instrument; instrument(sys.argv[1])"
    done = interpreters.run_ranks(RANKS, program, tmp_path, folder=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(RANKS):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told.keys() == {*WAYS, "rows"}
        assert rank != 0 or int(told["rows"][0]) > 0
        for name, (_, message) in WAYS.items():
            text, seconds = told[name]
            assert seconds < 60, name
            begins = f"RuntimeError: tmm.instrument failed on rank {FAILING}: "
            assert text.startswith(begins) == (rank != FAILING), text
            assert re.search(message, text), text


def test_a_rank_that_fails_alone_says_why_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instrument_module, "_SOON", 0.01)
    waited = threading.Event()

    def nobody_comes() -> ProcessGroup:
        waited.wait(1.0)
        raise RuntimeError("not all ranks called tmm.instrument")

    with (
        pytest.warns(tmm.MonitoringWarning, match="waits for the other ranks.*ValueError: wrong"),
        pytest.raises(ValueError, match="wrong"),
        instrument_module._on_all_ranks(nobody_comes),
    ):
        raise ValueError("wrong")
