"""The wheel is whole and passes mypy; ``make lint`` runs this, the default run leaves it out.

mypy follows the layout (``passes`` installs as ``tmm.passes``) on an installed package only, so
the wheel is built and unpacked into a temporary folder, which is what installing it does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tmm.views.report.page import SCRIPTS

pytestmark = pytest.mark.lint

ROOT = Path(__file__).parent.parent
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()
PACKAGES = {"tmm": "tmm", "passes": "tmm/passes", "runtime": "tmm/runtime"}
"""Folder of the source to folder of the wheel."""

IMPORT_ALL = """
import importlib, pkgutil, tmm
names = [found.name for found in pkgutil.walk_packages(tmm.__path__, "tmm.")]
for name in names:
    # torchtitan has no release for the torch of these tests; it has tests with a stand-in.
    if not name.endswith((".__main__", ".integrations.torchtitan")):
        assert importlib.import_module(name).__file__.startswith({installed!r}), name
assert {{"tmm.passes.pipeline", "tmm.runtime.store.run_writer"}} <= set(names), names
"""


def check(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    """Run a Python module; fail with what it printed."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(f"{' '.join(command[:3])}\n{result.stdout}{result.stderr}", pytrace=False)


def source_files() -> list[Path]:
    return [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind, and would pack older ones
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The build's own entry point instead of pip, which would want the network.
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    check("-c", build, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_and_its_types(wheel: Path) -> None:
    page = ("page.html", "page.css", "page.js", "graphs.js")
    kernels = (
        *("vectors", "summarize/host", "summarize/host_operator"),
        *("attention/attention_host", "fused/merge"),
    )
    expected = {"tmm/py.typed", *(f"tmm/kernels/{name}.cpp" for name in kernels)}
    expected |= {f"tmm/views/explain_page/{name}" for name in page}
    expected |= {f"tmm/views/report/{name}" for name in ("page.html", "page.css", *SCRIPTS)}
    for path in source_files():
        folder, *rest = path.relative_to(ROOT).parts
        expected.add("/".join([PACKAGES[folder], *rest]))
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry_points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert "tmm = tmm.cli:app" in archive.read(entry_points).decode()
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_every_module_imports_from_the_wheel(installed: Path) -> None:
    program = IMPORT_ALL.format(installed=str(installed))
    check("-c", program, cwd=installed.parent, PYTHONPATH=str(installed))


@pytest.mark.skipif(
    f"torch=={torch.__version__.partition('+')[0]}" not in CONSTRAINTS,
    reason="what mypy says depends on the annotations of torch; those of the pinned one count",
)
def test_mypy_finds_nothing_in_the_installed_package(installed: Path) -> None:
    configuration = ["--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]  # torch takes a minute the first time
    check(
        "-m",
        "mypy",
        "--strict",
        *configuration,
        *cache,
        "-p",
        "tmm",
        cwd=installed.parent,
        MYPYPATH=str(installed),
    )
