// The checks that protect memory, for the torch glue: whatever a caller hands to torch.ops.fastcnn,
// it raises here and no kernel reads out of bounds. What would merely confuse a user is checked in
// fastcnn/ops/<op>.py, with the user's words.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "common/activation.h"
#include "common/types.h"

namespace fastcnn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Words>
[[noreturn]] inline void fail(const char* op, const Words&... words) {
  std::ostringstream message;
  message << "fastcnn::" << op << ": ";
  (message << ... << words);
  throw std::runtime_error(message.str());
}

inline std::string sizes_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "a CPU tensor";
  const std::string kind = t.is_cuda() ? "a CUDA tensor" : "a tensor of another kind of device";
  return kind + " (index " + std::to_string(t.get_device_index()) + ")";
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, name, ": expected float32, bfloat16, float16 or float64, got ",
           torch::headeronly::toString(t.scalar_type()));
  }
}

// The storage must hold what offset, sizes and strides reach: somebody may have shrunk it, or taken
// its memory, since the tensor was made, and neither sizes nor strides show it.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t end = t.storage_offset(), needed = 0, bytes = 0;  // end: the furthest element
  bool overflows = false;
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t reach = 0;
    overflows |= __builtin_mul_overflow(t.size(d) - 1, t.stride(d), &reach);
    overflows |= __builtin_add_overflow(end, reach, &end);
  }
  overflows |= __builtin_add_overflow(end, 1, &end);
  overflows |= __builtin_mul_overflow(end, static_cast<int64_t>(t.element_size()), &needed);
  if (overflows) fail(op, name, ": expected less than 2^63 bytes, got sizes ", sizes_of(t));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  if (bytes < needed) {
    fail(op, name, ": expected a storage of at least ", needed, " bytes, got ", bytes);
  }
  if (t.const_data_ptr() == nullptr) {
    fail(op, name, ": expected a tensor with memory, got sizes ", sizes_of(t), " without");
  }
}

// Dense in the order n c h w, or n h w c. Dimensions of size 1 have no order.
inline bool is_dense(const Tensor& t, bool channels_last) {
  if (t.numel() == 0) return true;
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (int d : kOrder[channels_last]) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// An uninitialised image on a device. Made in its layout, not transposed to it: what an
// autograd.Function returns must be no view, or nothing may write into it.
inline Tensor empty_image(const Tensor& like, ScalarType dtype, int64_t n, int64_t c, int64_t h,
                          int64_t w, bool channels_last) {
  const int64_t sizes[] = {n, c, h, w};
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes, 4), dtype, std::nullopt, like.device(),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A tensor [n, c, h, w] of x's dtype and device, dense in a layout.
inline const void* image_of(const char* op, const char* name, const Tensor& t, const Tensor& x,
                            int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (t.device() != x.device() || t.scalar_type() != x.scalar_type()) {
    fail(op, name, ": expected ", torch::headeronly::toString(x.scalar_type()), " and ",
         device_of(x), ", got ", torch::headeronly::toString(t.scalar_type()), " and ",
         device_of(t));
  }
  check_storage(op, name, t);
  if (t.dim() != 4 || t.size(0) != n || t.size(1) != c || t.size(2) != h || t.size(3) != w) {
    fail(op, name, ": expected sizes [", n, ", ", c, ", ", h, ", ", w, "], got ", sizes_of(t));
  }
  if (!is_dense(t, channels_last)) {
    fail(op, name, ": expected the ", channels_last ? "channels_last" : "NCHW",
         " layout, got other strides");
  }
  return t.const_data_ptr();
}

// Checks of one operator call. Every tensor must be where x is.
class Check {
 public:
  Check(const char* op, const Tensor& x) : op_(op), x_(x) {
    if (x.dim() != 4) fail(op, "x: expected 4 dimensions [n, c, h, w], got sizes ", sizes_of(x));
    data("x", x);
    shape_ = {x.size(0), x.size(1), x.size(2) * x.size(3), false};
    const bool nchw = is_dense(x, false), nhwc = is_dense(x, true);
    if (!nchw && !nhwc) {
      fail(op, "x: expected a dense NCHW or channels_last tensor, got sizes ", sizes_of(x),
           " with other strides; call .contiguous() first");
    }
    // A 1x1 image is both: its channels are what lies side by side.
    shape_.channels_last = nhwc && (!nchw || shape_.hw == 1);
  }

  // The caller checks x's sizes and strides.
  Check(const char* op, const Tensor& x, const ImageShape& shape) : op_(op), x_(x), shape_(shape) {
    check_storage(op, "x", x);
  }

  const ImageShape& shape() const { return shape_; }

  DType dtype() const { return dtype_of(op_, "x", x_); }

  // The type of statistics, parameters and sums.
  ScalarType acc() const {
    return x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // A tensor of x's sizes, dtype and memory layout.
  const void* image(const char* name, const Tensor& t) const {
    data(name, t);
    bool same = t.dim() == 4 && t.scalar_type() == x_.scalar_type();
    for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == x_.size(d);
    if (!same) {
      fail(op_, name, ": expected sizes ", sizes_of(x_), " and dtype ",
           torch::headeronly::toString(x_.scalar_type()), " as x, got ", sizes_of(t), " and ",
           torch::headeronly::toString(t.scalar_type()));
    }
    if (!is_dense(t, shape_.channels_last)) {
      fail(op_, name, ": expected the ", shape_.channels_last ? "channels_last" : "NCHW",
           " layout of x, got other strides");
    }
    return t.const_data_ptr();
  }
  const void* image(const char* name, const OptionalTensor& t) const {
    return t ? image(name, *t) : nullptr;
  }

  // A dense vector of one number a channel in the accumulate type.
  const void* channels(const char* name, const Tensor& t) const {
    return numbers(name, t, shape_.c);
  }
  const void* channels(const char* name, const OptionalTensor& t) const {
    return t ? channels(name, *t) : nullptr;
  }

  // A dense vector of `size` numbers in the accumulate type.
  const void* numbers(const char* name, const Tensor& t, int64_t size) const {
    data(name, t);
    if (t.dim() != 1 || t.size(0) != size || t.scalar_type() != acc() ||
        (size > 1 && t.stride(0) != 1)) {
      fail(op_, name, ": expected a dense vector of ", size, " ",
           torch::headeronly::toString(acc()), ", got sizes ", sizes_of(t), " of ",
           torch::headeronly::toString(t.scalar_type()));
    }
    return t.const_data_ptr();
  }

  // A dense matrix [rows, columns] of numbers in the accumulate type.
  const void* matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    data(name, t);
    if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns || t.scalar_type() != acc() ||
        (columns > 1 && t.stride(1) != 1) || (rows > 1 && t.stride(0) != columns)) {
      fail(op_, name, ": expected a dense matrix [", rows, ", ", columns, "] of ",
           torch::headeronly::toString(acc()), ", got sizes ", sizes_of(t), " of ",
           torch::headeronly::toString(t.scalar_type()));
    }
    return t.const_data_ptr();
  }

  // The weight of a 1x1 convolution in panels, [ceil(c_out / width), c_in, width], in the
  // accumulate type.
  const void* panels(const char* name, const Tensor& t, int64_t c_in, int64_t c_out,
                     int64_t width) const {
    data(name, t);
    const int64_t count = (c_out + width - 1) / width;
    if (t.dim() != 3 || t.size(0) != count || t.size(1) != c_in || t.size(2) != width ||
        t.scalar_type() != acc() || t.stride(2) != 1 || (c_in > 1 && t.stride(1) != width) ||
        (count > 1 && t.stride(0) != c_in * width)) {
      fail(op_, name, ": expected dense panels [", count, ", ", c_in, ", ", width, "] of ",
           torch::headeronly::toString(acc()), ", got sizes ", sizes_of(t), " of ",
           torch::headeronly::toString(t.scalar_type()));
    }
    return t.const_data_ptr();
  }

  // What is added to a variance, whose root is taken.
  double eps(double eps) const {
    if (!(eps >= 0)) fail(op_, "eps: expected at least 0, got ", eps);
    return eps;
  }

  Act act(int64_t act, const char* name = "act") const {
    if (act < 0 || act >= kActCount) {
      fail(op_, name, ": expected 0 to ", kActCount - 1, ", got ", act);
    }
    return static_cast<Act>(act);
  }

  Tensor new_channels() const { return torch::stable::new_empty(x_, {shape_.c}, acc()); }
  Tensor new_matrix(int64_t rows, int64_t columns) const {
    return torch::stable::new_empty(x_, {rows, columns}, acc());
  }

 private:
  void data(const char* name, const Tensor& t) const {
    if (t.device() != x_.device()) {
      fail(op_, name, ": expected ", device_of(x_), " as x, got ", device_of(t));
    }
    check_storage(op_, name, t);
  }

  const char* op_;
  const Tensor& x_;
  ImageShape shape_;
};

}  // namespace fastcnn
