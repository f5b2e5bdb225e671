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
    "tmm.instrumentation.reference.follower",
    "tmm.instrumentation.twin",
    "tmm.instrumentation.untraced",
    "tmm.integrations.lightning",
    "tmm.integrations.torchtnt",
    "tmm.module_monitor.module_monitor",
    "tmm.nonfinite.watcher",
    "tmm.passes.attention.softmax_pattern",
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
    *("tmm.core.replacement", "tmm.core.series_by_key"),
    *("tmm.analysis", "tmm.runtime.store.run_reader", "tmm.runtime.store.run_writer"),
    *("tmm.runs.catalog", "tmm.runs.recorded_run", "tmm.runs.export"),
)

TORCH_IN_CORE = {
    "tmm.core.autograd",
    "tmm.core.dynamo_private",
    "tmm.core.fusion_private",
    "tmm.core.inductor_private",
    "tmm.core.module_names",
    "tmm.core.partitioner_private",
    "tmm.core.recorded_values",
    "tmm.core.rng",
    "tmm.core.torch_private",
    "tmm.core.wrapped_tensors",
}
"""The files of core that are about torch, and import it; no other one does."""

PRIVATE = {
    f"tmm.core.{name}_private" for name in ("dynamo", "fusion", "inductor", "partitioner", "torch")
}
"""The files that know private names of torch, so that a new version is looked at there."""


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


def imports_of_torch(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a file imports of torch, anywhere in it: its full name, and the name that it gets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.name, alias.asname or "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield f"{node.module}.{alias.name}", alias.asname or alias.name


def private_names(source: str) -> list[str]:
    """The private names of torch in a file: those imported, and chains of attributes."""
    tree = ast.parse(source)
    found = list(imports_of_torch(tree))
    known = {bound: "torch" if bound == "torch" else name for name, bound in found}
    names = [name for name, _ in found]
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in known:
            names.append(".".join((known[node.id], *parts)))
    return [name for name in names if any(map(is_private, name.split(".")))]


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


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


def test_private_names_of_torch_have_one_home() -> None:
    found = {module: private_names(path.read_text()) for module, path in FILES.items()}
    assert {module for module, names in found.items() if names} == PRIVATE, found


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "import torch._dynamo as dynamo",
        "from torch._dynamo.exc import InvalidBackend",
        "from torch.fx.graph import _custom_builtins",
        "import torch\nx = torch._C._nn",
        "import torch\nx = torch.nn.Module._call_impl.__code__",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_group()",
        "from torch import fx\nx = fx._symbolic_trace",
        "def f():\n    from torch import _dynamo",
    ],
)
def test_private_names_are_found(line: str) -> None:
    assert private_names(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch\nx = torch.nn.Module.__call__, torch.__version__",
        "import torch\nx = [torch.add][0]._name",
        "from torch.nn import Module as _Module",
        "x = 'torch._dynamo'",
        "import torchtnt._private",
    ],
)
def test_what_is_no_private_name_of_torch_is_not_found(line: str) -> None:
    assert not private_names(line)


def test_few_files_of_core_import_torch() -> None:
    core = {module: path for module, path in FILES.items() if folder(module) == "core"}
    found = {m for m, path in core.items() if any(imports_of_torch(ast.parse(path.read_text())))}
    assert found == TORCH_IN_CORE


def test_runs_are_read_and_written_without_torch() -> None:
    program = f"""
import sys
sys.modules["torch"] = None
for name in {WITHOUT_TORCH}:
    __import__(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
