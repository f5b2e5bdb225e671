"""Kernels for a GPU, run on a CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

REQUIRED = "TMM_REQUIRE_TRITON"
"""Set where these tests are not to be skipped, as in `.ci/run`."""


def check_in_the_interpreter(module: str) -> None:
    """Run ``check_triton`` of a module of tests; skips where there is no Triton.

    In a process of its own: whether Triton interprets is decided when it is imported.
    """
    if importlib.util.find_spec("triton") is None and not os.environ.get(REQUIRED):
        pytest.skip("triton is not installed; the extra `test` brings it")
    code = f"from {module} import check_triton; check_triton()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
