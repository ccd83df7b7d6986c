// upsample: y resizes h and w of x by nearest or bilinear sampling, optionally beside the channels
// of skip in one buffer. What the kernels of every device see: sizes, types and pointers. No torch
// header.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"
#include "common/resample.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// The larger side's channels may be some of a wider buffer's. Its element (i, j, p), p being the
// pixel, lies at
//   NCHW:          i * image + j * rows.out * columns.out + p
//   channels_last: i * image + p * pixel + j
struct UpsampleShape {
  int64_t n, c;
  Axis rows, columns;
  Sampling sampling;
  bool channels_last;
  int64_t image, pixel;  // in elements; pixel is 1 in NCHW
};

struct UpsampleFwdParams {
  UpsampleShape shape;  // image and pixel are those of y
  DType dtype;
  int64_t c_skip;
  int64_t x_at, skip_at;  // the channel of y at which x's begin, and skip's
  const void* x;          // [n, c, rows.in, columns.in] dtype, dense
  const void* skip;       // [n, c_skip, rows.out, columns.out] dtype, in x's layout; null: none
  void* y;                // [n, c_skip + c, rows.out, columns.out] dtype
};

struct UpsampleBwdParams {
  UpsampleShape shape;  // image and pixel are those of dy
  DType dtype;
  const void* dy;  // [n, c, rows.out, columns.out] dtype
  void* dx;        // [n, c, rows.in, columns.in] dtype, dense
};

FASTCNN_CPU_KERNEL(upsample_fwd_cpu, UpsampleFwdParams)
FASTCNN_CPU_KERNEL(upsample_bwd_cpu, UpsampleBwdParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: upsample_workspace(...) floats, uninitialised.
int64_t upsample_workspace(const UpsampleShape& shape);
int launch_upsample_fwd(const UpsampleFwdParams& p, float* workspace, const CudaDevice& device);
int launch_upsample_bwd(const UpsampleBwdParams& p, float* workspace, const CudaDevice& device);

}  // namespace fastcnn
