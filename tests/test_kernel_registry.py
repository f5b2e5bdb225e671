"""Which kernel serves an operation: the table, its order, and what ``tmm info`` says of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
from tmm.kernels.summarize.torch_rows import summarize_with_torch

LANGUAGES = {
    "cpu": ("C++", "C++", "C++"),
    "cuda": ("Inductor", "Triton", "Triton"),
    "mps": ("torch", "torch", "torch"),
}


@pytest.mark.parametrize("device", LANGUAGES)
@pytest.mark.parametrize("has_triton", [True, False])
def test_the_first_that_is_available_is_chosen(
    device: str, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton else None)
    found = [chosen(operation, device).language for operation in OPERATIONS]
    expected = [
        "torch" if language == "Triton" and not has_triton else language
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


def test_what_is_chosen_without_a_compiler(tmp_path: Path) -> None:
    code = """
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
from tmm.kernels.kernel_registry import OPERATIONS, chosen
print(*(chosen(operation, "cpu").language for operation in OPERATIONS))
"""
    folder = tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", code]

    def run() -> str:
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    assert run() == "torch torch torch"
    folder.chmod(0o777)  # others could put a kernel there
    assert run() == "torch torch torch"
