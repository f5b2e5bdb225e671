"""Which kernel serves an operation: the table, its order, and what ``tmm info`` says of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.interpreters import Interpreters
from tmm.kernels import kernel_registry
from tmm.kernels.kernel_registry import (
    ANY,
    KERNELS,
    OPERATIONS,
    Operation,
    candidates,
    chosen,
    function_of,
)
from tmm.kernels.plain_operations import warn_of_plain_operations, why_no_triton
from tmm.kernels.summarize import inductor_rows
from tmm.kernels.summarize.inductor_rows import summarize_with_inductor
from tmm.kernels.summarize.torch_rows import summarize_with_torch

LANGUAGES = {
    "cpu": ("C++", "C++", "C++", "C++", "C++", "torch"),
    "cuda": ("Inductor", "Triton", "Triton", "Triton", "torch", "Triton"),
    "mps": ("torch",) * 6,
}


@pytest.mark.parametrize("device", LANGUAGES)
@pytest.mark.parametrize("has_triton", [True, False])
def test_the_first_that_is_available_is_chosen(
    device: str, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton else None)
    found = [chosen(operation, device).language for operation in OPERATIONS]
    expected = [
        "torch" if language in ("Triton", "Inductor") and not has_triton else language
        for language in LANGUAGES[device]
    ]
    assert found == expected


@pytest.mark.parametrize("operation", OPERATIONS)
def test_plain_operations_come_last_and_serve_everywhere(operation: Operation) -> None:
    for device in (*LANGUAGES, "a device of tomorrow"):
        *others, last = candidates(operation, device)
        assert (last.language, last.device) == ("torch", ANY)
        assert last.package is None
        assert not last.sources
        assert all(kernel.device == device for kernel in others)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.function)
def test_every_implementation_can_be_imported(kernel: kernel_registry.Kernel) -> None:
    assert callable(function_of(kernel))


def test_what_a_kernel_does_not_serve_is_left_to_the_next_one() -> None:
    x = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    first, *_ = candidates("summarize", "cpu")
    assert function_of(first)(x, ("sum",)) is None
    rows = kernel_registry.run("summarize", x.device, x, ("sum",))
    assert torch.equal(rows, summarize_with_torch(x, ("sum",)))


def test_what_is_chosen_without_a_compiler(tmp_path: Path, interpreters: Interpreters) -> None:
    code = """
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
from tmm.kernels.kernel_registry import OPERATIONS, chosen
print(*(chosen(operation, "cpu").language for operation in OPERATIONS))
"""
    folder = tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}

    def run() -> str:
        done = interpreters.run(code, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run() == "torch torch torch torch torch torch"
    folder.chmod(0o777)  # others could put a kernel there
    assert run() == "torch torch torch torch torch torch"


@pytest.fixture
def untold() -> Iterator[None]:
    """Nothing was chosen yet, and no warning given."""
    caches = kernel_registry._functions, warn_of_plain_operations, inductor_rows._kernel
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("reason", ["triton is not installed", "not 6.1"])
def test_a_gpu_without_triton_is_served_by_plain_operations(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_old = reason == "not 6.1"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_old else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.warns(UserWarning, match=f"cuda:1 with plain torch operations.*{reason}") as told:
        for operation in OPERATIONS:
            (function,) = kernel_registry._functions(operation, torch.device("cuda", 1))
            assert function.__name__.endswith("_with_torch")
    assert len(told) == 1


@pytest.mark.usefixtures("untold")
def test_a_kernel_that_is_not_compiled_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("type fp8e4nv not supported in this architecture\nand more")

    monkeypatch.setattr(inductor_rows, "_compile", fail)
    with pytest.warns(UserWarning, match="plain torch operations.*: type fp8e4nv") as told:
        for size in (5, 8192, 7):
            assert summarize_with_inductor(torch.ones(size), ("sum",)) is None
    assert len(told) == 1


def test_a_gpu_from_amd_has_triton_whatever_its_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ROCm calls its devices cuda, and numbers what they can do in its own way."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert why_no_triton(torch.device("cuda", 0)) is not None
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert why_no_triton(torch.device("cuda", 0)) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_no_triton(torch.device("cuda", 0)) == "triton is not installed"
