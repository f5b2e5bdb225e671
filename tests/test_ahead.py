"""Kernels that a wheel brings along: the right one is chosen, and a machine needs no compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tmm.kernels import ahead, build, build_ahead, kernel_registry
from tmm.kernels.build import VECTORS, instruction_set_of, text_of
from tmm.kernels.summarize import host

TEXT = text_of([VECTORS])
CAPABILITY = torch.backends.cpu.get_cpu_capability()
WIDEST = {"AVX512": "AVX-512", "AVX2": "AVX2"}
ALL_TEXTS = sorted(
    {text_of(kernel.sources) for kernel in kernel_registry.KERNELS if kernel.sources}
)

pytestmark = pytest.mark.skipif(
    not ahead.instruction_sets() or shutil.which("g++") is None,
    reason="libraries are built for Linux, by g++",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries that tell their instruction set and nothing else."""
    folder = tmp_path_factory.mktemp("built")
    assert len(build_ahead.build_ahead([TEXT], folder)) == len(ahead.instruction_sets())
    assert {path.suffix for path in folder.iterdir()} == {".so"}
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as if a wheel had brought them."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(ahead, "FOLDER", tmp_path)
    return tmp_path


def found(text: str) -> str | None:
    library = ahead.find_ahead(text)
    return None if library is None else instruction_set_of(library)


def test_the_widest_vectors_of_the_processor_are_chosen(folder: Path) -> None:
    assert found(TEXT) == WIDEST.get(CAPABILITY, mock.ANY)
    assert ahead.is_ahead(TEXT)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have one library")
@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("AVX512", ["avx512", "avx2", "base"]),
        ("AVX2", ["avx2", "base"]),
        ("DEFAULT", ["base"]),
        ("what a later torch may say", ["base"]),
    ],
)
def test_what_torch_may_not_use_is_not_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: str, names: list[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    here = [one for one in ahead.instruction_sets() if one.is_here]
    assert [one.name for one in here] == names
    if capability == "DEFAULT":
        assert found(TEXT) == "vectors of 16 bytes"


def test_a_library_of_other_sources_is_not_loaded(folder: Path) -> None:
    assert found(f"{TEXT}// changed") is None
    assert not ahead.is_ahead(f"{TEXT}// changed")


def test_what_cannot_be_loaded_is_passed_over(folder: Path) -> None:
    widest, *others = [one for one in ahead.instruction_sets() if one.is_here]
    ahead.place_of(TEXT, widest, folder).write_bytes(b"of another system")
    assert (found(TEXT) is None) == (not others)
    for one in others:
        ahead.place_of(TEXT, one, folder).unlink()
    assert found(TEXT) is None


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_have_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    assert found(TEXT) is None
    with pytest.raises(RuntimeError, match="unset TMM_KERNELS"):
        build_ahead.build_ahead([TEXT], folder)


def test_what_the_compiler_refuses_is_raised(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build_ahead.build_ahead(["this is not C++"], tmp_path)


USED = """
import warnings
import torch
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
warnings.simplefilter("error")
import sys
from pathlib import Path
import tmm
from tmm.kernels import ahead, kernel_registry
ahead.FOLDER = Path(sys.argv[1])
assert kernel_registry.describe("summarize", "cpu").startswith("C++, "), "told"
model = tmm.instrument(
    torch.compile(torch.nn.Linear(64, 64), backend="aot_eager"),
    tmm.Spec(tmm.activation("rms", "zero_fraction")),
)
x = torch.randn(8192, 64)
torch.set_num_threads(2)
tmm.monitor(model).begin_step(0)
y = model(x)
tmm.monitor(model).end_step()
rows = tmm.monitor(model).get_step_metrics()
assert abs(rows["activation/[root module]/rms"] - y.square().mean().sqrt().item()) < 1e-6, rows
kernel = kernel_registry.candidates("summarize_attention", "cpu")[0]
q = torch.randn(1, 2, 40, 16)
for operation in ("summarize", "summarize_attention"):
    assert kernel_registry.chosen(operation, "cpu").language == "C++"
from tmm.kernels.attention.choose import summarize_attention
assert summarize_attention(q, q, None, is_causal=True, scale=None).isfinite().all()
loaded = open("/proc/self/maps").read()
assert str(ahead.FOLDER) in loaded
"""


@pytest.mark.slow
def test_without_a_compiler_they_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are those of the kernel that is compiled on the spot."""
    monkeypatch.setattr(ahead, "FOLDER", tmp_path / "built")
    build_ahead.build_ahead(ALL_TEXTS, ahead.FOLDER)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", USED, ahead.FOLDER], check=True, env=environment)
    library = ahead.find_ahead(text_of(host.SOURCES))
    assert library is not None
    on_the_spot = build.kernels_of(build._compiled(text_of(host.SOURCES)), host.ARGUMENTS)
    columns = ("sum", "moment2", "moment4", "absmax", "zeros", "nans")
    for dtype, kernel in build.kernels_of(library, host.ARGUMENTS).items():
        x = [torch.randn(elements).to(dtype) for elements in (1, 100, 70_000)]
        x[2][7] = torch.nan
        expected = host.rows_by(on_the_spot[dtype], x, columns)
        rows = host.rows_by(kernel, x, columns)
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0, equal_nan=True)
