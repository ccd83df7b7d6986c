// The arguments of a depthwise convolution, checked, for the ops that have one.
#pragma once

#include <vector>

#include "bindings/check.h"
#include "depthwise_conv2d.h"

namespace fastcnn {

using Pair = std::vector<int64_t>;  // height, width

inline int64_t at(const char* op, const char* name, const Pair& pair, int d, int64_t least,
                  int64_t most) {
  if (pair.size() != 2 || pair[d] < least || pair[d] > most) {
    fail(op, name, ": expected two integers from ", least, " to ", most);
  }
  return pair[d];
}

// Rows (d = 0) or columns of the window.
inline WindowAxis axis_of(const char* op, int d, int64_t size, int64_t kernel, const Pair& stride,
                          const Pair& padding, const Pair& dilation) {
  WindowAxis axis{size,
                  0,
                  kernel,
                  at(op, "stride", stride, d, 1, kMaxStep),
                  at(op, "padding", padding, d, 0, kMaxStep),
                  at(op, "dilation", dilation, d, 1, kMaxStep)};
  const bool sound = size >= 1 && size <= kMaxSide && kernel >= 1 && kernel <= kMaxStep;
  const int64_t reach =
      sound ? size + 2 * axis.padding - axis.dilation * (kernel - 1) - 1 : int64_t{-1};
  if (reach < 0) {
    fail(op, d == 0 ? "h" : "w", ": expected 1 to ", kMaxSide,
         " pixels, and a kernel that fits into the padded image, got ", size, " and ", kernel);
  }
  axis.size_out = reach / axis.stride + 1;
  return axis;
}

inline DepthwiseShape shape_of(const char* op, int64_t n, int64_t c, int64_t h, int64_t w,
                               int64_t kernel_h, int64_t kernel_w, const Pair& stride,
                               const Pair& padding, const Pair& dilation, bool channels_last) {
  if (c > INT32_MAX) fail(op, "c: expected at most 2^31 - 1 channels, got ", c);
  DepthwiseShape s{n, c, axis_of(op, 0, h, kernel_h, stride, padding, dilation),
                   axis_of(op, 1, w, kernel_w, stride, padding, dilation), channels_last};
  if (kernel_h * kernel_w > kMaxTaps) {
    fail(op, "kernel: expected at most 2^24 elements a channel, got ", kernel_h, " x ", kernel_w);
  }
  // Of one pixel both layouts are one, whose channels lie side by side.
  s.channels_last |= h * w == 1 && s.rows.size_out * s.columns.size_out == 1;
  return s;
}

inline const void* weight_of(const char* op, const Tensor& weight, const Tensor& x, ScalarType acc,
                             int64_t c) {
  if (weight.device() != x.device() || weight.scalar_type() != acc || weight.dim() != 4 ||
      weight.size(0) != c || weight.size(1) != 1 || !is_dense(weight, false)) {
    fail(op, "weight: expected a dense tensor [", c, ", 1, kernel_h, kernel_w] of ",
         torch::headeronly::toString(acc), " and ", device_of(x), ", got sizes ", sizes_of(weight),
         " of ", torch::headeronly::toString(weight.scalar_type()), " and ", device_of(weight));
  }
  check_storage(op, "weight", weight);
  return weight.const_data_ptr();
}

}  // namespace fastcnn
