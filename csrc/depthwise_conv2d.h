// depthwise_conv2d: a convolution of each channel by itself, y = act(conv2d(x, weight) + bias).
//   z[n, c, i, j] = bias[c] + sum over a, b of
//       weight[c, a, b] * x[n, c, i * stride_h + a * dilation_h - padding_h, likewise j]
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// One direction of the window: size_out = (size + 2 padding - dilation (kernel - 1) - 1) / stride
// + 1. The limits keep products far from overflow.
struct WindowAxis {
  int64_t size, size_out, kernel, stride, padding, dilation;
};
constexpr int64_t kMaxSide = int64_t{1} << 30, kMaxStep = int64_t{1} << 20;
constexpr int64_t kMaxTaps = int64_t{1} << 24;

// channels_last: element (i, j, y, x) lies at ((i * h + y) * w + x) * c + j.
struct DepthwiseShape {
  int64_t n, c;
  WindowAxis rows, columns;
  bool channels_last;
};

// acc is the accumulate type: float, and double where dtype is kFloat64.
struct DepthwiseConv2dFwdParams {
  DepthwiseShape shape;
  DType dtype;
  Act act;
  const void* x;       // [n, c, h, w] dtype
  const void* weight;  // [c, 1, kernel_h, kernel_w] acc
  const void* bias;    // [c] acc; null: 0
  const void* dy;      // [n, c, h_out, w_out] dtype: y = dy * act'(z); null: y = act(z)
  void* y;             // [n, c, h_out, w_out] dtype, in x's layout
};

struct DepthwiseConv2dBwdDataParams {
  DepthwiseShape shape;
  DType dtype;
  const void* dy;      // [n, c, h_out, w_out] dtype
  const void* weight;  // [c, 1, kernel_h, kernel_w] acc
  void* dx;            // [n, c, h, w] dtype, in dy's layout
};

struct DepthwiseConv2dBwdWeightParams {
  DepthwiseShape shape;
  DType dtype;
  const void* dy;  // [n, c, h_out, w_out] dtype, in x's layout
  const void* x;   // [n, c, h, w] dtype
  void* dweight;   // [c, 1, kernel_h, kernel_w] acc
  void* dbias;     // [c] acc
};

FASTCNN_CPU_KERNEL(depthwise_conv2d_fwd_cpu, DepthwiseConv2dFwdParams)
FASTCNN_CPU_KERNEL(depthwise_conv2d_bwd_data_cpu, DepthwiseConv2dBwdDataParams)
FASTCNN_CPU_KERNEL(depthwise_conv2d_bwd_weight_cpu, DepthwiseConv2dBwdWeightParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: the function's number of floats, uninitialised.
int64_t depthwise_conv2d_workspace(const DepthwiseShape& shape);
int64_t depthwise_conv2d_bwd_weight_workspace(const DepthwiseShape& shape);
int launch_depthwise_conv2d_fwd(const DepthwiseConv2dFwdParams& p, float* workspace,
                                const CudaDevice& device);
int launch_depthwise_conv2d_bwd_data(const DepthwiseConv2dBwdDataParams& p, float* workspace,
                                     const CudaDevice& device);
int launch_depthwise_conv2d_bwd_weight(const DepthwiseConv2dBwdWeightParams& p, float* workspace,
                                       const CudaDevice& device);

}  // namespace fastcnn
