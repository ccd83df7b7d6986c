// dropout: y = x * keep / (1 - p) + residual, with one draw an element or one a channel.
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"
#include "common/dropout_mask.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// Logical index of element (i, j, q): (i * c + j) * hw + q; with per_channel: i * c + j.
struct DropoutParams {
  ImageShape shape;
  DType dtype;
  bool per_channel;
  uint64_t threshold;    // keep_threshold(p)
  double scale;          // keep_scale(threshold)
  const int64_t* seed;   // [1], where x is
  const void* x;         // [n, c, h, w] dtype
  const void* residual;  // [n, c, h, w] dtype, in x's layout; null: none
  void* y;               // [n, c, h, w] dtype, in x's layout; may be x
};

// Forward, and with dy for x the backward: both are the same linear map.
FASTCNN_CPU_KERNEL(dropout_apply_cpu, DropoutParams)

// Returns a cudaError_t. float64 is the CPU's: it is refused.
int launch_dropout_apply(const DropoutParams& p, const CudaDevice& device);

}  // namespace fastcnn
