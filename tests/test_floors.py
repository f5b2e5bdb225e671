"""The order of the house: which folder may import which, and what each holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tmm

ROOT = Path(__file__).parent.parent

FLOORS = (
    ("core",),
    ("kernels",),
    ("passes", "runtime"),
    ("analysis",),
    ("spec",),
    ("instrumentation",),
    ("steps",),
    ("runs",),
    ("sinks", "views"),
    ("coordinate_check", "examples", "integrations", "module_monitor", "nonfinite", "testing"),
    ("cli",),
)
"""From the ground up: each folder may import those below it, and none beside it."""

DRAWINGS = {
    ("tmm.runs.recorded_run", "tmm.views.plots"),
    ("tmm.runs.recorded_run", "tmm.views.report.card"),
    ("tmm.steps.explanation", "tmm.views.explain_page"),
    ("tmm.steps.explanation", "tmm.views.report.card"),
}
"""Methods that draw what they belong to import the drawing when they are called."""

RANK = {folder: rank for rank, floor in enumerate(FLOORS) for folder in floor}

LONG = {
    "tmm.core.metrics",
    "tmm.instrumentation.attribution",
    "tmm.instrumentation.backend",
    "tmm.instrumentation.reference.follower",
    "tmm.instrumentation.twin",
    "tmm.instrumentation.untraced",
    "tmm.integrations.lightning",
    "tmm.integrations.torchtnt",
    "tmm.integrations.transformers",
    "tmm.module_monitor.module_monitor",
    "tmm.nonfinite.watcher",
    "tmm.passes.attention.softmax_pattern",
    "tmm.passes.find_placements",
    "tmm.passes.reference.clone_nodes",
    "tmm.runs.instrument",
    "tmm.runs.live",
    "tmm.runtime.step_collector",
    "tmm.runtime.store.run_writer",
    "tmm.spec.ranks",
    "tmm.spec.rules",
    "tmm.spec.spec",
    "tmm.steps.explanation",
    "tmm.steps.forward_passes",
    "tmm.steps.parameters",
}
"""Files of more than 300 lines: they may hold two ideas. The list only shrinks."""

WITHOUT_TORCH = (
    *("tmm.core.keys", "tmm.core.families", "tmm.core.records", "tmm.core.metrics"),
    *("tmm.analysis", "tmm.runtime.store.run_reader", "tmm.runtime.store.run_writer"),
    *("tmm.runs.catalog", "tmm.runs.recorded_run", "tmm.runs.export"),
)


def files() -> dict[str, Path]:
    """All modules of the package by name."""
    found = {}
    for top in ("tmm", "passes", "runtime"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "tmm" else ("tmm", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = files()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_public = node.module == "tmm" and alias.name in tmm.__all__
                yield inner if inner in FILES and not is_public else node.module


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_imported_from_above_or_beside(module: str) -> None:
    own = folder(module)
    if own not in RANK:  # the package itself
        return
    for other in imports(FILES[module]):
        if other == "tmm":  # the public face, for those who show how it is used
            assert RANK[own] >= RANK["examples"], f"{module} imports tmm"
            continue
        theirs = folder(other)
        is_below = theirs == own or RANK.get(theirs, len(FLOORS)) < RANK[own]
        assert is_below or (module, other) in DRAWINGS, f"{module} imports {other}"


def test_every_folder_has_a_floor() -> None:
    top = {folder(module) for module in FILES if module.count(".") > 1}
    assert top <= RANK.keys() | {"__main__"}
    assert {path.stem for path in (ROOT / "tmm").glob("*.py")} == {"__init__", "__main__"}


def test_no_two_files_have_one_name() -> None:
    names = Counter(path.stem for path in FILES.values() if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short() -> None:
    long = {module for module, path in FILES.items() if path.read_text().count("\n") > 300}
    assert long == LONG


def test_no_module_hides_behind_a_public_name() -> None:
    modules = {name for name in RANK if f"tmm.{name}" in FILES}
    assert modules & set(tmm.__all__) == {"analysis", "sinks"}


def test_runs_are_read_and_written_without_torch() -> None:
    program = f"""
import sys
sys.modules["torch"] = None
for name in {WITHOUT_TORCH}:
    __import__(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
