// The operator tmm::merge of a CPU: rows of partial sums become the row of a tensor, for all tensors
// of a graph. Compiled together with summarize/host.cpp and summarize/host_operator.cpp.

namespace {

// In the order of PARTIALS in tmm/kernels/fused/row_partials.py.
enum Partial : int64_t {
  CENTRE, UNIT, POWER1, POWER2, POWER3, POWER4, PLAIN_SUM, SQUARES, ABSOLUTES, LARGEST, LEAST,
  GREATEST, ZEROS, NANS, INFINITIES, SPREAD, PARTIALS
};

// The partials of the rows of a tensor, as tmm/kernels/fused/row_partials.py describes them.
template <class Scalar>
struct Given {
  const Scalar* of[PARTIALS] = {};  // null for what there is not
  int64_t rows = 0;
  double length = 0;

  double sum(Partial partial) const {
    double total = 0;
    const Scalar* values = of[partial];
#pragma omp simd reduction(+ : total)
    for (int64_t row = 0; row < rows; row++) total += values[row];
    return total;
  }

  // NaN where there is one.
  double extreme(Partial partial, bool greatest) const {
    double found = of[partial][0];
    for (int64_t row = 1; row < rows; row++) {
      const double value = of[partial][row];
      if (value != value || (greatest ? value > found : value < found)) found = value;
      if (found != found) return found;
    }
    return found;
  }
};

// Mean deviation, and mean powers of the deviation from the row's mean.
struct Moments {
  double mean, second, third, fourth;
};

template <class Scalar>
Moments moments_of(const Given<Scalar>& given, int64_t row) {
  const double unit = given.of[UNIT] ? given.of[UNIT][row] : 1, square = unit * unit;
  const auto power = [&](Partial partial, double scale) {
    return given.of[partial] ? given.of[partial][row] * scale / given.length : 0;
  };
  const double one = power(POWER1, unit), two = power(POWER2, square) + power(SPREAD, 1);
  const double three = power(POWER3, square * unit), four = power(POWER4, square * square);
  Moments moments;
  moments.mean = given.of[CENTRE][row] + one;
  moments.second = two - one * one;
  if (moments.second < 0) moments.second = 0;
  // A constant row: what is left is the rounding of its centre.
  if (given.of[POWER1] && moments.second <= 1e-5 * two && std::isfinite(two)) moments.second = 0;
  if (given.of[SPREAD] && moments.second <= 0x1p-35 * moments.mean * moments.mean) moments.second = 0;
  moments.third = three - 3 * one * two + 2 * one * one * one;
  moments.fourth = four - 4 * one * three + 6 * one * one * two - 3 * one * one * one * one;
  if (moments.second == 0) moments.third = moments.fourth = 0;
  return moments;
}

// Rows of equal counts, by Pebay 2008, eq. 2.1; writes what follows from moments.
template <class Scalar>
void merge_moments(const Given<Scalar>& given, Row& row) {
  const int64_t rows = given.rows;
  const double length = given.length;
  double means = 0, squares = 0;
  bool are_finite = true;
  for (int64_t index = 0; index < rows; index++) {
    const Moments own = moments_of(given, index);
    are_finite &= std::isfinite(own.mean) && std::isfinite(own.second);
    means += own.mean;
    squares += own.second + own.mean * own.mean;
  }
  const double mean = means / rows;
  double second = 0, third = 0, fourth = 0;
  for (int64_t index = 0; index < rows; index++) {
    const Moments own = moments_of(given, index);
    const double delta = own.mean - mean, square = delta * delta;
    second += own.second + square;
    third += own.third + 3 * delta * own.second + delta * square;
    fourth += own.fourth + 4 * delta * own.third + 6 * square * own.second + square * square;
  }
  row.sum = std::isfinite(means) ? length * means : length * given.sum(CENTRE);
  if (!given.of[SQUARES]) {
    row.sum_squares = length * squares;
    if (!are_finite) row.sum_squares = std::isnan(row.absmax) ? UNDEFINED : INFINITE;
  }
  row.mean = std::isfinite(mean) ? mean : UNDEFINED;
  row.moment2 = length * second;
  row.moment3 = length * third;
  row.moment4 = length * fourth;
}

template <class Scalar>
Row merge_rows(const Given<Scalar>& given) {
  Row row;
  row.count = given.length * given.rows;
  if (given.of[PLAIN_SUM]) row.sum = given.sum(PLAIN_SUM);
  if (given.of[SQUARES]) row.sum_squares = given.sum(SQUARES);
  if (given.of[ABSOLUTES]) row.sum_absolute = given.sum(ABSOLUTES);
  if (given.of[LARGEST]) row.absmax = given.extreme(LARGEST, true);
  if (given.of[LEAST]) row.minimum = given.extreme(LEAST, false);
  if (given.of[GREATEST]) row.maximum = given.extreme(GREATEST, true);
  if (given.of[ZEROS]) row.zeros = given.sum(ZEROS);
  if (given.of[NANS]) row.nans = given.sum(NANS);
  if (given.of[INFINITIES]) row.infinities = given.sum(INFINITIES);
  if (given.of[CENTRE]) merge_moments(given, row);
  return row;
}

// Reads the numbers of a layout, one after the other.
class Layout {
 public:
  explicit Layout(const std::vector<int64_t>& numbers) : numbers_(numbers) {}

  bool is_over() const { return at_ == numbers_.size(); }

  int64_t next(int64_t below) {
    STD_TORCH_CHECK(at_ < numbers_.size(), "layout: it ends too early");
    const int64_t number = numbers_[at_++];
    STD_TORCH_CHECK(number >= 0 && number < below, "layout: there is no ", number);
    return number;
  }

  std::vector<int64_t> list(int64_t below) {
    std::vector<int64_t> found(next(below + 1));
    for (int64_t& number : found) number = next(below);
    return found;
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

constexpr int64_t ANY = std::numeric_limits<int64_t>::max();

template <class Scalar>
Row row_of_partials(const Tensor& tensor, int64_t length, const std::vector<int64_t>& partials) {
  Given<Scalar> given;
  given.rows = tensor.size(1);
  given.length = length;
  const Scalar* data = static_cast<const Scalar*>(tensor.const_data_ptr());
  for (size_t place = 0; place < partials.size(); place++)
    given.of[partials[place]] = data + place * given.rows;
  return merge_rows(given);
}

Tensor merge_on_cpu(const std::vector<Tensor>& parts, const std::vector<int64_t>& layout) {
  constexpr int64_t WIDTH_OF_ROW = sizeof(Row) / sizeof(double);
  std::vector<double> found;
  Layout numbers(layout);
  for (const Tensor& part : parts) {
    const int64_t length = numbers.next(ANY);
    STD_TORCH_CHECK(length > 0, "layout: rows have no elements");
    const Tensor tensor = part.is_contiguous() ? part : torch::stable::contiguous(part);
    const std::vector<int64_t> partials = numbers.list(PARTIALS);
    const std::vector<int64_t> columns = numbers.list(WIDTH_OF_ROW);
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == int64_t(partials.size()) &&
                        tensor.size(1) > 0,
                    "parts: not ", partials.size(), " partials");
    if (drops_rows) {
      found.insert(found.end(), columns.size(), UNDEFINED);
      continue;
    }
    const bool is_wide = tensor.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(is_wide || tensor.scalar_type() == ScalarType::Float,
                    "parts: partials are neither float64 nor float32");
    const Row row = is_wide ? row_of_partials<double>(tensor, length, partials)
                            : row_of_partials<float>(tensor, length, partials);
    double all[WIDTH_OF_ROW];
    std::memcpy(all, &row, sizeof(all));
    for (const int64_t column : columns) found.push_back(all[column]);
  }
  STD_TORCH_CHECK(numbers.is_over(), "layout: there are more of them than parts");
  const Tensor result = new_row(found.size());
  std::copy(found.begin(), found.end(), numbers_of(result));
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(tmm, CPU, library) { library.impl("merge", TORCH_BOX(&merge_on_cpu)); }

}  // namespace
