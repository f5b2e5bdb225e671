"""Each Python block of the README and of docs/ runs as it is printed, after those above it."""

from __future__ import annotations

import linecache
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from typer.testing import CliRunner

import tmm
from tmm.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun tells one process."""


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line on which each block begins, and its text."""
    text = page.read_text()
    return [(text[: m.start(1)].count("\n") + 1, m.group(1)) for m in BLOCK.finditer(text)]


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for line, text in blocks(page):
            name = f"{page.name}:{line}"
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            exec(compile(text, name, "exec"), namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


RUNNING = pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)


@RUNNING
def test_blocks_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what they have Inductor compile runs as it was traced, which takes far less time."""

    def as_traced(inductor: object, graph: Any, inputs: Any, **options: object) -> Any:
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", as_traced)
    run_page(page, tmp_path, monkeypatch)
    if page.name == "integrations.md":
        check_frameworks(tmp_path / "runs")


@pytest.mark.slow
@RUNNING
def test_blocks_run_under_inductor(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch)


def check_frameworks(root: Path) -> None:
    """Each training is a run, which has measured its steps."""
    records = tmm.list_runs(root)
    assert {(record.project, record.status) for record in records} == {("example", "finished")}
    assert len(records) == 3
    steps: dict[str, tuple[list[int], int]] = {}
    for record in records:
        with tmm.open_run(record.path) as run:
            for key in run.keys("update|gradient"):
                steps[key] = run.series(key)[0].tolist(), len(run.steps)
    assert steps["update/transformer.wte.weight/relative_norm"][0] == [0]
    assert steps["update/net.0.weight/relative_norm"] == ([0, 10, 20, 30], 2 * 64 // 4)
    assert steps["gradient/0.weight/norm"] == ([0, 10, 20], 3 * 20 // 2)


def commands() -> list[str]:
    """The command lines of tmm that are printed, in blocks and between backquotes."""
    texts = [page.read_text() for page in PAGES]
    lines = [
        line for text in texts for block in COMMANDS.findall(text) for line in block.split("\n")
    ]
    lines = [part.strip() for line in lines for part in re.split(r"&&|;", line.partition("#")[0])]
    quoted = [found for text in texts for found in re.findall(r"`(tmm [a-z][^`]*)`", text)]
    return sorted({re.sub(r"^\S*/(?=tmm )", "", line) for line in [*lines, *quoted]})


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("tmm ")])
def test_printed_commands_and_their_options_exist(command: str) -> None:
    """What they are given is a placeholder; that they take it is tested."""
    words = shlex.split(command)[1:]
    names = [word for word in words[:2] if re.fullmatch("[a-z][a-z-]*", word)]
    shown = [CliRunner().invoke(app, [*names[:count], "--help"]) for count in range(1, 3)]
    helped = [result.output for result in shown if result.exit_code == 0]
    assert helped, shown[0].output
    for option in (word for word in words if re.match("--?[a-z]", word)):
        assert option.partition("=")[0] in helped[-1], f"{option} is no option of {command}"
