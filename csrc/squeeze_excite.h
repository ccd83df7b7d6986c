// squeeze_excite: y = x * gate(fc2(act(fc1(mean of x over h and w)))), the passes over the image.
//   mean[n, c] = sum over h, w of x / hw         y = x * gate[n, c]
//   dgate[n, c] = sum over h, w of dy * x        dx = dy * gate[n, c] + dmean[n, c] / hw
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// acc is the accumulate type: float, and double where dtype is kFloat64.
struct SqueezeExciteReduceParams {
  ImageShape shape;
  DType dtype;
  const void* x;   // [n, c, h, w] dtype
  const void* dy;  // [n, c, h, w] dtype, in x's layout: out = sum(dy * x); null: out = mean(x)
  void* out;       // [n, c] acc
};

struct SqueezeExciteScaleParams {
  ImageShape shape;
  DType dtype;
  const void* x;      // [n, c, h, w] dtype; in backward dy
  const void* gate;   // [n, c] acc
  const void* dmean;  // [n, c] acc: y = x * gate + dmean / hw; null: y = x * gate
  void* y;            // [n, c, h, w] dtype, in x's layout
};

FASTCNN_CPU_KERNEL(squeeze_excite_reduce_cpu, SqueezeExciteReduceParams)
FASTCNN_CPU_KERNEL(squeeze_excite_scale_cpu, SqueezeExciteScaleParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: the function's number of floats, uninitialised.
int64_t squeeze_excite_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device);
int launch_squeeze_excite_reduce(const SqueezeExciteReduceParams& p, float* workspace,
                                 const CudaDevice& device);
int launch_squeeze_excite_scale(const SqueezeExciteScaleParams& p, const CudaDevice& device);

}  // namespace fastcnn
