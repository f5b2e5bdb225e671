"""Each block of the README and of docs/ runs as it is printed, after those above it.

Blocks of Python share the names of their page, and commands run where the page's files lie. Neither
gets anything that the page does not have.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from typer.testing import CliRunner

import tmm
from docs.make import messages
from docs.make.pages import NOTEBOOK, pages
from docs.make.tutorial import executed
from tests import torchtitan_parts
from tests.private_wandb import private_wandb
from tests.torchtitan_parts import Trainer, TrainerConfig
from tmm.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TUTORIAL = NOTEBOOK.with_suffix(".md")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)", re.MULTILINE)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun tells one process."""

SLOW = re.compile(
    r"tmm demo|tmm coord-check|torchrun|python examples/train.py|python -m benchmarks"
)
"""Commands that train for long: only the slow tests run them."""

ELSEWHERE = re.compile(r"pip install|-m pytest|-m venv|^make |apt-get|git clone")
"""What installs or runs the tests: ``.ci/run`` does, and extras and files are checked here."""


@dataclass(frozen=True)
class Block:
    """A block of a page: what it is, the line on which it begins, and its text."""

    language: Literal["python", "bash"]
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m[1], text[: m.start(2)].count("\n") + 1, m[2])  # type: ignore[arg-type]
        for m in BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_of(block: Block) -> Iterator[str]:
    """The commands of a block of bash, without comments."""
    lines = (line.partition(" #")[0].strip() for line in block.text.splitlines())
    for line in lines:
        yield from (part.strip() for part in re.split("&&|;", line) if part.strip())


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", bins)
    for name in ("examples", "benchmarks"):  # a checkout
        (folder / name).symlink_to(ROOT / name)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    program = ModuleType("__main__")  # where Dynamo and pickle look for names of the program
    monkeypatch.setitem(sys.modules, "__main__", program)
    namespace = vars(program)
    stand_in = torchtitan_parts.installed() if page.name == "torchtitan.md" else nullcontext()
    try:
        with private_wandb(folder), stand_in:
            for block in blocks(page):
                if block.language == "python":
                    name = f"{page.name}:{block.line}"
                    lines = block.text.splitlines(keepends=True)
                    linecache.cache[name] = (len(block.text), None, lines, name)
                    exec(compile(block.text, name, "exec"), namespace)
                else:
                    run_commands(block, slow=slow)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        tmm.finish()
    check_page(page, folder, namespace)


def run_commands(block: Block, *, slow: bool) -> None:
    for command in commands_of(block):
        if ELSEWHERE.search(command) or (SLOW.search(command) and not slow):
            continue
        command = re.sub(r"^\S*/bin/", "", command)  # of the environment that was installed
        if command.startswith("tmm ") and "|" not in command:  # quicker than a process
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            continue
        environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
        done = subprocess.run(
            ["bash", "-ec", command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


RUNNING = pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page != TUTORIAL], ids=name_of
)


@RUNNING
def test_blocks_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what they have Inductor compile runs as it was traced, which takes far less time."""

    def as_traced(inductor: object, graph: Any, inputs: Any, **options: object) -> Any:
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", as_traced)
    run_page(page, tmp_path, monkeypatch, slow=False)


@pytest.mark.slow
@RUNNING
def test_blocks_run_under_inductor(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch, slow=True)


def check_page(page: Path, folder: Path, namespace: dict[str, Any]) -> None:
    """What a page promises besides that its blocks run: trainings record what they measured."""
    if page.name in ("transformers.md", "lightning.md", "torchtnt.md"):
        (record,) = tmm.list_runs(folder / "runs")
        assert (record.project, record.status) == ("example", "finished")
        with tmm.open_run(record.path) as run:
            steps, measured = len(run.steps), run.keys("update|gradient")
            taken = {key: run.series(key)[0].tolist() for key in measured}
        key, at, count = {
            "transformers.md": ("update/transformer.wte.weight/relative_norm", [0], 2),
            "lightning.md": ("update/net.0.weight/relative_norm", [0, 10, 20, 30], 32),
            "torchtnt.md": ("gradient/0.weight/norm", [0, 10, 20], 30),
        }[page.name]
        assert (taken[key], steps) == (at, count)
    if page.name == "torchtitan.md":
        check_titan(namespace, folder)
    if page.name == "README.md":
        check_readme(folder)


def check_readme(folder: Path) -> None:
    """No block of the README records nothing."""
    records = tmm.list_runs(folder / "runs")
    assert records
    for record in records:
        with tmm.open_run(record.path) as run:
            assert len(run.steps) > 0, record.path
            assert run.keys("activation/"), record.path
    printed = re.search(
        r"^(\[ 0 10 .*\]) \[(.*)\]$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert printed is not None
    with tmm.open_run(records[-1].path) as run:
        steps, values = run.series("activation/1/rms")
        assert str(steps) == printed[1]
        assert values == pytest.approx([float(value) for value in printed[2].split()], abs=2e-3)


def check_titan(namespace: dict[str, Any], folder: Path) -> None:
    """A trainer that calls its parts as torchtitan's does runs with the config of the page."""
    config = TrainerConfig(metrics=None, dump_folder=str(folder))
    namespace["recorded"](config)
    namespace["spec"]()
    config.metrics.tmm.spec = ""
    config.metrics.tmm.every = 2
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    trainer = Trainer(config, net)
    trainer.train()
    trainer.close()
    (record,) = tmm.list_runs(folder / "tmm")
    assert record.project == "llama"
    with tmm.open_run(record.path) as run:
        assert run.series("gradient/0.weight/norm")[0].tolist() == [2, 4]


def test_the_tutorial_finds_and_mends_its_fault(tmp_path: Path) -> None:
    """As a notebook, in a kernel of its own, with Inductor; the page shows what it printed."""
    notebook = executed(NOTEBOOK, tmp_path, "json")
    assert [c.source for c in notebook.cells] == [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]
    ]
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    losses = re.findall(r"mean loss of each 50 steps: \[(.*)\]", printed)
    ends = [float(line.split()[-1]) for line in losses]
    assert ends[0] > 3.1  # no better than frequencies
    assert ends[1] < 2.6
    assert "99 % or more of the output of layers.1.relu is zero" in printed
    assert re.search(r"step 0: gradient 0\.03\d, update 0\.8\d, .* dead 5\d%", printed)
    assert re.search(r"step 5: .* dead 100%", printed)
    assert "update at step 0: 0.02" in printed
    assert "stories: []" in printed
    assert "high, from step 0: A step changed the weights by 8" in printed
    assert "the learning rate is too high" in printed


def test_pages_that_follow_from_the_code_are_current() -> None:
    old = [name_of(path) for path, text in pages().items() if path.read_text() != text]
    assert not old, f"python -m docs.make.pages writes {old}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{name_of(page)} leads to {target}"


def test_every_public_name_has_its_place_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference" / "api").glob("*.md"))
    named = set(re.findall(r"^::: tmm\.(?:[\w.]+\.)?(\w+)$", text, re.MULTILINE))
    assert set(tmm.__all__) - named == set()


def test_messages_are_found_as_they_are_shown(tmp_path: Path) -> None:
    """Those of a sample of mistakes are in the list that the page is made of."""
    known = messages.collect()
    net = torch.nn.Linear(2, 2)
    rms = tmm.Spec(tmm.activation("rms"))
    mistakes = {
        "spec": lambda: tmm.instrument(net, "rms"),  # type: ignore[arg-type]
        "pattern": lambda: tmm.instrument(net, tmm.Spec(tmm.activation("rms", modules="absent"))),
        "function": lambda: tmm.instrument(lambda x: x, rms),
        "monitor": lambda: tmm.monitor(net),
        "every": lambda: tmm.Spec(tmm.activation("rms"), every="10"),  # type: ignore[arg-type]
        "no rules": lambda: tmm.Spec(),
        "run": lambda: tmm.open_run(tmp_path / "absent"),
        "step": lambda: tmm.monitor(tmm.instrument(net, rms)).end_step(),
        "log": lambda: tmm.log({"loss": 1.0}),
        "alerts": lambda: tmm.Spec(tmm.activation("rms"), alerts=3),  # type: ignore[arg-type]
        "config": lambda: tmm.start_run(config=3, root=tmp_path),  # type: ignore[arg-type]
        "sink": lambda: tmm.start_run(sinks=["absent"], root=tmp_path),
    }
    for name, mistake in mistakes.items():
        with pytest.raises((ValueError, TypeError, RuntimeError, OSError)) as raised:
            mistake()
        text = str(raised.value)
        fitting = [one for one in known if one.pattern.fullmatch(text) and one.text.strip(". ")]
        assert fitting, f"{name}: {text}"


def test_languages_of_blocks_are_known() -> None:
    """A block without a language, or of another, would not run."""
    for page in PAGES:
        opened = FENCE.findall(page.read_text())[::2]
        assert set(opened) <= {"python", "bash", "text", "json"}, name_of(page)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_what_is_installed_exists() -> None:
    """Extras, and the files that installing names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        for found in re.findall(r"(?:tmm-compile|'\.|\"\.)\[([\w,-]+)\]", text):
            assert set(found.split(",")) <= set(extras), f"{name_of(page)}: {found}"
        for name in re.findall(r"pip install -c (\S+)", text):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"


def commands() -> list[str]:
    """The command lines of tmm that are printed, in blocks and between backquotes."""
    found = {
        command for page in PAGES for block in blocks(page) if block.language == "bash"
        for command in commands_of(block)
    }  # fmt: skip
    quoted = {
        found for page in PAGES if page.name not in ("command-line.md", "messages.md")
        for found in re.findall(r"`(tmm [a-z][^`]*)`", page.read_text())
    }  # fmt: skip
    return sorted({re.sub(r"^\S*/(?=tmm )", "", line) for line in found | quoted})


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("tmm ")])
def test_printed_commands_and_their_options_exist(command: str) -> None:
    """What they are given may be a placeholder; that they take it is tested."""
    words = shlex.split(command)[1:]
    names = [word for word in words[:2] if re.fullmatch("[a-z][a-z-]*", word)]
    shown = [CliRunner().invoke(app, [*names[:count], "--help"]) for count in range(1, 3)]
    helped = [result.output for result in shown if result.exit_code == 0]
    assert helped, shown[0].output
    for option in (word for word in words if re.match("--?[a-z]", word)):
        assert option.partition("=")[0] in helped[-1], f"{option} is no option of {command}"
