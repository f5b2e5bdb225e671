"""The row of a piece of a tensor, or of a pair of them, by one program of a GPU."""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

from tmm.kernels.optional_triton import tl, triton


@triton.jit
def _load(data, remaining, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One block; zeros beyond the end. Only loads without a mask are vectorized."""
    lanes = tl.arange(0, BLOCK)
    if remaining >= BLOCK:
        x = tl.load(data + lanes)
    else:
        x = tl.load(data + lanes, mask=lanes < remaining, other=0.0)
    return x.to(WIDE)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def reduce_chunk(
    data,
    other,
    length,
    row,
    WIDE: tl.constexpr,  # noqa: N803 -- Triton's way of writing constants
    FOURTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    IS_PAIR: tl.constexpr,  # noqa: N803
    BOTH: tl.constexpr,  # noqa: N803
):
    """Write the row of ``length`` elements at ``data``, with all columns.

    Of a pair the elements are the differences from those at ``other``, and its own columns are
    zeros unless ``BOTH`` are asked for. Deviations are taken from the mean of the first block, and
    the power sums moved to the mean of all in float64.
    """
    lanes = tl.arange(0, BLOCK)

    infinity = float("inf")
    if FOURTH:  # fourth powers leave the range of float32 soon, and the centre must be nearer
        total = tl.zeros([BLOCK], WIDE)
        lowest = tl.full([BLOCK], infinity, WIDE)
        highest = tl.full([BLOCK], -infinity, WIDE)
        for offset in range(0, length, BLOCK):
            x = _load(data + offset, length - offset, WIDE, BLOCK)
            if IS_PAIR:
                x -= _load(other + offset, length - offset, WIDE, BLOCK)
            inside = offset + lanes < length
            total += x
            lowest = tl.minimum(lowest, tl.where(inside, x, infinity))
            highest = tl.maximum(highest, tl.where(inside, x, -infinity))
        centre = _finite(tl.sum(total, 0) / length.to(WIDE))
        unit = tl.maximum(tl.max(highest, 0) - centre, centre - tl.min(lowest, 0))
        unit = tl.where(unit > 0.0, unit, 1.0)
    else:
        sample = _load(data, length, WIDE, BLOCK)
        if IS_PAIR:
            sample -= _load(other, length, WIDE, BLOCK)
        centre = _finite(tl.sum(sample, 0) / tl.minimum(length, BLOCK).to(WIDE))
        unit = centre * 0.0 + 1.0

    plain = tl.zeros([BLOCK], WIDE)
    squares = tl.zeros([BLOCK], WIDE)
    absolute = tl.zeros([BLOCK], WIDE)
    power1 = tl.zeros([BLOCK], WIDE)
    power2 = tl.zeros([BLOCK], WIDE)
    power3 = tl.zeros([BLOCK], WIDE)
    power4 = tl.zeros([BLOCK], WIDE)
    lowest = tl.full([BLOCK], infinity, WIDE)
    highest = tl.full([BLOCK], -infinity, WIDE)
    zeros = tl.zeros([BLOCK], tl.int32)
    nans = tl.zeros([BLOCK], tl.int32)
    infinities = tl.zeros([BLOCK], tl.int32)
    own_squares = tl.zeros([BLOCK], WIDE)
    other_squares = tl.zeros([BLOCK], WIDE)
    products = tl.zeros([BLOCK], WIDE)
    for offset in range(0, length, BLOCK):
        x = _load(data + offset, length - offset, WIDE, BLOCK)
        if IS_PAIR:
            subtracted = _load(other + offset, length - offset, WIDE, BLOCK)
            if BOTH:
                own_squares += x * x
                other_squares += subtracted * subtracted
                products += x * subtracted
            x -= subtracted
        inside = offset + lanes < length
        magnitude = tl.abs(x)
        deviation = tl.where(inside, x - centre, 0.0)
        plain += x
        squares += x * x
        absolute += magnitude
        if FOURTH:
            deviation = deviation / unit
            power3 += deviation * deviation * deviation
            power4 += (deviation * deviation) * (deviation * deviation)
        power1 += deviation
        power2 += deviation * deviation
        lowest = tl.minimum(lowest, tl.where(inside, x, infinity))
        highest = tl.maximum(highest, tl.where(inside, x, -infinity))
        zeros += (inside & (x == 0.0)).to(tl.int32)
        nans += (x != x).to(tl.int32)
        infinities += (magnitude == infinity).to(tl.int32)

    count = length.to(tl.float64)
    mean1 = tl.sum(power1, 0).to(tl.float64) / count
    mean2 = tl.sum(power2, 0).to(tl.float64) / count
    scale = unit.to(tl.float64)
    second = mean2 - mean1 * mean1
    # A constant chunk: what is left is the rounding of its centre.
    constant = (second <= 1e-5 * mean2) & (mean2 < infinity)
    second = tl.where(constant, 0.0, second)
    finite = tl.abs(mean1) < infinity
    mean = centre.to(tl.float64) + tl.where(finite, mean1, float("nan")) * scale
    moment3 = count * 0.0
    moment4 = count * 0.0
    if FOURTH:
        mean3 = tl.sum(power3, 0).to(tl.float64) / count
        mean4 = tl.sum(power4, 0).to(tl.float64) / count
        square = mean1 * mean1
        third = mean3 - 3.0 * mean1 * mean2 + 2.0 * square * mean1
        fourth = mean4 - 4.0 * mean1 * mean3 + 6.0 * square * mean2 - 3.0 * square * square
        cube = scale * scale * scale
        moment3 = tl.where(constant, 0.0, count * third * cube)
        moment4 = tl.where(constant, 0.0, count * fourth * cube * scale)

    # Whether a minimum carries NaN depends on the device, so that it is put in here.
    nan_count = tl.sum(nans, 0)
    minimum = tl.where(nan_count > 0, float("nan"), tl.min(lowest, 0).to(tl.float64))
    maximum = tl.where(nan_count > 0, float("nan"), tl.max(highest, 0).to(tl.float64))
    absmax = tl.maximum(tl.abs(minimum), tl.abs(maximum))
    absmax = tl.where(nan_count > 0, float("nan"), absmax)
    tl.store(row, count)
    tl.store(row + 1, tl.sum(plain, 0).to(tl.float64))
    tl.store(row + 2, tl.sum(squares, 0).to(tl.float64))
    tl.store(row + 3, tl.sum(absolute, 0).to(tl.float64))
    tl.store(row + 4, mean)
    tl.store(row + 5, count * second * scale * scale)
    tl.store(row + 6, moment3)
    tl.store(row + 7, moment4)
    tl.store(row + 8, absmax)
    tl.store(row + 9, minimum)
    tl.store(row + 10, maximum)
    tl.store(row + 11, tl.sum(zeros, 0).to(tl.float64))
    tl.store(row + 12, nan_count.to(tl.float64))
    tl.store(row + 13, tl.sum(infinities, 0).to(tl.float64))
    if IS_PAIR:
        tl.store(row + 14, tl.sum(other_squares, 0).to(tl.float64))
        tl.store(row + 15, tl.sum(own_squares, 0).to(tl.float64))
        tl.store(row + 16, tl.sum(products, 0).to(tl.float64))


@triton.jit(do_not_specialize=["chunks"])
def merge_chunks(
    begins,
    elements,
    chunks,
    rows,
    merged,
    IS_STACKED: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    FOURTH: tl.constexpr,  # noqa: N803
    MOMENTS: tl.constexpr,  # noqa: N803
    IS_PAIR: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Write the row of one tensor, joined from those of its chunks, in float64.

    Moments as in ``tmm.kernels.summarize.group.merge_rows``. Sums are added up in one order, so
    that they are the same bits each time.
    """
    tensor = tl.program_id(0).to(tl.int64)
    if IS_STACKED:
        begin = tensor * chunks
        number = chunks
    else:
        begin = tl.load(begins + tensor)
        number = ((tl.load(elements + tensor) + CHUNK - 1) // CHUNK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    own = rows + (begin + lanes) * WIDTH
    row = merged + tensor * WIDTH

    infinity = float("inf")
    count = tl.zeros([BLOCK], tl.float64)
    plain = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    absolute = tl.zeros([BLOCK], tl.float64)
    weighted = tl.zeros([BLOCK], tl.float64)
    lowest = tl.full([BLOCK], infinity, tl.float64)
    highest = tl.full([BLOCK], -infinity, tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    nans = tl.zeros([BLOCK], tl.float64)
    infinities = tl.zeros([BLOCK], tl.float64)
    other_squares = tl.zeros([BLOCK], tl.float64)
    own_squares = tl.zeros([BLOCK], tl.float64)
    products = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, number, BLOCK):
        inside = offset + lanes < number
        chunk = own + offset * WIDTH
        counted = tl.load(chunk, mask=inside, other=0.0)
        count += counted
        plain += tl.load(chunk + 1, mask=inside, other=0.0)
        squares += tl.load(chunk + 2, mask=inside, other=0.0)
        absolute += tl.load(chunk + 3, mask=inside, other=0.0)
        weighted += counted * tl.load(chunk + 4, mask=inside, other=0.0)
        # Those of chunks with NaN are NaN, and decide nothing here.
        least = tl.load(chunk + 9, mask=inside, other=infinity)
        lowest = tl.where(least < lowest, least, lowest)
        largest = tl.load(chunk + 10, mask=inside, other=-infinity)
        highest = tl.where(largest > highest, largest, highest)
        zeros += tl.load(chunk + 11, mask=inside, other=0.0)
        nans += tl.load(chunk + 12, mask=inside, other=0.0)
        infinities += tl.load(chunk + 13, mask=inside, other=0.0)
        if IS_PAIR:
            other_squares += tl.load(chunk + 14, mask=inside, other=0.0)
            own_squares += tl.load(chunk + 15, mask=inside, other=0.0)
            products += tl.load(chunk + 16, mask=inside, other=0.0)

    total = tl.sum(count, 0)
    mean = tl.sum(weighted, 0) / tl.maximum(total, 1.0)
    second = tl.zeros([BLOCK], tl.float64)
    third = tl.zeros([BLOCK], tl.float64)
    fourth = tl.zeros([BLOCK], tl.float64)
    if MOMENTS:
        for offset in range(0, number, BLOCK):
            inside = offset + lanes < number
            chunk = own + offset * WIDTH
            counted = tl.load(chunk, mask=inside, other=0.0)
            delta = tl.where(inside, tl.load(chunk + 4, mask=inside, other=0.0) - mean, 0.0)
            square = delta * delta
            moment2 = tl.load(chunk + 5, mask=inside, other=0.0)
            second += moment2 + counted * square
            if FOURTH:
                moment3 = tl.load(chunk + 6, mask=inside, other=0.0)
                moment4 = tl.load(chunk + 7, mask=inside, other=0.0)
                third += moment3 + 3.0 * delta * moment2 + counted * delta * square
                fourth += moment4 + 4.0 * delta * moment3
                fourth += 6.0 * square * moment2 + counted * square * square

    nan_count = tl.sum(nans, 0)
    minimum = tl.min(lowest, 0)
    maximum = tl.max(highest, 0)
    absmax = tl.where(total > 0, tl.maximum(tl.abs(minimum), tl.abs(maximum)), 0.0)
    undefined = float("nan")
    tl.store(row, total)
    tl.store(row + 1, tl.sum(plain, 0))
    tl.store(row + 2, tl.sum(squares, 0))
    tl.store(row + 3, tl.sum(absolute, 0))
    tl.store(row + 4, mean)
    tl.store(row + 5, tl.sum(second, 0))
    tl.store(row + 6, tl.sum(third, 0))
    tl.store(row + 7, tl.sum(fourth, 0))
    tl.store(row + 8, tl.where(nan_count > 0, undefined, absmax))
    tl.store(row + 9, tl.where(nan_count > 0, undefined, minimum))
    tl.store(row + 10, tl.where(nan_count > 0, undefined, maximum))
    tl.store(row + 11, tl.sum(zeros, 0))
    tl.store(row + 12, nan_count)
    tl.store(row + 13, tl.sum(infinities, 0))
    if IS_PAIR:
        tl.store(row + 14, tl.sum(other_squares, 0))
        tl.store(row + 15, tl.sum(own_squares, 0))
        tl.store(row + 16, tl.sum(products, 0))
