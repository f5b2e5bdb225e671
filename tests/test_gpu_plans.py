"""What GPUs are given to do: the text that Inductor generates for mocked ones."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import mocked_gpu
from benchmarks.mocked_gpu import Plan, mock_gpus, plan_of
from tests.triton_interpreter import printed_by
from tmm.core.metrics import builtin_reductions

(FIVE,) = builtin_reductions(("mean", "std", "rms", "absmax", "zero_fraction"), is_complex=False)
KERNELS = {
    "five": (FIVE.columns, torch.bfloat16, 1, True),
    "extremes": (("absmax", "minimum", "maximum"), torch.float32, 0, True),
    "one row": (("sum_squares", "absmax"), torch.float16, 1, False),
}
"""Columns, dtype, index of the device, and whether there are several rows."""


def print_plans() -> None:
    """In a process that takes itself for one with two GPUs, the first of which is current."""
    from tmm.kernels.summarize.inductor_rows import _kernel

    mock_gpus()
    plans = {}
    for name, (columns, dtype, index, several_rows) in KERNELS.items():
        kernel = columns, dtype, torch.device("cuda", index), several_rows
        plans[name] = vars(plan_of(lambda kernel=kernel: _kernel(*kernel)))
    print(json.dumps(plans))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    of_users = {"TORCHINDUCTOR_CUDAGRAPHS": "1", "TORCHINDUCTOR_CPP_WRAPPER": "1"}
    found = json.loads(
        printed_by("tests.test_gpu_plans", "print_plans", **mocked_gpu.ENVIRONMENT, **of_users)
    )
    return {name: Plan(**plan) for name, plan in found.items()}


def test_a_site_is_read_once(plans: dict[str, Plan]) -> None:
    assert plans["five"].readings == 1
    assert (plans["five"].triton_launches, plans["five"].other_launches) == (7, 0)
    assert (plans["one row"].triton_launches, plans["one row"].readings) == (1, 1)


def test_sizes_are_not_counted_in_32_bits(plans: dict[str, Plan]) -> None:
    for name in ("five", "extremes"):
        assert not plans[name].counts_in_32_bits
        assert "'ks0': 'i64'" in plans[name].text  # what the number of a row is multiplied with


def test_each_device_has_a_kernel_of_its_own(plans: dict[str, Plan]) -> None:
    assert {name: plan.device_indices for name, plan in plans.items()} == {
        name: {index} for name, (_, _, index, _) in KERNELS.items()
    }


def test_settings_of_programs_do_not_reach_the_kernel(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        assert not plan.has_cuda_graphs
        assert not plan.is_cpp
