// group_norm_act: y = act((x - mean) * rstd * weight + bias), with the statistics of each group of
// neighbouring channels of a sample; and pixel_norm_act, with those of each pixel's channels.
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// acc is the accumulate type: float, and double where dtype is kFloat64.
// s is the number of statistics a sample: groups, or hw for pixel_norm_act.
struct GroupNormActFwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  int64_t groups;  // a divisor of c; pixel_norm_act does not look at it
  double eps;
  const void* x;       // [n, c, h, w] dtype
  const void* weight;  // [c] acc; null: 1
  const void* bias;    // [c] acc; null: 0
  void* mean;          // [n, s] acc: written
  void* var;           // [n, s] acc: biased variance, written
  void* y;             // [n, c, h, w] dtype, in x's layout
};

struct GroupNormActBwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  int64_t groups;
  double eps;
  const void* dy;      // [n, c, h, w] dtype, in x's layout
  const void* x;       // [n, c, h, w] dtype
  const void* mean;    // [n, s] acc
  const void* var;     // [n, s] acc
  const void* weight;  // [c] acc; null: 1
  const void* bias;    // [c] acc; null: 0
  void* dx;            // [n, c, h, w] dtype
  void* dweight;       // [c] acc
  void* dbias;         // [c] acc
};

FASTCNN_CPU_KERNEL(group_norm_act_fwd_cpu, GroupNormActFwdParams)
FASTCNN_CPU_KERNEL(group_norm_act_bwd_cpu, GroupNormActBwdParams)
FASTCNN_CPU_KERNEL(pixel_norm_act_fwd_cpu, GroupNormActFwdParams)
FASTCNN_CPU_KERNEL(pixel_norm_act_bwd_cpu, GroupNormActBwdParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: the function's number of floats, uninitialised.
int64_t group_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device);
int launch_group_norm_act_fwd(const GroupNormActFwdParams& p, float* workspace,
                              const CudaDevice& device);
int launch_group_norm_act_bwd(const GroupNormActBwdParams& p, float* workspace,
                              const CudaDevice& device);
int64_t pixel_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device);
int launch_pixel_norm_act_fwd(const GroupNormActFwdParams& p, float* workspace,
                              const CudaDevice& device);
int launch_pixel_norm_act_bwd(const GroupNormActBwdParams& p, float* workspace,
                              const CudaDevice& device);

}  // namespace fastcnn
