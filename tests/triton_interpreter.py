"""Kernels for a GPU without one: run by Triton's interpreter, or planned for mocked devices."""

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
    printed_by(module, "check_triton", TRITON_INTERPRET="1")


def printed_by(module: str, function: str, **environment: str) -> str:
    """What a function of a module of tests prints in a process of its own, which needs Triton."""
    if importlib.util.find_spec("triton") is None and not os.environ.get(REQUIRED):
        pytest.skip("triton is not installed; the extra `test` brings it")
    code = f"from {module} import {function}; {function}()"
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=variables, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
