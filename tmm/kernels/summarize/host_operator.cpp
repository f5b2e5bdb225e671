// The operator tmm::summarize of a CPU, in C++: behind a large operation, when nothing of Python is
// in the caches, a call of an operator written in Python takes as long as most kernels do.
// Compiled together with host.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.13, errors lose their messages
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The columns of a row, as in COLUMN_ORDER in tmm/core/metrics.py.
constexpr std::array<std::string_view, sizeof(Row) / sizeof(double)> COLUMNS = {
    "count",   "sum",     "sum_squares", "sum_absolute",          "mean",
    "moment2", "moment3", "moment4",     "absmax",                "minimum",
    "maximum", "zeros",   "nans",        "infinities",            "reference_sum_squares",
    "own_sum_squares",    "dot"};

std::vector<int64_t> order_of(std::string_view columns) {
  std::vector<int64_t> order;
  while (true) {
    const size_t end = columns.find(',');
    const auto found = std::find(COLUMNS.begin(), COLUMNS.end(), columns.substr(0, end));
    STD_TORCH_CHECK(found != COLUMNS.end(), "columns: there is no ", columns.substr(0, end));
    order.push_back(found - COLUMNS.begin());
    if (end == std::string_view::npos) return order;
    columns.remove_prefix(end + 1);
  }
}

// Whether its elements fill a piece of memory, each one place of it.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t dimension = 0; dimension < tensor.dim(); dimension++)
    dimensions.emplace_back(tensor.stride(dimension), tensor.size(dimension));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (size != 1 && stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether rows that this thread computes are dropped.
thread_local bool drops_rows = false;

Tensor new_row(int64_t width) {
  const int64_t step = 1;
  AtenTensorHandle row;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &width, &step, aoti_torch_dtype_float64(), aoti_torch_device_type_cpu(), 0, &row));
  return Tensor(row);
}

double* numbers_of(const Tensor& row) { return static_cast<double*>(row.mutable_data_ptr()); }

// What nobody is to take for a row.
void write_nothing(int64_t width, double* row) { std::fill_n(row, width, UNDEFINED); }

// Writes a row of as many numbers as there are columns.
template <class Element>
void write_row(const Tensor& given, const std::vector<int64_t>& order, double* row,
               int64_t threads) {
  const Tensor tensor = is_dense(given) ? given : torch::stable::contiguous(given);
  const int64_t elements = tensor.numel();
  const auto address = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  summarize<Element>(1, &address, nullptr, &elements, order.size(), order.data(), threads, row);
}

bool has_kernel(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

void write_row_of(const Tensor& tensor, const std::vector<int64_t>& order, double* row,
                  int64_t threads) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return write_row<double>(tensor, order, row, threads);
    case ScalarType::Float: return write_row<float>(tensor, order, row, threads);
    case ScalarType::Half: return write_row<Float16>(tensor, order, row, threads);
    default: return write_row<BFloat16>(tensor, order, row, threads);
  }
}

void write_row_of(const Tensor& tensor, const std::vector<int64_t>& order, double* row) {
  write_row_of(tensor, order, row, torch::stable::get_num_threads());
}

// What there is no kernel for, from Python.
Tensor row_of_any(const Tensor& tensor, const std::string& columns) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(columns)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tmm::summarize_any", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor summarize_on_cpu(const Tensor& tensor, const std::string& columns) {
  if (!drops_rows && !has_kernel(tensor)) return row_of_any(tensor, columns);
  const std::vector<int64_t> order = order_of(columns);
  const Tensor row = new_row(order.size());
  if (drops_rows) write_nothing(order.size(), numbers_of(row));
  else write_row_of(tensor, order, numbers_of(row));
  return row;
}

void summarize_into_on_cpu(const Tensor& rows, int64_t start, const Tensor& tensor,
                           const std::string& columns) {
  const std::vector<int64_t> order = order_of(columns);
  const int64_t width = order.size();
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Double && rows.is_contiguous() && start >= 0 &&
                      start + width <= rows.numel(),
                  "rows: no place for ", width, " numbers at ", start);
  double* row = numbers_of(rows) + start;
  if (drops_rows) return write_nothing(width, row);
  if (has_kernel(tensor)) return write_row_of(tensor, order, row);
  const Tensor given = row_of_any(tensor, columns);
  std::copy_n(numbers_of(given), width, row);
}

// The rows of small tensors, which threads share; what there is no kernel for comes from Python.
Tensor summarize_many_on_cpu(const std::vector<Tensor>& tensors, const std::string& columns) {
  const std::vector<int64_t> order = order_of(columns);
  const int64_t width = order.size(), number = tensors.size();
  const Tensor rows = new_row(width * number);
  double* row = numbers_of(rows);
  if (drops_rows) {
    write_nothing(width * number, row);
    return rows;
  }
  std::vector<Tensor> dense;
  int64_t elements = 0;
  for (const Tensor& tensor : tensors) {
    const bool is_ready = !has_kernel(tensor) || is_dense(tensor);
    dense.push_back(is_ready ? tensor : torch::stable::contiguous(tensor));
    elements += tensor.numel();
  }
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), number);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) \
    if (threads > 1 && elements > CHUNK)
  for (int64_t index = 0; index < number; index++)
    if (has_kernel(dense[index])) write_row_of(dense[index], order, row + index * width, 1);
  for (int64_t index = 0; index < number; index++)
    if (!has_kernel(dense[index])) {
      const Tensor given = row_of_any(dense[index], columns);
      std::copy_n(numbers_of(given), width, row + index * width);
    }
  return rows;
}

bool drop_rows(bool drops) { return std::exchange(drops_rows, drops); }

STABLE_TORCH_LIBRARY_IMPL(tmm, CompositeExplicitAutograd, library) {
  library.impl("drop_rows", TORCH_BOX(&drop_rows));
}

STABLE_TORCH_LIBRARY_IMPL(tmm, CPU, library) {
  library.impl("summarize", TORCH_BOX(&summarize_on_cpu));
  library.impl("summarize_into", TORCH_BOX(&summarize_into_on_cpu));
  library.impl("summarize_many", TORCH_BOX(&summarize_many_on_cpu));
}

}  // namespace
