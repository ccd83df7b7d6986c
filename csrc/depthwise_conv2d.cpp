// depthwise_conv2d between torch and the kernels: what fastcnn/ops/depthwise_conv2d.py declares,
// here checked, allocated and launched.
#include "depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/depthwise_shape.h"
#include "bindings/on_device.h"

namespace fastcnn {
namespace {

// What is dense in both orders counts as NCHW, as fastcnn/common/checks.py has it.
bool is_channels_last(const Tensor& t) { return !is_dense(t, false); }

// -> y, or with a dy dy * act'(z)
template <auto launch>
Tensor run_fwd(const char* op, const OptionalTensor& dy, const Tensor& x, const Tensor& weight,
               const OptionalTensor& bias, const Pair& stride, const Pair& padding,
               const Pair& dilation, int64_t act) {
  const Check check(op, x);
  DepthwiseConv2dFwdParams p{};
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.weight = weight_of(op, weight, x, check.acc(), x.size(1));
  p.bias = check.channels("bias", bias);
  const bool channels_last = is_channels_last(x);
  DepthwiseShape& s = p.shape;
  s = shape_of(op, x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), weight.size(3),
               stride, padding, dilation, channels_last);
  const int64_t h = s.rows.size_out, w = s.columns.size_out;
  if (dy) p.dy = image_of(op, "dy", *dy, x, s.n, s.c, h, w, channels_last);
  Tensor y = empty_image(x, x.scalar_type(), s.n, s.c, h, w, channels_last);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (y.numel() > 0) launch(op, p, x);
  return y;
}

template <auto launch>
Tensor fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Pair& stride,
           const Pair& padding, const Pair& dilation, int64_t act) {
  return run_fwd<launch>("depthwise_conv2d_fwd", std::nullopt, x, weight, bias, stride, padding,
                         dilation, act);
}

template <auto launch>
Tensor bwd_act(const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const Pair& stride, const Pair& padding, const Pair& dilation, int64_t act) {
  return run_fwd<launch>("depthwise_conv2d_bwd_act", dy, x, weight, bias, stride, padding, dilation,
                         act);
}

// -> dx
template <auto launch>
Tensor bwd_data(const Tensor& dy, const Tensor& weight, int64_t h, int64_t w, const Pair& stride,
                const Pair& padding, const Pair& dilation, bool channels_last) {
  constexpr const char* kOp = "depthwise_conv2d_bwd_data";
  const Check check(kOp, dy);
  DepthwiseConv2dBwdDataParams p{};
  p.dtype = check.dtype();
  p.weight = weight_of(kOp, weight, dy, check.acc(), dy.size(1));
  const int64_t n = dy.size(0), c = dy.size(1);
  p.shape = shape_of(kOp, n, c, h, w, weight.size(2), weight.size(3), stride, padding, dilation,
                     channels_last);
  p.dy = image_of(kOp, "dy", dy, dy, n, c, p.shape.rows.size_out, p.shape.columns.size_out,
                  channels_last);
  Tensor dx = empty_image(dy, dy.scalar_type(), n, c, h, w, channels_last);
  p.dx = dx.mutable_data_ptr();
  if (dx.numel() > 0) launch(kOp, p, dy);
  return dx;
}

// -> dweight, dbias
template <auto launch>
std::tuple<Tensor, Tensor> bwd_weight(const Tensor& dy, const Tensor& x, int64_t kernel_h,
                                      int64_t kernel_w, const Pair& stride, const Pair& padding,
                                      const Pair& dilation) {
  constexpr const char* kOp = "depthwise_conv2d_bwd_weight";
  const Check check(kOp, x);
  DepthwiseConv2dBwdWeightParams p{};
  p.dtype = check.dtype();
  const bool channels_last = is_channels_last(x);
  p.shape = shape_of(kOp, x.size(0), x.size(1), x.size(2), x.size(3), kernel_h, kernel_w, stride,
                     padding, dilation, channels_last);
  const int64_t n = p.shape.n, c = p.shape.c;
  p.dy = image_of(kOp, "dy", dy, x, n, c, p.shape.rows.size_out, p.shape.columns.size_out,
                  channels_last);
  p.x = x.const_data_ptr();
  Tensor dweight = empty_image(x, check.acc(), c, 1, kernel_h, kernel_w, false);
  Tensor dbias = check.new_channels();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    launch(kOp, p, x);
  }
  return {dweight, dbias};
}

#ifdef FASTCNN_WITH_CUDA
int64_t workspace(const DepthwiseShape& shape, DType, const CudaDevice&) {
  return depthwise_conv2d_workspace(shape);
}
int64_t bwd_weight_workspace(const DepthwiseShape& shape, DType, const CudaDevice&) {
  return depthwise_conv2d_bwd_weight_workspace(shape);
}
#endif

}  // namespace

using FwdParams = DepthwiseConv2dFwdParams;
using DataParams = DepthwiseConv2dBwdDataParams;
using WeightParams = DepthwiseConv2dBwdWeightParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX((&fwd<on_cpu<depthwise_conv2d_fwd_cpu, FwdParams>>)));
  m.impl("depthwise_conv2d_bwd_act",
         TORCH_BOX((&bwd_act<on_cpu<depthwise_conv2d_fwd_cpu, FwdParams>>)));
  m.impl("depthwise_conv2d_bwd_data",
         TORCH_BOX((&bwd_data<on_cpu<depthwise_conv2d_bwd_data_cpu, DataParams>>)));
  m.impl("depthwise_conv2d_bwd_weight",
         TORCH_BOX((&bwd_weight<on_cpu<depthwise_conv2d_bwd_weight_cpu, WeightParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl(
      "depthwise_conv2d_fwd",
      TORCH_BOX((&fwd<on_cuda_with_workspace<launch_depthwise_conv2d_fwd, workspace, FwdParams>>)));
  m.impl("depthwise_conv2d_bwd_act",
         TORCH_BOX((
             &bwd_act<on_cuda_with_workspace<launch_depthwise_conv2d_fwd, workspace, FwdParams>>)));
  m.impl("depthwise_conv2d_bwd_data",
         TORCH_BOX((&bwd_data<on_cuda_with_workspace<launch_depthwise_conv2d_bwd_data, workspace,
                                                     DataParams>>)));
  m.impl("depthwise_conv2d_bwd_weight",
         TORCH_BOX((&bwd_weight<on_cuda_with_workspace<launch_depthwise_conv2d_bwd_weight,
                                                       bwd_weight_workspace, WeightParams>>)));
}
#endif

}  // namespace fastcnn
