// Rows of partial sums of many dense tensors, or of their differences from as many others, on a
// CPU, each element read once.
//
// A tensor is cut into chunks, which threads share, and a chunk into rows that fit the first-level
// cache. Most rows are reduced in the accumulation type, by deviations from the mean of a sample of
// theirs; sums about another centre follow without cancellation. What few columns need takes a
// second pass over the row. Where that would overflow or underflow, and where a value is not
// finite, a row is reduced in double. Compiled together with vectors.cpp.

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t ROW = BYTES < 32 ? 4096 : 8192;  // elements: keeps rounding small
constexpr int64_t CHUNK = 32768;                  // elements that one thread takes at a time
constexpr int64_t SAMPLE = 256;  // elements whose mean is the centre of a row's deviations
constexpr int UNROLL = 4;        // vectors at a time: one chain of additions has a long latency
constexpr int FEW = 2;           // chains where there are many sums, as registers are few
constexpr int64_t CHAIN = 32;    // additions one after the other: each one rounds
constexpr int64_t LINE = 64;     // bytes that memory hands over at a time
constexpr int64_t AHEAD = 4096;  // bytes: processors themselves look ahead within a page
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double UNDEFINED = std::numeric_limits<double>::quiet_NaN();

// Elements that are read at a time.
template <class Scalar>
constexpr int64_t STEP = UNROLL * WIDTH<Scalar>;

// The arithmetic that elements of a type are reduced in.
template <class Element>
struct Accumulation {
  typedef float type;
};
template <>
struct Accumulation<double> {
  typedef double type;
};

// Elements of a tensor in the arithmetic that they are reduced in.
template <class Element>
struct Values {
  typedef typename Accumulation<Element>::type Scalar;
  const Element* from;

  Values after(int64_t elements) const { return {from + elements}; }
  Vector<Scalar> at(int64_t start) const { return load(from + start); }
  // Ask the memory for what comes later.
  void prefetch(int64_t start) const {
    __builtin_prefetch(reinterpret_cast<const char*>(from + start) + AHEAD);
  }
  // The first of them; the rest are zeros.
  Vector<Scalar> some(int64_t start, int64_t count) const {
    Element piece[WIDTH<Scalar>] = {};
    std::memcpy(piece, from + start, count * sizeof(Element));
    return load(piece);
  }
};

// Elements of a tensor less those of another one.
template <class Element>
struct Differences {
  typedef typename Accumulation<Element>::type Scalar;
  Values<Element> own, other;

  Differences after(int64_t elements) const { return {own.after(elements), other.after(elements)}; }
  Vector<Scalar> at(int64_t start) const { return own.at(start) - other.at(start); }
  void prefetch(int64_t start) const {
    own.prefetch(start);
    other.prefetch(start);
  }
  Vector<Scalar> some(int64_t start, int64_t count) const {
    return own.some(start, count) - other.some(start, count);
  }
};

// The columns in the order of COLUMN_ORDER in tmm/core/metrics.py. While rows are being merged the
// extremes are those of the other values than NaN.
struct Row {
  double count = 0, sum = 0, sum_squares = 0, sum_absolute = 0;
  double mean = 0, moment2 = 0, moment3 = 0, moment4 = 0;
  double absmax = 0, minimum = INFINITE, maximum = -INFINITE;
  double zeros = 0, nans = 0, infinities = 0;
  double reference_sum_squares = 0, own_sum_squares = 0, dot = 0;
};

// What the asked columns need besides the sum and the moments up to the second.
struct Needs {
  bool zeros = false;
  bool absmax = false;
  bool extremes = false;  // minimum, maximum and sum_absolute, which absmax follows from
  bool higher_moments = false;
  bool pair = false;  // what is of the two tensors of a difference, and not of the difference
};

Needs needs_of(int64_t columns, const int64_t* order) {
  Needs needs;
  for (int64_t column = 0; column < columns; column++) {
    const int64_t offset = order[column] * sizeof(double);
    const auto is = [offset](size_t first, size_t last) {
      return offset >= int64_t(first) && offset <= int64_t(last);
    };
    needs.higher_moments |= is(offsetof(Row, moment3), offsetof(Row, moment4));
    needs.extremes |= is(offsetof(Row, sum_absolute), offsetof(Row, sum_absolute)) ||
                      is(offsetof(Row, minimum), offsetof(Row, maximum));
    needs.absmax |= is(offsetof(Row, absmax), offsetof(Row, absmax));
    needs.zeros |= is(offsetof(Row, zeros), offsetof(Row, zeros));
    needs.pair |= is(offsetof(Row, reference_sum_squares), offsetof(Row, dot));
  }
  needs.extremes |= needs.higher_moments;  // which are scaled by them
  return needs;
}

// Moments by Pebay 2008, "Formulas for robust, one-pass parallel computation of covariances and
// arbitrary-order statistical moments", eq. 2.1.
void merge(Row& left, const Row& right) {
  if (right.count == 0) return;
  if (left.count == 0) {  // a difference to nothing, whose square may overflow, has no weight
    left = right;
    return;
  }
  const double count = left.count + right.count;
  const double delta = right.mean - left.mean, square = delta * delta;
  const double b = right.count / count, a = 1 - b, cross = left.count * b;
  left.moment4 += right.moment4 + square * square * cross * (a * a - a * b + b * b) +
                  6 * square * (a * a * right.moment2 + b * b * left.moment2) +
                  4 * delta * (a * right.moment3 - b * left.moment3);
  left.moment3 += right.moment3 + square * delta * cross * (a - b) +
                  3 * delta * (a * right.moment2 - b * left.moment2);
  left.moment2 += right.moment2 + square * cross;
  left.mean += delta * b;
  left.count = count;
  left.sum += right.sum;
  left.sum_squares += right.sum_squares;
  left.sum_absolute += right.sum_absolute;
  if (right.absmax > left.absmax) left.absmax = right.absmax;
  if (right.minimum < left.minimum) left.minimum = right.minimum;
  if (right.maximum > left.maximum) left.maximum = right.maximum;
  left.zeros += right.zeros;
  left.nans += right.nans;
  left.infinities += right.infinities;
  left.reference_sum_squares += right.reference_sum_squares;
  left.own_sum_squares += right.own_sum_squares;
  left.dot += right.dot;
}

// All columns in double, by two passes; `length` is at most ROW.
template <class Source>
Row reduce_exactly(Source source, int64_t length) {
  typedef typename Source::Scalar Scalar;
  constexpr int64_t SIZE = WIDTH<Scalar>;
  double values[ROW];
  for (int64_t start = 0; start < length; start += SIZE) {
    const int64_t some = length - start < SIZE ? length - start : SIZE;
    const Vector<Scalar> loaded = source.some(start, some);
    for (int64_t i = 0; i < some; i++) values[start + i] = loaded[i];
  }
  double sum = 0, squares = 0, absolute = 0, minimum = INFINITE, maximum = -INFINITE;
  double zeros = 0, nans = 0, infinities = 0;
#pragma omp simd reduction(+ : sum, squares, absolute, zeros, nans, infinities) \
    reduction(min : minimum) reduction(max : maximum)
  for (int64_t i = 0; i < length; i++) {
    const double value = values[i], magnitude = value < 0 ? -value : value;
    sum += value;
    squares += value * value;
    absolute += magnitude;
    minimum = value < minimum ? value : minimum;
    maximum = value > maximum ? value : maximum;
    zeros += value == 0 ? 1.0 : 0.0;
    nans += value != value ? 1.0 : 0.0;
    infinities += magnitude == INFINITE ? 1.0 : 0.0;
  }
  Row row;
  row.count = length;
  row.sum = sum;
  row.sum_squares = squares;
  row.sum_absolute = absolute;
  row.absmax = -minimum > maximum ? -minimum : maximum;
  row.minimum = minimum;
  row.maximum = maximum;
  row.zeros = zeros;
  row.nans = nans;
  row.infinities = infinities;
  // A row of equal values has no deviations, not even rounded ones.
  row.mean = minimum == maximum && nans == 0 ? minimum : sum / length;
  if (!std::isfinite(row.mean)) row.mean = UNDEFINED;
  double second = 0, third = 0, fourth = 0;
  const double mean = row.mean;
#pragma omp simd reduction(+ : second, third, fourth)
  for (int64_t i = 0; i < length; i++) {
    const double deviation = values[i] - mean, square = deviation * deviation;
    second += square;
    third += square * deviation;
    fourth += square * square;
  }
  row.moment2 = second;
  row.moment3 = third;
  row.moment4 = fourth;
  return row;
}

// The sum of a few vectors, pair by pair.
template <class Scalar, int NUMBER>
Vector<Scalar> joined(const Vector<Scalar> (&parts)[NUMBER]) {
  static_assert(NUMBER == 2 || NUMBER == 4);
  if constexpr (NUMBER == 2) return parts[0] + parts[1];
  else return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The sum of a vector's values, in double, by several chains of additions.
template <class Scalar>
double sum_of(Vector<Scalar> values) {
  constexpr int CHAINS = WIDTH<Scalar> < 4 ? WIDTH<Scalar> : 4;
  double sums[CHAINS] = {};
  for (int lane = 0; lane < WIDTH<Scalar>; lane += CHAINS)
    for (int chain = 0; chain < CHAINS; chain++) sums[chain] += values[lane + chain];
  double total = 0;
  for (int chain = 0; chain < CHAINS; chain++) total += sums[chain];
  return total;
}

// Add the third and fourth moments to a row that has the others, in a second pass. Deviations are
// divided by a power of two above the largest: their powers neither overflow nor vanish.
template <class Source>
void add_higher_moments(Source source, int64_t length, Row& row) {
  typedef typename Source::Scalar Scalar;
  const double above = row.maximum - row.mean, below = row.mean - row.minimum;
  const int exponent = std::ilogb(above > below ? above : below) + 1;
  const Scalar centre = row.mean, scale = std::ldexp(1.0, -exponent);
  Vector<Scalar> sums[4] = {};
  for (int64_t block = 0; block < length; block += CHAIN * STEP<Scalar>) {
    const int64_t end = std::min(length, block + CHAIN * STEP<Scalar>);
    Vector<Scalar> ones[FEW] = {}, twos[FEW] = {}, threes[FEW] = {}, fours[FEW] = {};
    for (int64_t start = block; start < end; start += FEW * WIDTH<Scalar>)
      for (int part = 0; part < FEW; part++) {
        const Vector<Scalar> deviations =
            (source.at(start + part * WIDTH<Scalar>) - centre) * scale;
        const Vector<Scalar> squares = deviations * deviations;
        ones[part] += deviations;
        twos[part] += squares;
        threes[part] += squares * deviations;
        fours[part] += squares * squares;
      }
    sums[0] += joined<Scalar>(ones);
    sums[1] += joined<Scalar>(twos);
    sums[2] += joined<Scalar>(threes);
    sums[3] += joined<Scalar>(fours);
  }
  const double one = sum_of<Scalar>(sums[0]), two = sum_of<Scalar>(sums[1]);
  const double three = sum_of<Scalar>(sums[2]), four = sum_of<Scalar>(sums[3]);
  // The centre is the mean, rounded; these are the moments about the mean of the deviations.
  const double shift = one / length, square = shift * shift;
  row.moment3 = std::ldexp(three - 3 * shift * two + 2 * length * square * shift, 3 * exponent);
  row.moment4 = std::ldexp(
      four - 4 * shift * three + 6 * square * two - 3 * length * square * square, 4 * exponent);
}

// Whether all elements are equal; `length` is a multiple of the width of a vector.
template <class Source>
bool is_constant(Source source, int64_t length) {
  typedef typename Source::Scalar Scalar;
  const Vector<Scalar> first = Vector<Scalar>{} + source.at(0)[0];
  decltype(first == first) others = {};
  for (int64_t start = 0; start < length; start += WIDTH<Scalar>)
    others |= source.at(start) != first;
  for (int lane = 0; lane < WIDTH<Scalar>; lane++)
    if (others[lane]) return false;
  return true;
}

// The row of equal values, whose deviations are none, not even rounded ones.
Row constant_row(double value, int64_t length) {
  Row row;
  row.count = length;
  row.mean = row.minimum = row.maximum = value;
  row.absmax = value < 0 ? -value : value;
  row.sum = length * value;
  row.sum_squares = length * value * value;
  row.sum_absolute = length * row.absmax;
  row.zeros = value == 0 ? length : 0;
  return row;
}

// Below it squares vanish, so that their sum is not precise.
template <class Scalar>
constexpr double PRECISE = double(std::numeric_limits<Scalar>::min()) * ROW /
                           double(std::numeric_limits<Scalar>::epsilon());

// The needed columns but those of pairs, from one pass, and one more for higher moments; `length`
// is a multiple of STEP.
template <class Source, bool ZEROS, bool ABSMAX, bool EXTREMES>
Row reduce_quickly(Source source, int64_t length, bool higher_moments) {
  typedef typename Source::Scalar Scalar;
  typedef Vector<Scalar> Values;
  typedef decltype(Values{} == Values{}) Integers;
  constexpr Scalar HUGE_SCALAR = std::numeric_limits<Scalar>::infinity();
  constexpr auto SIGN = std::numeric_limits<std::decay_t<decltype(Integers{}[0])>>::min();

  const int64_t sample = length < SAMPLE ? length : SAMPLE;
  Values sums[UNROLL] = {};
  for (int64_t start = 0; start < sample; start += STEP<Scalar>)
    for (int part = 0; part < UNROLL; part++) sums[part] += source.at(start + part * WIDTH<Scalar>);
  Scalar centre = sum_of<Scalar>(joined<Scalar>(sums)) / sample;
  if (!std::isfinite(centre)) centre = 0;

  constexpr int CHAINS = EXTREMES ? FEW : UNROLL;
  Values all_shifts = {}, all_squares = {}, all_absolutes = {};
  Values lowest[FEW], highest[FEW];
  Integers largest[FEW] = {}, zeros = {};
  for (int part = 0; part < FEW; part++) {
    lowest[part] = Values{} + HUGE_SCALAR;
    highest[part] = Values{} - HUGE_SCALAR;
  }
  for (int64_t block = 0; block < length; block += CHAIN * CHAINS * WIDTH<Scalar>) {
    const int64_t end = std::min(length, block + CHAIN * CHAINS * WIDTH<Scalar>);
    Values shifts[CHAINS] = {}, squares[CHAINS] = {}, absolutes[CHAINS] = {};
    for (int64_t start = block; start < end; start += CHAINS * WIDTH<Scalar>)
      for (int part = 0; part < CHAINS; part++) {
        if (part * BYTES % LINE == 0) source.prefetch(start + part * WIDTH<Scalar>);
        const Values values = source.at(start + part * WIDTH<Scalar>);
        const Values deviations = values - centre;
        shifts[part] += deviations;
        squares[part] += deviations * deviations;
        if (ZEROS) zeros -= values == 0;
        if (ABSMAX) {  // magnitudes have the order of their bits, which take fewer instructions
          Integers bits;
          std::memcpy(&bits, &values, sizeof(bits));
          bits &= ~SIGN;
          largest[part % FEW] = bits > largest[part % FEW] ? bits : largest[part % FEW];
        }
        if (EXTREMES) {
          absolutes[part] += values < 0 ? -values : values;
          lowest[part] = values < lowest[part] ? values : lowest[part];
          highest[part] = values > highest[part] ? values : highest[part];
        }
      }
    all_shifts += joined<Scalar>(shifts);
    all_squares += joined<Scalar>(squares);
    all_absolutes += joined<Scalar>(absolutes);
  }
  const double shift = sum_of<Scalar>(all_shifts), square = sum_of<Scalar>(all_squares);
  Row row;
  if (ZEROS)
    for (int lane = 0; lane < WIDTH<Scalar>; lane++) row.zeros += zeros[lane];
  if (ABSMAX)
    for (int part = 0; part < FEW; part++) {
      Values sizes;
      std::memcpy(&sizes, &largest[part], sizeof(sizes));
      for (int lane = 0; lane < WIDTH<Scalar>; lane++)
        if (sizes[lane] > row.absmax) row.absmax = sizes[lane];
    }
  if (EXTREMES) {
    row.sum_absolute = sum_of<Scalar>(all_absolutes);
    for (int part = 0; part < FEW; part++)
      for (int lane = 0; lane < WIDTH<Scalar>; lane++) {
        if (lowest[part][lane] < row.minimum) row.minimum = lowest[part][lane];
        if (highest[part][lane] > row.maximum) row.maximum = highest[part][lane];
      }
    row.absmax = -row.minimum > row.maximum ? -row.minimum : row.maximum;
  }
  row.count = length;
  if (!std::isfinite(square) || (EXTREMES && !std::isfinite(row.sum_absolute)))
    return reduce_exactly(source, length);
  // The centre of equal values differs from them by its rounding at most.
  const double wide = centre, rounding = 64 * wide * std::numeric_limits<Scalar>::epsilon();
  if (square <= length * rounding * rounding && is_constant(source, length))
    return constant_row(source.at(0)[0], length);
  if (square < PRECISE<Scalar>) return reduce_exactly(source, length);
  const double mean = shift / length;
  row.mean = wide + mean;
  row.sum = length * wide + shift;
  row.moment2 = square - shift * mean;
  row.sum_squares = square + 2 * wide * shift + length * wide * wide;
  if (row.moment2 < 0) row.moment2 = 0;
  if (row.sum_squares < 0) row.sum_squares = 0;
  if (higher_moments) add_higher_moments(source, length, row);
  return row;
}

// Add the columns of pairs, in double.
template <class Element>
void add_pair_exactly(Differences<Element> source, int64_t length, Row& row) {
  constexpr int64_t SIZE = WIDTH<typename Values<Element>::Scalar>;
  for (int64_t start = 0; start < length; start += SIZE) {
    const int64_t some = length - start < SIZE ? length - start : SIZE;
    const auto own = source.own.some(start, some), other = source.other.some(start, some);
    for (int64_t i = 0; i < some; i++) {
      const double a = own[i], b = other[i];
      row.reference_sum_squares += b * b;
      row.own_sum_squares += a * a;
      row.dot += a * b;
    }
  }
}

// The same in a pass over a row that is in the first-level cache.
template <class Element>
void add_pair(Differences<Element> source, int64_t length, Row& row) {
  typedef typename Values<Element>::Scalar Scalar;
  const int64_t quick = length - length % STEP<Scalar>;
  Vector<Scalar> sums[3] = {};
  for (int64_t block = 0; block < quick; block += CHAIN * STEP<Scalar>) {
    const int64_t end = std::min(quick, block + CHAIN * STEP<Scalar>);
    Vector<Scalar> owns[FEW] = {}, others[FEW] = {}, products[FEW] = {};
    for (int64_t start = block; start < end; start += FEW * WIDTH<Scalar>)
      for (int part = 0; part < FEW; part++) {
        const Vector<Scalar> own = source.own.at(start + part * WIDTH<Scalar>);
        const Vector<Scalar> other = source.other.at(start + part * WIDTH<Scalar>);
        owns[part] += own * own;
        others[part] += other * other;
        products[part] += own * other;
      }
    sums[0] += joined<Scalar>(owns);
    sums[1] += joined<Scalar>(others);
    sums[2] += joined<Scalar>(products);
  }
  const double own = sum_of<Scalar>(sums[0]), other = sum_of<Scalar>(sums[1]);
  const double product = sum_of<Scalar>(sums[2]);
  const bool is_precise = std::isfinite(own) && std::isfinite(other) && own >= PRECISE<Scalar> &&
                          other >= PRECISE<Scalar>;
  if (!is_precise) return add_pair_exactly(source, length, row);
  row.reference_sum_squares += other;
  row.own_sum_squares += own;
  row.dot += product;
  if (quick < length) add_pair_exactly(source.after(quick), length - quick, row);
}

template <class Element>
void add_pair(Values<Element>, int64_t, Row&) {}  // it is of no pair

template <class Source, bool ZEROS, bool ABSMAX, bool EXTREMES>
Row reduce_chunk(Source source, int64_t length, Needs needs) {
  Row total;
  for (int64_t start = 0; start < length; start += ROW) {
    const int64_t size = length - start < ROW ? length - start : ROW;
    const int64_t quick = size - size % STEP<typename Source::Scalar>;
    const Source row = source.after(start);
    if (quick)
      merge(total, reduce_quickly<Source, ZEROS, ABSMAX, EXTREMES>(row, quick,
                                                                   needs.higher_moments));
    if (quick < size) merge(total, reduce_exactly(row.after(quick), size - quick));
    if (needs.pair) add_pair(row, size, total);
  }
  return total;
}

template <class Element>
Row reduce_chunk(Values<Element> source, int64_t length, Needs needs) {
  typedef Values<Element> Source;
  if (needs.extremes && needs.zeros)
    return reduce_chunk<Source, true, false, true>(source, length, needs);
  if (needs.extremes) return reduce_chunk<Source, false, false, true>(source, length, needs);
  if (needs.absmax || needs.zeros)
    return reduce_chunk<Source, true, true, false>(source, length, needs);
  return reduce_chunk<Source, false, false, false>(source, length, needs);
}

// Always all columns: reading two tensors takes longer, and compiling less.
template <class Element>
Row reduce_chunk(Differences<Element> source, int64_t length, Needs needs) {
  return reduce_chunk<Differences<Element>, true, false, true>(source, length, needs);
}

// Write the asked columns of a row per tensor; `others` is null, or what is subtracted of each.
template <class Element>
__attribute__((noinline)) void summarize(int64_t tensors, const int64_t* addresses,
                                         const int64_t* others, const int64_t* elements,
                                         int64_t columns, const int64_t* order, int64_t threads,
                                         double* result) {
  const Needs needs = needs_of(columns, order);
  std::vector<int64_t> first(tensors + 1, 0);  // number of the tensor's first chunk
  std::vector<int64_t> owner;
  for (int64_t tensor = 0; tensor < tensors; tensor++) {
    const int64_t chunks = (elements[tensor] + CHUNK - 1) / CHUNK;
    first[tensor + 1] = first[tensor] + chunks;
    owner.insert(owner.end(), chunks, tensor);
  }
  const int64_t chunks = first[tensors];
  std::vector<Row> rows(chunks);
  const auto reduce = [&](int64_t chunk) {
    const int64_t tensor = owner[chunk], start = (chunk - first[tensor]) * CHUNK;
    const int64_t rest = elements[tensor] - start, length = rest < CHUNK ? rest : CHUNK;
    const Values<Element> own{reinterpret_cast<const Element*>(addresses[tensor]) + start};
    if (others == nullptr) {
      rows[chunk] = reduce_chunk(own, length, needs);
      return;
    }
    const Values<Element> other{reinterpret_cast<const Element*>(others[tensor]) + start};
    rows[chunk] = reduce_chunk(Differences<Element>{own, other}, length, needs);
  };
  if (tensors == 1) {
    // Shared as other operators share a tensor: what a thread wrote may be in its core's cache.
#pragma omp parallel for schedule(static) num_threads(threads) if (chunks > 1 && threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) reduce(chunk);
  } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1 && threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) reduce(chunk);
  }
  for (int64_t tensor = 0; tensor < tensors; tensor++) {
    Row total;  // in the order of the chunks, so that threads make no difference
    for (int64_t chunk = first[tensor]; chunk < first[tensor + 1]; chunk++)
      merge(total, rows[chunk]);
    if (total.nans > 0) total.absmax = total.minimum = total.maximum = UNDEFINED;
    double all[sizeof(Row) / sizeof(double)];
    std::memcpy(all, &total, sizeof(all));
    for (int64_t column = 0; column < columns; column++)
      result[tensor * columns + column] = all[order[column]];
  }
}

}  // namespace

#define TMM_SUMMARIZE(NAME, ELEMENT)                                                            \
  extern "C" void NAME(int64_t tensors, const int64_t* addresses, const int64_t* others,        \
                       const int64_t* elements, int64_t columns, const int64_t* order,          \
                       int64_t threads, double* result) {                                       \
    summarize<ELEMENT>(tensors, addresses, others, elements, columns, order, threads, result);  \
  }

TMM_SUMMARIZE(summarize_float64, double)
TMM_SUMMARIZE(summarize_float32, float)
TMM_SUMMARIZE(summarize_float16, Float16)
TMM_SUMMARIZE(summarize_bfloat16, BFloat16)
