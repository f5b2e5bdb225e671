"""What only reads runs imports no torch; the package offers everything all the same."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import tmm
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.state import State
from tmm.runtime.store.run_writer import RunWriter


def write_run(folder: Path) -> Path:
    with RunWriter(folder, info={"config": {"lr": 0.1}}) as writer:
        infos = (KeyInfo("loss", "", "loss", 0, "mean"),)
        for step in range(3):
            writer.submit(StepRecord(step, scalars=(Table(infos, np.array([1.0 + step])),)))
    State.begin().end("finished", "", 2).write(folder)
    return folder


def torch_after(*lines: str) -> str:
    """What a child process prints that runs ``lines``, and whether it then has torch."""
    ending = "print([m for m in ('torch', 'triton', 'sympy') if m in sys.modules])"
    program = "\n".join(["import sys", *lines, ending])
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in "ab":
        write_run(root / "project" / name)
    return root


def command(arguments: str) -> tuple[str, ...]:
    return (
        "from tmm.cli import app",
        f"try: app({arguments}, prog_name='tmm')",
        "except SystemExit as end: assert not end.code, end.code",
    )


def test_listing_and_reading_runs_imports_no_torch(root: Path) -> None:
    output = torch_after(
        "import tmm",
        f"records = tmm.list_runs({str(root)!r})",
        "assert [record.steps for record in records] == [3, 3], records",
        f"with tmm.open_run({str(root / 'project' / 'a')!r}) as run:",
        "    print(run.series('loss')[1].tolist(), run.at(2), run.info['config'])",
        "assert tmm.analysis.find_anomalies and tmm.MonitoringWarning and tmm.METRIC_NAMES",
    )
    assert output.startswith("[1.0, 2.0, 3.0] {'loss': 3.0} {'lr': 0.1}")
    assert output.endswith("[]\n")


def test_commands_that_read_import_no_torch(root: Path, tmp_path: Path) -> None:
    place = ["--root", str(root)]
    commands = [
        ["--version"],
        ["--help"],
        ["list", *place],
        ["show", "a", *place],
        ["compare", "a", "b", *place],
        ["anomalies", "a", *place],
        ["plot", "a", *place],
        ["watch", "a", "--once", *place],
        ["runs", "export", "a", str(tmp_path / "a.csv"), *place],
    ]
    output = torch_after(
        f"for command in {commands!r}:",
        *(f"    {line}" for line in command("command")),
        "    assert 'torch' not in sys.modules, command",
    )
    assert "wrote 3 rows" in output


def test_the_version_needs_neither_numpy_nor_rich() -> None:
    lines = command("['--version']")
    output = torch_after(*lines, "print({'numpy', 'h5py', 'rich'} & sys.modules.keys())")
    assert output.endswith("set()\n[]\n")


def test_the_package_offers_what_it_names() -> None:
    assert {*tmm.__all__} <= {*dir(tmm)}
    for name in tmm.__all__:
        found = getattr(tmm, name)
        assert isinstance(found, ModuleType) == (name in ("analysis", "sinks")), name
    assert tmm.Spec is importlib.import_module("tmm.spec.spec").Spec


def test_types_and_run_time_name_the_same_modules() -> None:
    tree = ast.parse(Path(tmm.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("tmm").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    modules = dict.fromkeys(("analysis", "sinks"), "")
    assert typed == {**tmm._HOMES, **modules}
    assert sorted(typed) == sorted(tmm.__all__)


@pytest.mark.parametrize("name", ["instrumnt", "_nothing", "no.module", "__wrapped__"])
def test_what_there_is_not_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'tmm' has no attribute '{name}'"):
        getattr(tmm, name)
    assert not hasattr(tmm, name)


def test_a_stand_in_may_take_the_place_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tmm, "instrument", len)
    assert tmm.instrument is len
    monkeypatch.undo()
    assert tmm.instrument.__module__ == "tmm.runs.instrument"


def test_a_name_may_first_be_asked_for_by_a_compiled_program() -> None:
    """And what is asked for later does not compile it again."""
    tmm.__dict__.pop("record", None)

    @torch.compile(backend="eager", fullgraph=True)
    def program(x: torch.Tensor) -> torch.Tensor:
        tmm.record("x", x)
        return x + 1

    x = torch.ones(2)
    assert program(x).tolist() == [2.0, 2.0]
    for name in ("Rule", "find_nonfinite", "l2_norm"):
        tmm.__dict__.pop(name, None)
        assert getattr(tmm, name)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert program(x).tolist() == [2.0, 2.0]
