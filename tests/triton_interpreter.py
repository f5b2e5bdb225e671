"""Kernels for a GPU without one: run by Triton's interpreter, or planned for mocked devices."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
from collections.abc import Mapping

import pytest

from tests.interpreters import ROOT, Interpreters

REQUIRED = "TMM_REQUIRE_TRITON"
"""Set where these tests are not to be skipped, as in `.ci/run`."""


def check_in_the_interpreter(module: str, function: str = "check_triton") -> None:
    """Run a function of a module of tests; skips where there is no Triton.

    In a process of its own: whether Triton interprets is decided when it is imported.
    """
    printed_by(module, function, {"TRITON_INTERPRET": "1"})


def printed_by(module: str, function: str, settings: Mapping[str, str], **variables: object) -> str:
    """What a function of a module of tests prints in a process of its own, which needs Triton.

    Of the environment, ``settings`` are what is read when torch and Triton are imported.
    """
    if importlib.util.find_spec("triton") is None and not os.environ.get(REQUIRED):
        pytest.skip("triton is not installed; the extra `test` brings it")
    environment = os.environ | settings | {name: str(value) for name, value in variables.items()}
    done = _interpreters(frozenset(settings.items())).run(
        f"from {module} import {function}; {function}()",
        environment=environment,
        folder=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _interpreters(settings: frozenset[tuple[str, str]]) -> Interpreters:
    """One server for each of the settings, which imports once what takes seconds."""
    server = Interpreters(**dict(settings))
    atexit.register(server.close)
    return server
