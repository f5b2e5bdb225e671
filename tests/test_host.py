"""The kernel of a CPU where arithmetic is awkward, against numpy in float64."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch._inductor.config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.interpreters import Interpreters
from tmm.core.inductor_private import cache_folder
from tmm.core.metrics import PAIR_COLUMNS, TENSOR_COLUMNS, builtin_reductions, finalize
from tmm.kernels import build, kept_library
from tmm.kernels.build import _Started
from tmm.kernels.dropped_rows import rows_dropped
from tmm.kernels.ops import summarize, summarize_difference
from tmm.kernels.summarize import host
from tmm.kernels.summarize.group import summarize_group
from tmm.kernels.summarize.host import summarize_on_host

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def row_of(x: torch.Tensor, columns: tuple[str, ...] = TENSOR_COLUMNS) -> dict[str, float]:
    rows = summarize_on_host([x], columns)
    assert rows is not None
    return dict(zip(columns, rows[0].tolist(), strict=True))


def expected(x: torch.Tensor) -> dict[str, float]:
    values = x.double().numpy()
    with np.errstate(all="ignore"):
        mean = np.mean(values) if np.isfinite(values.sum()) else np.nan
        deviation = values - mean
        return {
            "count": values.size,
            "sum": values.sum(),
            "sum_squares": (values**2).sum(),
            "sum_absolute": np.abs(values).sum(),
            "mean": mean,
            "moment2": (deviation**2).sum(),
            "moment3": (deviation**3).sum(),
            "moment4": (deviation**4).sum(),
            "absmax": np.abs(values).max(),
            "minimum": values.min(),
            "maximum": values.max(),
            "zeros": (values == 0).sum(),
            "nans": np.isnan(values).sum(),
            "infinities": np.isinf(values).sum(),
        }


def check(x: torch.Tensor, columns: tuple[str, ...] = TENSOR_COLUMNS) -> None:
    check_row(row_of(x, columns), x)


def check_row(got: dict[str, float], x: torch.Tensor) -> None:
    """A row of a tensor, by column, is what float64 gives, as far as float32 can add."""
    want = expected(x)
    # A chain of 128 float32 additions, of which each is off by 2**-24 of the sum so far at most.
    tolerance = 1e-12 if x.dtype == torch.float64 else 128 * 2**-24
    for name in got:
        scale = abs(want[name])
        if name in ("sum", "mean"):
            scale = want["sum_absolute"] / (want["count"] if name == "mean" else 1)
        if name == "moment3":
            scale = max(want["moment4"], 0) ** 0.75 * want["count"] ** 0.25
        near = tolerance * scale if np.isfinite(scale) else 0.0
        if name.startswith("moment"):  # of a constant, float64 leaves rounding in the judge
            rounding = 1e-13 * want["sum_absolute"] / want["count"]
            near += want["count"] * rounding ** int(name[-1]) if np.isfinite(rounding) else 0.0
        approximately = pytest.approx(want[name], rel=0, abs=near, nan_ok=True)
        assert got[name] == approximately, (name, x.dtype, x.shape)


WITHOUT_HIGHER = tuple(c for c in TENSOR_COLUMNS if c not in ("moment3", "moment4"))
WITHOUT_EXTREMES = ("count", "sum", "sum_squares", "mean", "moment2", "absmax", "zeros", "nans")
"""Those that need no minimum, maximum or absolute values."""


@settings(max_examples=200, deadline=None)
@example(  # the large deviations come first: each addition is rounded by as much as the last one
    dtype=torch.bfloat16, size=3360, exponent=0.0, offset=-100.0, special=[(0, 0), (1, 0)], seed=0
)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 9000),
    exponent=st.floats(-30, 30),
    offset=st.sampled_from([0.0, 1.0, -100.0]),
    special=st.lists(
        st.tuples(st.integers(0, 8999), st.sampled_from([0.0, np.nan, np.inf, -np.inf])), max_size=3
    ),
    seed=st.integers(0, 100),
)
def test_any_scale_and_any_special_value(
    dtype: torch.dtype,
    size: int,
    exponent: float,
    offset: float,
    special: list[tuple[int, float]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator, dtype=torch.float64) + offset) * 10.0**exponent
    for where, value in special:
        x[where % size] = value
    x = x.to(dtype)
    check(x, WITHOUT_HIGHER)
    check(x, WITHOUT_EXTREMES)
    check(x, ("sum_squares", "mean", "moment2"))
    check(x)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -1e30, 3e38, 1e-40])
def test_equal_values_have_no_deviations(value: float) -> None:
    for columns in (("count", "mean", "moment2"), ("mean", "absmax", "zeros")):
        x = torch.full((10_000,), value)
        row = row_of(x, ("moment2", *columns))
        assert row["moment2"] == 0.0
        assert row["mean"] == float(x[0])
        check(x, columns)
        x[7000] = torch.nextafter(x[0], torch.tensor(torch.inf))  # all but one
        check(x, columns)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 9000),
    exponents=st.tuples(st.floats(-30, 30), st.floats(-30, 30)),
    special=st.lists(st.tuples(st.integers(0, 8999), st.sampled_from([0.0, np.nan, np.inf]))),
    seed=st.integers(0, 100),
)
def test_columns_of_pairs(
    dtype: torch.dtype,
    size: int,
    exponents: tuple[float, float],
    special: list[tuple[int, float]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, other = (
        torch.randn(size, generator=generator, dtype=torch.float64) * 10.0**exponent
        for exponent in exponents
    )
    for where, value in special:
        own[where % size] = value
    own, other = own.to(dtype), other.to(dtype)
    rows = summarize_on_host([own], ("sum", *PAIR_COLUMNS), [other])
    assert rows is not None
    a, b = own.double(), other.double()
    want = torch.stack([b @ b, a @ a, a @ b])
    near = 1e-12 if dtype == torch.float64 else 128 * 2**-24
    scale = torch.stack([b @ b, a @ a, (a * b).abs().sum()])
    for got, expected_value, size_of_it in zip(rows[0, 1:], want, scale, strict=True):
        limit = near * float(size_of_it) if size_of_it.isfinite() else 0.0
        # Products of float32 vanish below its range.
        limit += size * 2.0**-149
        assert float(got) == pytest.approx(float(expected_value), rel=0, abs=limit, nan_ok=True)
    grouped = summarize_group([own], ("sum", *PAIR_COLUMNS), [other])
    torch.testing.assert_close(grouped, rows, rtol=0, atol=0, equal_nan=True)


EXACT = ("count", "absmax", "minimum", "maximum", "zeros", "nans", "infinities")
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last),
    "piece": lambda x: x[1:, 2],
    "with gaps": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "of size 1": lambda x: x[:1, :, :1],
    "one number": lambda x: x[0, 0, 0],
    "empty": lambda x: x[:0].transpose(0, 1),
    "to be negated": lambda x: torch.view_as_complex(x.view(3, 7, 25, 2).float()).conj().imag,
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_the_operator_reads_any_layout_and_dtype(dtype: torch.dtype) -> None:
    summarize(torch.ones(1), "count")  # from then on it is that of host_operator.cpp
    for layout in LAYOUTS:
        check_operator(dtype, layout)


def check_operator(dtype: torch.dtype, layout: str) -> None:
    values = torch.randint(-2, 3, (3, 7, 50), generator=torch.Generator().manual_seed(0))
    x = LAYOUTS[layout](values.to(dtype))
    want = torch.zeros(len(TENSOR_COLUMNS), dtype=torch.float64)
    want[[TENSOR_COLUMNS.index("minimum"), TENSOR_COLUMNS.index("maximum")]] = torch.tensor(
        [torch.inf, -torch.inf], dtype=torch.float64
    )
    if x.numel():
        want = torch.tensor(list(expected(x).values()), dtype=torch.float64)
    got = summarize(x, ",".join(expected(torch.ones(1))))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, msg=lambda text: layout + text)
    names = tuple(expected(torch.ones(1)))
    exact = [names.index(name) for name in EXACT]
    assert torch.equal(got[exact], want[exact]), layout
    for name, value in zip(names, got, strict=True):
        if name == "mean" or name.startswith("moment"):
            continue  # they come together
        torch.testing.assert_close(summarize(x, name), value[None], rtol=1e-5, atol=1e-4)


def test_a_column_that_does_not_exist() -> None:
    summarize(torch.ones(1), "count")
    with pytest.raises(RuntimeError, match="there is no median"):
        summarize(torch.ones(1), "count,median")


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch loses the messages of errors")
def test_an_error_of_what_is_left_to_python_keeps_its_message() -> None:
    summarize(torch.ones(1), "count")
    with pytest.raises(RuntimeError, match="not in tuple"):
        summarize(torch.ones(1, dtype=torch.int64), "count,median")


@pytest.mark.parametrize("size", [2, 1_000, 9_000, 100_000])
def test_squares_beyond_the_range_of_float64(size: int) -> None:
    signs = torch.ones(size, dtype=torch.float64)
    signs[::2] = -1
    for centre in (0.0, 3e200):
        got = row_of(signs * 1e200 + centre)
        assert got["moment2"] == got["sum_squares"] == np.inf
        assert got["mean"] == pytest.approx(centre, abs=1e188)
        assert got["absmax"] == pytest.approx(1e200 + centre)
        std = builtin_reductions(("std",), is_complex=False)[0]
        rows = np.array([[got[column] for column in std.columns]])
        assert finalize(std, rows)[0, 0] == np.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_short_dtype(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rows = summarize_on_host(list(every.view(-1, 1).unbind()), ("sum", "nans", "minimum"))
    assert rows is not None
    torch.testing.assert_close(rows[:, 0], every.double(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rows[:, 1], every.isnan().double())
    # The same in full vectors, where one value in 64 must not spoil the others.
    wide = every[every.isfinite()].view(-1, 1).repeat(1, 64)
    for row, value in zip(wide[::7], every[every.isfinite()][::7].tolist(), strict=True):
        got = row_of(row, WITHOUT_HIGHER)
        assert got["sum"] == 64 * value
        assert got["sum_squares"] == 64 * value * value
        assert got["moment2"] == 0


@pytest.mark.parametrize("value", [1e-30, 1e-22, 3.4e38, 1e19, 0.1, 1e-45])
def test_squares_beyond_the_range_of_float32(value: float) -> None:
    x = torch.full((10_000,), value)
    x[::2] *= -1
    check(x, WITHOUT_HIGHER)
    check(x.abs(), WITHOUT_HIGHER)
    check(torch.cat([x, torch.ones(5000)]), WITHOUT_HIGHER)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(0, 40), st.integers(1, 300)),
    exponent=st.floats(-25, 3),
    turned=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 100),
)
def test_differences_are_those_of_the_two_in_float32_at_least(
    dtype: torch.dtype,
    shape: tuple[int, int],
    exponent: float,
    turned: tuple[bool, bool],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    own, other = (
        x.to(dtype).T.contiguous().T if turn else x.to(dtype)
        for x, turn in zip(pair, turned, strict=True)
    )
    other = own + other / 100  # not far from each other
    columns = ",".join(WITHOUT_HIGHER)
    written = own.to(torch.promote_types(dtype, torch.float32)) - other
    got, want = summarize_difference(own, other, columns), summarize(written, columns)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want[3]))
    (grouped,) = summarize_group([own], WITHOUT_HIGHER, [other])
    assert torch.equal(grouped, got)


def test_the_number_of_threads_makes_no_difference() -> None:
    x, threads = torch.randn(1_000_003), torch.get_num_threads()
    rows = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        rows.append(row_of(x))
    torch.set_num_threads(threads)
    assert all(row == rows[0] for row in rows)


def test_other_dtypes_have_no_kernel() -> None:
    assert summarize_on_host([torch.zeros(4).to(torch.float8_e4m3fn)], ("sum",)) is None


LATER = """
import sys, warnings
import torch
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
from tmm.kernels.summarize.host import summarize_on_host
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rows = summarize_on_host([torch.arange(5.0)], ("count", "sum"))
assert rows is None or rows.tolist() == [[5, 10]]
print(rows is not None, "torch._inductor.codecache" in sys.modules, len(caught))
print(*(str(warning.message) for warning in caught))
"""


def test_a_later_process_asks_no_compiler(tmp_path: Path) -> None:
    """It finds the kernel, unless that is damaged or somebody else could have written it."""
    assert summarize_on_host([torch.ones(2)], ("sum",)) is not None
    text = build.text_of(host.SOURCES)
    (known,) = kept_library._places(cache_folder(), text)
    kept = tmp_path / "cache" / "tmm" / known.name
    kept.parent.mkdir(parents=True)
    shutil.copy2(known, kept)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> list[str]:
        command = [sys.executable, "-c", LATER]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        return done.stdout.splitlines()

    assert run()[0] == "True False 0"
    kept.chmod(0o777)
    shown, said = run()
    assert shown == "False False 1"
    assert f"others can write to {kept}" in said
    kept.chmod(0o700)
    kept.write_bytes(kept.read_bytes()[:1000])
    shown, said = run()
    assert shown == "False True 1"
    assert "could not be compiled" in said


def test_what_is_kept_is_found_by_its_sources(tmp_path: Path) -> None:
    assert summarize_on_host([torch.ones(2)], ("sum",)) is not None
    (known,) = kept_library._places(cache_folder(), build.text_of(host.SOURCES))
    assert not kept_library.is_kept(tmp_path, "a")
    kept_library.keep_library(tmp_path, "a", known)
    kept_library.keep_library(tmp_path, "a", known)
    assert kept_library.is_kept(tmp_path, "a")
    assert not kept_library.is_kept(tmp_path, "b")
    kept_library.keep_library(tmp_path / "nowhere", "a", known)  # which costs nobody anything


def test_machines_that_share_a_folder_find_each_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which instructions there are is in the name, and in the text that torch's cache knows."""
    assert summarize_on_host([torch.ones(2)], ("sum",)) is not None
    (known,) = kept_library._places(cache_folder(), build.text_of(host.SOURCES))
    texts = set()

    def is_another_machine() -> bool:
        kept_library._processor.cache_clear()
        text = build._of_this_machine("a")
        is_new = text not in texts and not kept_library.is_kept(tmp_path, "a")
        texts.add(text)
        kept_library.keep_library(tmp_path, "a", known)
        assert kept_library.is_kept(tmp_path, "a")
        return is_new

    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(kept_library, "_CPUINFO", cpuinfo)
    try:
        for flags in ("sse2 avx2", "sse2 avx2 avx512f", "sse2 avx2 avx_vnni"):
            cpuinfo.write_text(f"model name: of a cloud\nflags: {flags}\ncpu MHz: 1")
            assert is_another_machine()
            cpuinfo.write_text(f"model name: of a cloud\nflags: {flags}\ncpu MHz: 2")
            assert not is_another_machine()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert is_another_machine()
        with torch._inductor.config.patch("cpp.simdlen", 1):
            assert is_another_machine()
    finally:
        kept_library._processor.cache_clear()


def test_the_library_says_which_vectors_it_uses() -> None:
    assert summarize_on_host([torch.ones(2)], ("sum",)) is not None
    capability = torch.backends.cpu.get_cpu_capability()
    known = {"AVX2": "AVX2", "AVX512": "AVX-512", "NEON": "NEON", "SVE256": "NEON"}
    assert build.instruction_set(host.SOURCES) == known.get(capability, mock.ANY)


def test_rows_that_are_dropped_are_not_computed() -> None:
    """In this thread, and nowhere else; what others measure meanwhile counts."""
    x, columns = torch.arange(6.0).reshape(2, 3).T, "sum,absmax"
    into = torch.ops.tmm.summarize_into
    known = summarize(x, columns)
    assert known.tolist() == [15, 5]
    rows = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(KeyError), rows_dropped(True):
        assert summarize(x, columns).isnan().all()
        assert summarize(x.half(), columns).shape == (2,)
        assert summarize(x.to(torch.complex64), columns).isnan().all()
        into(rows, 1, x, columns)
        assert rows.isnan().tolist() == [False, True, True, False]
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(summarize, x, columns).result().equal(known)
        with rows_dropped(False):
            assert summarize(x, columns).equal(known)
        assert summarize(x, columns).isnan().all()
        raise KeyError
    assert summarize(x, columns).equal(known)


def test_without_a_compiler_plain_operations_serve(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    code = """
import warnings
import torch
from torch._inductor import config
config.cpp.cxx = ("no-such-compiler",)
from tmm.kernels.attention.choose import summarize_attention
from tmm.kernels.attention.attention_call import arrange
from tmm.kernels.attention.attention_torch import summarize_attention_with_torch
from tmm.kernels.summarize.group import summarize_group
from tmm.kernels.ops import summarize
x = torch.randn(2, 5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert summarize_group([torch.ones(5)], ("count", "sum")).tolist() == [[5, 5]]
        assert summarize(torch.ones(5), "count,sum").tolist() == [5, 5]
        rows = summarize_attention(x, x, None, is_causal=True, scale=None)
assert torch.equal(rows, summarize_attention_with_torch(arrange(x, x, None, True, None, 1)))
said = sorted(str(w.message) for w in caught if "tmm" in str(w.message))
assert len(said) == 2, said
assert all("plain torch operations, which is slower" in text for text in said), said
assert "measures attention" in said[0], said
"""
    folder = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = interpreters.run(code, environment={**os.environ, **folder})
    assert done.returncode == 0, done.stderr


def test_waiting_for_a_compilation_leaves_errors_and_ends_in_a_forked_child() -> None:
    failed: Future[None] = Future()
    failed.set_exception(ValueError("killed"))
    _Started(failed).result()
    endless = _Started(Future())
    child = os.fork()
    if not child:
        signal.alarm(20)
        endless.result()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_compiler_that_fails_in_the_background_is_warned_of_once(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ntest "$1" = --version && exec g++ --version\nexit 1\n')
    compiler.chmod(0o755)
    code = f"""
import warnings
import torch
from torch._inductor import config
config.cpp.cxx = ({str(compiler)!r},)
import tmm
model = tmm.instrument(torch.nn.Linear(2, 2), tmm.Spec(tmm.activation("mean")))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(2):
        with tmm.monitor(model).step(step):
            mean = model(torch.ones(1, 2)).mean()
        (value,) = tmm.monitor(model).get_step_metrics().values()
        assert abs(value - float(mean.detach())) < 1e-6
(warning,) = [w for w in caught if "plain torch operations" in str(w.message)]
"""
    folder = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = interpreters.run(code, environment={**os.environ, **folder})
    assert done.returncode == 0, done.stderr
