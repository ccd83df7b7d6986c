// conv2d_int8: what follows the int32 sums of an int8 convolution.
// fastcnn/ops/conv2d_int8/interface.py holds the formula, and says which of its operations is done
// in which type. What the kernel sees: sizes and pointers. No torch header.
#pragma once

#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

enum class ResidualKind : int32_t { kNone, kUint8, kInt8, kOutput };  // kOutput: y's float type

// All images are channels_last: `pixels` rows of c.
struct Conv2dInt8Params {
  int64_t pixels, c;
  const void* acc;          // [pixels, c] float32 that hold integers, or int32
  bool acc_is_float;        //
  const float* multiplier;  // [c]
  const void* bias;         // [c] int32 where y is quantised, else float32; or null
  const void* residual;     // [pixels, c] or null
  ResidualKind residual_kind;
  float residual_scale;
  int32_t residual_zero_point;
  bool relu;
  float cap;  // of relu6, in units of z; infinity without
  bool quantizes;
  int32_t low, high, zero_point;  // where y is quantised: its type's range, and its zero
  DType dtype;                    // else: y's
  void* y;                        // [pixels, c]
};

FASTCNN_CPU_KERNEL(conv2d_int8_epilogue_cpu, Conv2dInt8Params)

}  // namespace fastcnn
