"""Every kernel that tmm has for GPUs, compiled for three kinds of them without one."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import mocked_gpu
from benchmarks.mocked_gpu import CHIPS
from benchmarks.plan.own_kernels import launching
from tests.interpreters import ROOT
from tests.triton_interpreter import printed_by

KERNELS = ROOT / "tmm" / "kernels"
CAPABILITY, QUICK = "TMM_TEST_CAPABILITY", "TMM_TEST_QUICK"


def print_resources() -> None:
    """In a process that takes itself for one with such GPUs."""
    from benchmarks.plan.own_kernels import own_resources

    chip, quick = CHIPS[int(os.environ[CAPABILITY])], os.environ[QUICK] == "1"
    mocked_gpu.mock_gpus(chip=chip)
    print(json.dumps([one.numbers() for one in own_resources(chip, quick=quick)]))


def print_spilling() -> None:
    """The same for a kernel that is given few registers."""
    from triton.runtime.jit import JITFunction

    from benchmarks.plan.resources import launched

    mocked_gpu.mock_gpus(chip=CHIPS[90])
    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", functools.partialmethod(run, maxnreg=32)):
        (one, *_) = (each for each in launching() if each.is_quick)
        print(json.dumps([each.numbers() for each in launched(one.call, CHIPS[90])]))


def compiled(capability: int, tmp_path: Path, *, quick: bool) -> list[dict[str, Any]]:
    variables = {"TRITON_CACHE_DIR": tmp_path, CAPABILITY: capability, QUICK: int(quick)}
    printed = printed_by(
        "tests.test_kernel_resources", "print_resources", mocked_gpu.ENVIRONMENT, **variables
    )
    found: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found


def check(found: list[dict[str, Any]]) -> None:
    """What does not compile raises where it was compiled."""
    spilling = {one["kernel"]: one["spilled"] for one in found if one["spilled"]}
    assert not spilling
    assert all(one["occupancy"] > 0 for one in found), found


@pytest.mark.parametrize("capability", CHIPS)
def test_kernels_fit_into_registers(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, tmp_path, quick=True)
    check(found)
    names = {one["kernel"].rpartition(": ")[2] for one in found}
    assert {"_reduce_chunks", "_summarize_queries"} < names
    assert {one["capability"] for one in found} == {capability}
    assert sum("summarize: five metrics" in one["kernel"] for one in found) == 6  # one runs twice


@pytest.mark.slow
@pytest.mark.parametrize("capability", CHIPS)
def test_all_forms_of_kernels_fit_into_registers(capability: int, tmp_path: Path) -> None:
    check(compiled(capability, tmp_path, quick=False))


def launched_kernels(text: str) -> set[str]:
    """The functions of Triton that a file launches, and not those that these call."""
    jitted = set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)\(", text))
    return {name for name in jitted if re.search(rf"\b{name}\[", text)}


def test_no_kernel_is_left_out() -> None:
    """A file with a kernel in Triton stands in the list of what is compiled here."""
    files = {
        str(path.relative_to(KERNELS)): names
        for path in KERNELS.rglob("*.py")
        if (names := launched_kernels(path.read_text()))
    }
    assert files["summarize/group_triton.py"] == {"_reduce_chunks", "_reduce_stacked"}
    assert {one.source for one in launching()} == files.keys()
    assert {one.source for one in launching() if one.is_quick} == files.keys()


def test_a_kernel_that_spills_is_told(tmp_path: Path) -> None:
    given = "tests.test_kernel_resources", "print_spilling", mocked_gpu.ENVIRONMENT
    printed = printed_by(*given, TRITON_CACHE_DIR=tmp_path)
    one, *_ = json.loads(printed.splitlines()[-1])
    assert one["registers"] <= 32
    with pytest.raises(AssertionError, match="_reduce_chunks"):
        check([one])
    check([{**one, "spilled": 0}])
