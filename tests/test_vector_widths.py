"""The kernels of a CPU with vectors of every width that can be built here, against float64.

Their own tests run once more for each width, and in an emulator of a 64-bit ARM, which has NEON,
where a compiler for that and the emulator are installed. Vectors of 8 bytes stand for processors
that have none.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulated_kernels, test_attention_kernels, test_group, test_host
from tests.emulated_kernels import Kernels
from tmm.kernels.attention import attention_host
from tmm.kernels.build import VECTORS, compile_variant, instruction_set_of, kernels_of
from tmm.kernels.summarize import host
from tmm.kernels.summarize.group import summarize_group

WIDTHS = {8: "no vectors", 16: "vectors of 16 bytes", 32: "AVX2"}
"""What kernels say of the vectors that they use, where that is not the processor's own."""


@pytest.fixture(scope="session")
def libraries() -> dict[int, list[ctypes.CDLL]]:
    """By width, the kernels of tensors and those of attentions."""
    sources = [(VECTORS, "summarize/host.cpp"), attention_host.SOURCES]
    with ThreadPoolExecutor(2) as compilers:
        started = {
            width: [compilers.submit(compile_variant, files, width) for files in sources]
            for width in WIDTHS
        }
        return {width: [one.result() for one in both] for width, both in started.items()}


@pytest.fixture(scope="module", params=[*WIDTHS, "aarch64"])
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Kernels, Kernels]]:
    """The kernels with vectors of one width, or those of another processor."""
    if request.param in WIDTHS:
        tensors, attentions = request.getfixturevalue("libraries")[request.param]
        if platform.machine() == "x86_64":
            assert instruction_set_of(tensors) == WIDTHS[request.param]
            assert instruction_set_of(attentions) == WIDTHS[request.param]
        kernels = kernels_of(tensors, host.ARGUMENTS)
        yield kernels, kernels_of(attentions, attention_host.ARGUMENTS)
    elif not emulated_kernels.IS_THERE:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    else:
        with emulated_kernels.emulated(tmp_path_factory.mktemp("emulated")) as kernels_of_arm:
            yield kernels_of_arm


@pytest.fixture(autouse=True)
def _in_place_of_the_kernels(
    variant: tuple[Kernels, Kernels], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    tensors, attentions = variant
    monkeypatch.setattr(host, "_kernels", lambda: tensors)
    monkeypatch.setattr(attention_host, "_kernels", lambda: attentions)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(test_host.DTYPES),
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    more=st.integers(0, 9000),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    is_turned=st.booleans(),
    special=st.lists(
        st.tuples(st.integers(0, 9000), st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf])),
        max_size=3,
    ),
    exponent=st.floats(-30, 30),
    seed=st.integers(0, 100),
)
def test_any_length_and_any_strides(
    dtype: torch.dtype,
    shape: Sequence[int],
    more: int,
    steps: tuple[int, int],
    is_turned: bool,
    special: list[tuple[int, float]],
    exponent: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(*shape[:-1], shape[-1] + more // shape[0] ** 2, generator=generator)
    values = whole.double() * 10.0**exponent
    for where, value in special:
        values.view(-1)[where % values.numel()] = value
    x = values.to(dtype)[:: steps[0], ..., :: steps[1]]
    x = x.transpose(0, -1) if is_turned else x
    flat, columns = x.contiguous().view(-1), test_host.TENSOR_COLUMNS
    test_host.check(flat)
    (row,) = summarize_group([x], columns)
    test_host.check_row(dict(zip(columns, row.tolist(), strict=True)), flat)


TESTS_OF_TENSORS: dict[str, Callable[[], object]] = {
    "scales and special values": test_host.test_any_scale_and_any_special_value,
    "pairs": test_host.test_columns_of_pairs,
    "differences": test_host.test_differences_are_those_of_the_two_in_float32_at_least,
    "threads": test_host.test_the_number_of_threads_makes_no_difference,
    "mixed": test_group.test_mixed_dtypes_and_strides,
    "no count": test_group.test_columns_without_a_count,
    "empty": test_group.test_nothing_and_only_empty_tensors,
}


@pytest.mark.parametrize("test", TESTS_OF_TENSORS.values(), ids=TESTS_OF_TENSORS)
def test_tensors(test: Callable[[], object]) -> None:
    test()


TESTS_WITH_ARGUMENTS: list[tuple[Callable[..., object], Sequence[Any]]] = [
    (test_host.test_equal_values_have_no_deviations, (0.0, -0.0, 0.1, -1e30, 3e38, 1e-40)),
    (test_host.test_every_value_of_a_short_dtype, (torch.float16, torch.bfloat16)),
    (test_host.test_squares_beyond_the_range_of_float32, (1e-30, 1e-22, 3.4e38, 1e19, 0.1, 1e-45)),
    (test_group.test_values_that_are_not_finite, tuple(test_group.COLUMN_SETS.values())),
    (test_group.test_awkward_values, tuple(test_group.COLUMN_SETS.values())),
]


@pytest.mark.parametrize(
    ("test", "arguments"), TESTS_WITH_ARGUMENTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_tensors_with(test: Callable[..., object], arguments: Sequence[Any]) -> None:
    for argument in arguments:
        test(argument)


@pytest.mark.parametrize("dtype", test_attention_kernels.DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    on_host = test_attention_kernels.on_host
    for case in test_attention_kernels.varied(dtype):
        test_attention_kernels.check(on_host(case.arranged()), case)
    test_attention_kernels.test_values_that_are_not_finite(on_host, dtype)


def test_attentions_of_any_size() -> None:
    test_attention_kernels.test_any_call()
    test_attention_kernels.test_sizes_around_those_of_blocks(test_attention_kernels.on_host)
    test_attention_kernels.test_exponentials_of_every_size(test_attention_kernels.on_host)
