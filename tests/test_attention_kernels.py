"""Statistics of attention without its matrix, against the definitions on the whole of it."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parameters import peak_memory
from tests.triton_interpreter import check_in_the_interpreter
from tmm.kernels import ops as operators
from tmm.kernels.attention import attention_torch
from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS, AttentionCall, arrange
from tmm.kernels.attention.attention_host import summarize_attention_on_host
from tmm.kernels.attention.attention_torch import summarize_attention_with_torch
from tmm.kernels.attention.choose import summarize_attention
from tmm.kernels.attention.exact_products import exact_products

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MASKS = [
    "none",
    "bool",
    "padding",
    "left padding",
    "window",
    "rows",
    "float",
    "forbidding",
    "heads",
]


def on_host(call: AttentionCall) -> torch.Tensor:
    rows = summarize_attention_on_host(call)
    assert rows is not None
    return rows


KERNELS: list[Callable[[AttentionCall], torch.Tensor]] = [on_host, summarize_attention_with_torch]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=["host", "torch"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads make no difference, which a test of its own shows, but take long where many wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """The arguments of ``summarize_attention``."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    query_stride: int = 1

    def arranged(self) -> AttentionCall:
        return arrange(*self)


def all_logits(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 logits (..., H, L, S), and which are allowed."""
    query, key = (x.double().reshape(*[1] * (3 - x.dim()), *x.shape) for x in case[:2])
    mask, (length, channels) = case.mask, query.shape[-2:]
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.mT * (channels**-0.5 if case.scale is None else case.scale)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if case.is_causal:
        allowed = allowed & torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & ~(mask <= -9999)
        logits = logits + mask.double()
    measured = torch.arange(0, length, case.query_stride)
    logits, allowed = torch.broadcast_tensors(logits, allowed)
    return logits[..., measured, :], allowed[..., measured, :]


def expected(case: Case) -> torch.Tensor:
    logits, allowed = all_logits(case)
    logits = logits.masked_fill(~allowed, -math.inf)
    logits = logits.reshape(-1, *logits.shape[-3:])
    number = allowed.sum(-1).reshape(logits.shape[:-1])
    some = number > 0
    shifted = logits - logits.amax(-1, keepdim=True)
    logarithm = shifted - shifted.exp().sum(-1, keepdim=True).log()
    p = logarithm.exp()
    entropy = -torch.where(p == 0, 0, p * logarithm).sum(-1)
    sums = [
        torch.ones_like(entropy),
        entropy,
        torch.where(number == 1, entropy, entropy / number.double().log()),
        logits.logsumexp(-1),
        p.amax(-1),
        p[..., 0],
    ]
    columns = [torch.where(some, x, 0).sum((0, 2)) for x in sums]
    columns.append(torch.where(some, logits.amax(-1), -math.inf).amax((0, 2)))
    return torch.stack(columns, dim=1)


def check(got: torch.Tensor, case: Case) -> None:
    want = expected(case)
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    logits, allowed = all_logits(case)
    largest = float(torch.where(allowed, logits, 0).detach().abs().amax())
    double = torch.promote_types(case.query.dtype, case.key.dtype) == torch.float64
    relative, absolute = (1e-10, 1e-12) if double else (1e-4, 1e-6)
    near = relative * want.abs() + absolute * want[:, :1]
    # Logits themselves are rounded, and may cancel in their sum.
    near[:, 3] += absolute * largest * want[:, 0]
    near[:, 6] += absolute * largest
    near[:, 0] = 0
    wrong = ~((got - want).abs() <= near) & (got != want)
    assert not wrong.any(), (case, got[wrong.any(1)], want[wrong.any(1)], wrong)


def make_mask(kind: str, batch: tuple[int, ...], heads: int, size: int, keys: int) -> torch.Tensor:
    """A mask of the kind, broadcastable to (*batch, heads, size, keys)."""
    if kind.endswith("padding"):
        ends = torch.randint(0, keys + 1, (*batch, 1, 1, 1))
        return (torch.arange(keys) < ends) ^ (kind == "left padding")
    if kind == "window":
        return (torch.arange(keys) - torch.arange(size)[:, None]).abs() < 15
    if kind == "heads":  # transposed in memory
        return torch.randn(*batch, heads, keys, size).mT > 0
    mask = torch.randn(size, keys)
    if kind == "bool":
        return mask > 0
    if kind == "rows":
        return (mask > -1) & (torch.arange(size) % 3 > 0)[:, None]
    if kind == "forbidding":
        values = torch.tensor([-math.inf, torch.finfo(torch.float32).min, -10000.0, -9999.0])
        mask = torch.where(mask > 0, values[torch.randint(0, 4, mask.shape)], mask)
    return mask


def sample(
    dtype: torch.dtype, *shape: int, deviation: float = 1.0, is_transposed: bool = False
) -> torch.Tensor:
    """Values of shape (..., heads, length, channels)."""
    if is_transposed:  # as heads cut out of one projection
        *batch, heads, length, channels = shape
        x = torch.randn(*batch, length, heads, 2 * channels, dtype=torch.float64)
        return (x * deviation).to(dtype).transpose(-3, -2)[..., ::2]
    return (torch.randn(*shape, dtype=torch.float64) * deviation).to(dtype)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    check_any_call(data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_very_many_calls(data: st.DataObject) -> None:
    check_any_call(data)


def check_any_call(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    batches = [((), ()), ((2,), (2,)), ((3,), (1,)), ((2, 1), (1, 3))]
    batch, key_batch = data.draw(st.sampled_from(batches), label="batches")
    key_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)]), label="heads")
    lengths = st.one_of(st.integers(1, 40), st.integers(60, 200))
    size, keys = data.draw(lengths, label="queries"), data.draw(lengths, label="keys")
    channels = data.draw(st.sampled_from([1, 3, 8, 40, 64, 80]), label="channels")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    deviation = data.draw(st.sampled_from([0.1, 1.0, 3.0]), label="deviation")
    kind = data.draw(st.sampled_from(MASKS), label="mask")
    transposed = data.draw(st.booleans(), label="transposed")
    heads = key_heads * group
    mask = None if kind == "none" else make_mask(kind, batch, heads, size, keys)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(data.draw(st.sampled_from([dtype, torch.float32]), label="mask dtype"))
    shapes = (*batch, heads, size, channels), (*key_batch, key_heads, keys, channels)
    query, key = (
        sample(dtype, *shape, deviation=deviation, is_transposed=transposed) for shape in shapes
    )
    case = Case(
        query,
        key,
        mask,
        is_causal=data.draw(st.booleans(), label="causal"),
        scale=data.draw(st.sampled_from([None, 0.3, -0.1, 0.0]), label="scale"),
        query_stride=data.draw(st.sampled_from([1, 1, 2, 7, 300]), label="stride"),
    )
    for kernel in KERNELS:
        check(kernel(case.arranged()), case)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_attention(
    kernel: Callable[[AttentionCall], torch.Tensor], dtype: torch.dtype
) -> None:
    """Logits of a deviation at which nearly all of the probability is with one key."""
    for deviation, is_causal in product((16.0, 60.0), (False, True)):
        each = deviation**0.5
        query = sample(dtype, 4, 130, 64, deviation=each)
        key = sample(dtype, 2, 600, 64, deviation=each)
        case = Case(query, key, is_causal=is_causal)
        check(kernel(case.arranged()), case)


CHANNELS = (1, 3, 40, 64, 80, 128, 256)
SIZES = ((1, 1), (1, 300), (300, 1), (65, 97), (16, 96), (200, 513))


@each_kernel
def test_sizes_around_those_of_blocks(kernel: Callable[[AttentionCall], torch.Tensor]) -> None:
    for channels, sizes in product(CHANNELS, SIZES):
        query, key = (sample(torch.float32, 2, size, channels) for size in sizes)
        for is_causal in (False, True):
            case = Case(query, key, is_causal=is_causal)
            check(kernel(case.arranged()), case)


@each_kernel
def test_exponentials_of_every_size(kernel: Callable[[AttentionCall], torch.Tensor]) -> None:
    """The entropy of two keys shows the exponential of their difference."""
    difference = torch.cat([torch.linspace(-120, 0, 50_001), -torch.logspace(-30, 5, 1001)])
    key = torch.stack([torch.zeros_like(difference), difference], dim=1)[..., None]
    rows = kernel(Case(torch.ones(len(key), 1, 1), key, scale=1.0).arranged())
    entropy, wide = rows[:, ATTENTION_COLUMNS.index("entropy")], difference.double()
    p = wide.exp()
    total = torch.where(wide <= -18, 0, p).log1p()  # of a smaller p nothing is left beside 1
    error = (entropy - total + wide * p / (1 + p)).abs()
    assert (error <= -5e-7 * wide * p + 2e-7 * (wide > -18) + 1e-36).all()
    assert (entropy[wide < -110] == 0).all()


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_short_dtype(
    kernel: Callable[[AttentionCall], torch.Tensor], dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, every = torch.ones(1, 1, 1, dtype=dtype), every[every.isfinite()]
    values, column = every.view(-1, 1, 1), ATTENTION_COLUMNS.index("max_logit")
    for case in (
        Case(one.expand(len(values), 1, 1), values, scale=1.0),
        Case(values, one.expand(len(values), 1, 1), scale=1.0),
    ):
        assert torch.equal(kernel(case.arranged())[:, column], every.double())
    zeros = torch.zeros(len(values), 1, 1)
    rows = kernel(Case(zeros, zeros, values.where(values > -9000, 0)).arranged())
    assert torch.equal(rows[:, column], every.where(every > -9000, 0).double())


@each_kernel
def test_nothing_to_see(kernel: Callable[[AttentionCall], torch.Tensor]) -> None:
    for batch, size, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)):
        query, key = torch.randn(batch, 2, size, 8), torch.randn(batch, 2, keys, 8)
        rows = kernel(Case(query, key, is_causal=True).arranged())
        assert rows.tolist() == [[0.0] * 6 + [-math.inf]] * 2, (batch, size, keys)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(
    kernel: Callable[[AttentionCall], torch.Tensor], dtype: torch.dtype
) -> None:
    for value, where in product((math.nan, math.inf, -math.inf), ("query", "key")):
        check_bad_value(kernel, value, where, dtype)


def check_bad_value(
    kernel: Callable[[AttentionCall], torch.Tensor], value: float, where: str, dtype: torch.dtype
) -> None:
    query, key = sample(dtype, 3, 130, 16), sample(dtype, 3, 130, 16)
    clean = kernel(Case(query, key).arranged())
    (query if where == "query" else key)[1, 120, 5] = value
    rows = kernel(Case(query, key).arranged())
    assert torch.equal(rows[::2], clean[::2]), (value, where)
    assert rows[1, 0] == 130
    assert rows[1, 1:].isnan().all(), (value, where)
    # Queries before the bad one, and those that do not see the bad key, are not affected.
    for case in (
        Case(query[:, :120], key, is_causal=True),
        Case(query[:, :120], key, torch.arange(130) < 120),
        Case(query[:, :120], key, torch.where(torch.arange(130) < 120, 0.0, -math.inf)),
    ):
        check(kernel(case.arranged()), case)


@each_kernel
def test_logits_of_minus_infinity_have_no_probability(
    kernel: Callable[[AttentionCall], torch.Tensor],
) -> None:
    query, key = torch.ones(1, 2, 1), torch.tensor([[[1.0], [-math.inf], [2.0]]])
    case = Case(query, key, scale=1.0)
    check(kernel(case.arranged()), case)
    rows = kernel(Case(query, key[:, 1:2], scale=1.0).arranged())  # 0 / 0
    assert rows[0, 0] == 2
    assert rows[0, 1:].isnan().all()


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_which_values_of_a_mask_forbid(
    kernel: Callable[[AttentionCall], torch.Tensor], dtype: torch.dtype
) -> None:
    query, key = torch.zeros(1, 1, 4), torch.zeros(1, 6, 4)
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([-10000, 0.5, -9900, lowest, -math.inf, 0], dtype=dtype)
    (row,) = kernel(Case(query, key, mask).arranged()).tolist()
    assert row[2] == pytest.approx(row[1] / math.log(3))
    assert row[5:] == [0, 0.5]
    assert row[3] == pytest.approx(math.log(math.exp(0.5) + 1))
    for value in (math.nan, math.inf):
        mask[1] = value
        (row,) = kernel(Case(query, key, mask).arranged()).tolist()
        assert all(math.isnan(number) for number in row[1:])


@each_kernel
def test_masks_may_have_more_dimensions_and_heads(
    kernel: Callable[[AttentionCall], torch.Tensor],
) -> None:
    query, key, mask = torch.randn(1, 5, 8), torch.randn(1, 7, 8), torch.randn(2, 3, 5, 7)
    case = Case(query.expand(2, 3, 5, 8), key.expand(2, 3, 7, 8), mask)
    rows = kernel(Case(query, key, mask).arranged())
    check(rows, case)
    single = Case(query[0], key[0], mask[0, 0] > 0)
    check(kernel(single.arranged()), single)


def test_the_number_of_threads_makes_no_difference() -> None:
    query, key = torch.randn(2, 6, 700, 32), torch.randn(2, 3, 500, 32)
    mask, rows = torch.arange(500) % 5 > 0, []
    for number in (1, 2, 3, 7, 40):
        torch.set_num_threads(number)
        rows.append(summarize_attention(query, key, mask, is_causal=True, scale=None))
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_gradients_and_autocast_do_not_matter() -> None:
    query, key = torch.randn(2, 50, 8, requires_grad=True), torch.randn(2, 60, 8)
    case = Case(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = summarize_attention(query, key, None, is_causal=False, scale=None)
        plain = summarize_attention_with_torch(case.arranged())
    check(rows, case)
    check(plain, case)
    assert not rows.requires_grad
    assert not plain.requires_grad


def test_products_are_exact_whatever_programs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose setting a CPU does not heed."""
    settings, seen = torch.backends.cuda.matmul, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
            if "mm" in str(function):
                seen.append(settings.fp32_precision)
            return function(*args, **(kwargs or {}))

    as_on_a_gpu = lambda device: exact_products(torch.device("cuda"))  # noqa: E731
    monkeypatch.setattr(attention_torch, "exact_products", as_on_a_gpu)
    call = Case(torch.randn(2, 50, 8), torch.randn(2, 60, 8)).arranged()

    def check_products() -> None:
        seen.clear()
        with Watch():
            summarize_attention_with_torch(call)
        assert seen
        assert set(seen) == {"ieee"}
        assert settings.fp32_precision == "tf32"

    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            check_products()
            assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = "tf32"  # the newer way
        check_products()
    finally:
        settings.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_calls_that_need_no_arrangement() -> None:
    """Most need none; the rows are the same as after it."""
    fused = torch.randn(2, 70, 8 * 16, requires_grad=True).unflatten(-1, (8, 16)).transpose(1, 2)
    negated = torch.complex(torch.randn(2, 4, 70, 16), torch.randn(2, 4, 70, 16)).conj().imag
    assert negated.is_neg()
    for query, key in (
        (fused[:, :4], fused[:, 4:]),
        (fused[:, :4], fused[:, 4:6, :33]),
        (fused[:, :4].bfloat16(), fused[:, 4:].bfloat16()),
        (negated, fused[:, :4]),
        (fused[:, :4, :0], fused[:, 4:]),
        (fused[:1, :4], fused[:, 4:]),
    ):
        for scale in (None, 0.3):
            rows = summarize_attention(query, key, None, is_causal=True, scale=scale)
            assert not rows.requires_grad
            assert torch.equal(rows, on_host(arrange(query, key, None, True, scale, 1)))
            if query.shape[2]:
                check(rows, Case(query, key, is_causal=True, scale=scale))
    with pytest.raises(ValueError, match="numbers of heads"):
        summarize_attention(fused[:, :4], fused[:, :3], None, is_causal=True, scale=None)


def test_statistics_are_chosen() -> None:
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    rows = summarize_attention(query, key, None, is_causal=True, scale=None)
    for names in ("entropy", "max_logit", "sink_mass,entropy,count"):
        for pooled in (False, True):
            joined = torch.cat([rows[:, :-1].sum(0), rows[:, -1:].amax(0)])[None]
            want = [
                row[index]
                for row in (joined if pooled else rows)
                for name in names.split(",")
                for index in (0, ATTENTION_COLUMNS.index(name))
            ]
            got = operators.summarize_attention(query, key, None, True, None, None, pooled, names)
            assert got.tolist() == torch.stack(want).tolist()


def test_views_are_not_copied() -> None:
    query = torch.randn(2, 30, 4, 16).transpose(1, 2)
    key = torch.randn(2, 1, 30, 16).expand(2, 2, 30, 16)
    mask = torch.randn(30, 30)
    call = arrange(query, key, mask, False, None, 3)
    assert call.query.data_ptr() == query.data_ptr()
    assert call.key.data_ptr() == key.data_ptr()
    assert call.mask is not None
    assert call.mask.data_ptr() == mask.data_ptr()
    assert call.mask.shape == (2, 4, 10, 30)


def test_modified_logits() -> None:
    query, key = torch.randn(2, 4, 90, 16), torch.randn(2, 2, 600, 16)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01])
    ends = torch.tensor([600, 70])

    def modify(
        scores: torch.Tensor,
        batch: torch.Tensor,
        head: torch.Tensor,
        query_index: torch.Tensor,
        key_index: torch.Tensor,
    ) -> torch.Tensor:
        biased = scores + slopes[head] * (key_index - query_index)
        allowed = (key_index <= query_index + 30) & (key_index < ends[batch])
        return torch.where(allowed, biased, -math.inf)

    call = arrange(query, key, None, False, None, 2)
    rows = summarize_attention_with_torch(call, modify)
    index = torch.arange(90)[:, None], torch.arange(600)
    zeros = torch.zeros(2, 4, 90, 600)
    of = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    check(rows, Case(query, key, modify(zeros, *of, *index), query_stride=2))
    # A mask and causality restrict further.
    call = arrange(query, key, index[1] % 2 == 0, True, None, 1)
    rows = summarize_attention_with_torch(call, modify)
    mask = modify(zeros, *of, *index).masked_fill(index[1] % 2 == 1, -math.inf)
    check(rows, Case(query, key, mask, is_causal=True))


def test_what_does_not_fit_together() -> None:
    x = torch.randn(2, 6, 5, 8)
    with pytest.raises(ValueError, match="numbers of heads"):
        arrange(x, x[:, :4], None, False, None, 1)
    with pytest.raises(ValueError, match="numbers of heads"):
        arrange(x, x, torch.randn(3, 5, 5), False, None, 1)
    with pytest.raises(ValueError, match="last dimensions differ"):
        arrange(x, x[..., :4], None, False, None, 1)
    with pytest.raises(ValueError, match="query_stride: must be at least 1"):
        arrange(x, x, None, False, None, 0)
    with pytest.raises(TypeError, match="mask: must be boolean or floating-point"):
        arrange(x, x, torch.ones(5, 5, dtype=torch.int64), False, None, 1)
    with pytest.raises(RuntimeError, match="expand"):
        arrange(x, x, torch.ones(5, 4), False, None, 1)


def test_memory_grows_with_the_length_only() -> None:
    """Of a length whose matrix of logits takes 268 MB."""
    length = 1 << 13
    x, mask = torch.randn(1, length, 32).bfloat16(), torch.zeros(length)

    def measure(length: int, is_causal: bool) -> None:
        call = x[:, :length], x[:, :length], mask[:length]
        summarize_attention(*call, is_causal=is_causal, scale=None)

    for is_causal in (False, True):
        assert growth_of_a_child(measure, 64, length, is_causal) < 40_000
    query = torch.randn(1, length, 8)
    call = arrange(query, query, None, True, None, 16)
    assert peak_memory(lambda: summarize_attention_with_torch(call)) < 40_000_000


def growth_of_a_child(
    measure: Callable[[int, bool], None], before: int, length: int, is_causal: bool
) -> int:
    """KiB by which a forked process grows after a first call, which loads what it needs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            sizes = []
            for size in (before, length):
                measure(size, is_causal)
                sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            os.write(writing, str(sizes[1] - sizes[0]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        grown = int(pipe.read())
    os.waitpid(child, 0)
    return grown


def test_triton_kernel_in_the_interpreter() -> None:
    check_in_the_interpreter("tests.test_attention_kernels")


def varied(dtype: torch.dtype) -> list[Case]:
    """Few calls that take every path of a kernel for a GPU."""
    cases = []
    for index, kind in enumerate(MASKS):
        mask = None if kind == "none" else make_mask(kind, (2,), 4, 40, 70)
        query = sample(dtype, 2, 4, 40, 24, deviation=2.0, is_transposed=index % 2 == 0)
        key = sample(dtype, 1, 2, 70, 24, deviation=2.0)
        cases += [Case(query, key, mask), Case(query, key, mask, True, 0.3, index % 3 + 1)]
    wide = sample(dtype, 1, 5, 300), sample(dtype, 1, 7, 300)
    return [*cases, Case(*wide), Case(wide[0][:, :1, :80], wide[1][:, :1, :80])]


def check_triton() -> None:
    from tmm.kernels.attention.attention_triton import summarize_attention_with_triton

    torch.manual_seed(0)
    # The interpreter takes a second for each, and multiplies the bits of bfloat16.
    cases = [case for i, case in enumerate(varied(torch.float32)) if i % 4 in (0, 3) or i == 18]
    for case in [*cases, *varied(torch.float16)[::5], *varied(torch.float64)[:1]]:
        check(summarize_attention_with_triton(case.arranged()), case)
    for value in (math.nan, math.inf):
        query, key = sample(torch.float32, 3, 70, 16), sample(torch.float32, 3, 70, 16)
        query[1, 50, 3] = value
        rows = summarize_attention_with_triton(Case(query, key).arranged())
        check(rows[::2], Case(query[::2], key[::2]))
        assert rows[1, 1:].isnan().all()
    one = torch.zeros(1, 0, 8)
    rows = summarize_attention_with_triton(Case(one, one).arranged())
    assert rows.tolist() == [[0.0] * 6 + [-math.inf]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for case in varied(dtype):
        mask = None if case.mask is None else case.mask.cuda()
        on_gpu = case._replace(query=case.query.cuda(), key=case.key.cuda(), mask=mask)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rows = summarize_attention(
                *on_gpu[:3],
                is_causal=case.is_causal,
                scale=case.scale,
                query_stride=case.query_stride,
            )
            plain = summarize_attention_with_torch(on_gpu.arranged())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(rows.cpu(), case)
        check(plain.cpu(), case)
