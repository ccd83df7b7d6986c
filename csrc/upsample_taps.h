// upsample_taps: the part of a 3x3 convolution with padding 1 over an upsampled image that is left
// when the channels have been mixed before, on the small image. z holds for each of the 9 places of
// the kernel (taps) what that place's weights make of the small image:
//   y[n, o, p, q] = sum over a, b of up(z[n, 3 a + b, o])[p + a - 1, q + b - 1], 0 outside of y
// What the kernels see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/resample.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

constexpr int64_t kTapSide = 3, kTaps = kTapSide * kTapSide;

struct UpsampleTapsParams {
  int64_t n, c;
  Axis rows, columns;
  Sampling sampling;
  DType dtype;
  const void* from;  // forward z, backward dy
  void* to;          // forward y, backward dz
  // z, dz: [n, kTaps * c, rows.in, columns.in] dtype, channels_last
  // y, dy: [n, c, rows.out, columns.out] dtype, channels_last
};

FASTCNN_CPU_KERNEL(upsample_taps_fwd_cpu, UpsampleTapsParams)
FASTCNN_CPU_KERNEL(upsample_taps_bwd_cpu, UpsampleTapsParams)

}  // namespace fastcnn
