// 1x1 convolutions in channels_last on the CPU: pointwise_conv2d, one with its epilogue, and
// inverted_residual, two with the depthwise one between them.
#pragma once

#include "common/activation.h"
#include "common/types.h"
#include "cpu/capability.h"
#include "depthwise_conv2d.h"

namespace fastcnn {

// Columns of a panel of weights: [ceil(c_out / kPanel), c_in, kPanel], 0 where there is no channel.
constexpr int64_t kPanel = 16;

// y = act(x weight + bias + residual). acc is the accumulate type: float, and double where dtype is
// kFloat64.
struct PointwiseConv2dFwdParams {
  DType dtype;
  int64_t rows, c_in, c_out;
  int64_t x_stride;  // elements from one row of x to the next
  Act act;
  const void* x;         // [rows, c_in] dtype
  const void* weight;    // panels, acc
  const void* bias;      // [c_out] acc; null: 0
  const void* residual;  // [rows, c_out] dtype; null: none
  void* y;               // [rows, c_out] dtype
};

// One side of the depthwise convolution.
struct PointwisePart {
  int64_t c;  // channels of its other image; 0: there is no such convolution
  Act act;
  const void* weight;  // panels, acc
  const void* bias;    // acc; null: 0
};

// y = project.act(project(depthwise.act(depthwise(expand.act(expand(x))))) + residual); depthwise
// has the values of the convolution between the two, and neither x nor y.
struct InvertedResidualFwdParams {
  DType dtype;
  DepthwiseConv2dFwdParams depthwise;
  PointwisePart expand, project;
  int64_t x_stride;      // elements from one pixel of x to the next
  const void* x;         // [n, h, w, expand.c or c] dtype
  const void* residual;  // [n, h_out, w_out, project.c] dtype; null: none
  void* y;               // [n, h_out, w_out, project.c or c] dtype
};

FASTCNN_CPU_KERNEL(inverted_residual_fwd_cpu, InvertedResidualFwdParams)
FASTCNN_CPU_KERNEL(pointwise_conv2d_fwd_cpu, PointwiseConv2dFwdParams)

}  // namespace fastcnn
