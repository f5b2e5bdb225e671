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

template <class Element>
Tensor row_of(const Tensor& given, std::string_view columns) {
  const Tensor tensor = is_dense(given) ? given : torch::stable::contiguous(given);
  const std::vector<int64_t> order = order_of(columns);
  const int64_t width = order.size(), step = 1, elements = tensor.numel();
  AtenTensorHandle row;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &width, &step, aoti_torch_dtype_float64(), aoti_torch_device_type_cpu(), 0, &row));
  const Tensor result(row);
  const auto address = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  summarize<Element>(1, &address, nullptr, &elements, width, order.data(),
                     torch::stable::get_num_threads(),
                     static_cast<double*>(result.mutable_data_ptr()));
  return result;
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
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return row_of<double>(tensor, columns);
    case ScalarType::Float: return row_of<float>(tensor, columns);
    case ScalarType::Half: return row_of<Float16>(tensor, columns);
    case ScalarType::BFloat16: return row_of<BFloat16>(tensor, columns);
    default: return row_of_any(tensor, columns);
  }
}

STABLE_TORCH_LIBRARY_IMPL(tmm, CPU, library) {
  library.impl("summarize", TORCH_BOX(&summarize_on_cpu));
}

}  // namespace
