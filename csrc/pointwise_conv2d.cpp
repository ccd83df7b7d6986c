// pointwise_conv2d between torch and the kernels: what fastcnn/ops/conv2d/pointwise.py
// and inverted_residual.py declare, here checked, allocated and launched.
#include "pointwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include "bindings/depthwise_shape.h"

namespace fastcnn {
namespace {

// Elements from pixel to pixel of an image in channels_last, or of some channels of one.
int64_t pixel_stride(const char* op, const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.numel() == 0) return c;
  const int64_t pixel = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : x.size(0) > 1 ? x.stride(0) : c;
  const bool sound = (c == 1 || x.stride(1) == 1) && pixel >= c &&
                     (h == 1 || x.stride(2) == w * pixel) &&
                     (x.size(0) == 1 || x.stride(0) == h * w * pixel);
  if (!sound) {
    fail(op, "x: expected channels_last, or channels of a tensor in it, got sizes ", sizes_of(x),
         " with other strides");
  }
  return pixel;
}

const void* residual_of(const char* op, const OptionalTensor& residual, const Tensor& y) {
  if (!residual) return nullptr;
  return image_of(op, "residual", *residual, y, y.size(0), y.size(1), y.size(2), y.size(3), true);
}

int64_t channels_of(const char* op, const char* name, int64_t c) {
  if (c < 1 || c > INT32_MAX) fail(op, name, ": expected 1 to 2^31 - 1 channels, got ", c);
  return c;
}

// -> y, [n, c_out, h, w] in channels_last
Tensor fwd(const Tensor& x, const Tensor& weight, int64_t c_out, const OptionalTensor& bias,
           const OptionalTensor& residual, int64_t act) {
  constexpr const char* kOp = "pointwise_conv2d_fwd";
  if (x.dim() != 4) fail(kOp, "x: expected 4 dimensions [n, c, h, w], got sizes ", sizes_of(x));
  const Check check(kOp, x, ImageShape{});
  PointwiseConv2dFwdParams p{};
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.c_in = channels_of(kOp, "x", x.size(1));
  p.c_out = channels_of(kOp, "c_out", c_out);
  p.weight = check.panels("weight", weight, p.c_in, c_out, kPanel);
  p.bias = bias ? check.numbers("bias", *bias, c_out) : nullptr;
  p.rows = x.size(0) * x.size(2) * x.size(3);
  p.x_stride = pixel_stride(kOp, x);
  Tensor y = empty_image(x, x.scalar_type(), x.size(0), c_out, x.size(2), x.size(3), true);
  p.residual = residual_of(kOp, residual, y);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (p.rows > 0) pointwise_conv2d_fwd_cpu(p);
  return y;
}

// The names of a 1x1 convolution's arguments.
struct PartNames {
  const char *weight, *bias, *act;
};

// A 1x1 convolution from c_in to c_out channels, or none; c: of its other image.
PointwisePart part_of(const char* op, const Check& check, const PartNames& names,
                      const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                      int64_t c_in, int64_t c_out, int64_t c) {
  PointwisePart part{};
  part.act = check.act(act, names.act);
  if (!weight && bias) fail(op, names.bias, ": expected none without ", names.weight);
  if (weight) {
    part.c = c;
    part.weight = check.panels(names.weight, *weight, c_in, c_out, kPanel);
    part.bias = bias ? check.numbers(names.bias, *bias, c_out) : nullptr;
  }
  return part;
}

// -> y, [n, c_out, h_out, w_out] in channels_last; c_out counts where there is a project
Tensor inverted_residual_fwd(const Tensor& x, const OptionalTensor& expand,
                             const OptionalTensor& expand_bias, int64_t expand_act,
                             const Tensor& weight, const OptionalTensor& bias, const Pair& stride,
                             const Pair& padding, const Pair& dilation, int64_t act,
                             const OptionalTensor& project, int64_t c_out,
                             const OptionalTensor& project_bias, int64_t project_act,
                             const OptionalTensor& residual) {
  constexpr const char* kOp = "inverted_residual_fwd";
  if (x.dim() != 4) fail(kOp, "x: expected 4 dimensions [n, c, h, w], got sizes ", sizes_of(x));
  const Check check(kOp, x, ImageShape{});
  InvertedResidualFwdParams p{};
  DepthwiseConv2dFwdParams& d = p.depthwise;
  p.dtype = d.dtype = check.dtype();
  d.act = check.act(act);
  const int64_t c_in = channels_of(kOp, "x", x.size(1));
  const int64_t c = expand && weight.dim() == 4 ? channels_of(kOp, "weight", weight.size(0)) : c_in;
  if (project) channels_of(kOp, "c_out", c_out);
  d.weight = weight_of(kOp, weight, x, check.acc(), c);
  d.bias = bias ? check.numbers("bias", *bias, c) : nullptr;
  d.shape = shape_of(kOp, x.size(0), c, x.size(2), x.size(3), weight.size(2), weight.size(3),
                     stride, padding, dilation, true);
  p.expand = part_of(kOp, check, {"expand", "expand_bias", "expand_act"}, expand, expand_bias,
                     expand_act, c_in, c, c_in);
  p.project = part_of(kOp, check, {"project", "project_bias", "project_act"}, project, project_bias,
                      project_act, c, c_out, c_out);
  p.x_stride = pixel_stride(kOp, x);
  Tensor y = empty_image(x, x.scalar_type(), x.size(0), project ? c_out : c, d.shape.rows.size_out,
                         d.shape.columns.size_out, true);
  if (residual && !project) fail(kOp, "residual: expected none without project");
  p.residual = residual_of(kOp, residual, y);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (y.numel() > 0) inverted_residual_fwd_cpu(p);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("pointwise_conv2d_fwd", TORCH_BOX(&fwd));
  m.impl("inverted_residual_fwd", TORCH_BOX(&inverted_residual_fwd));
}

}  // namespace fastcnn
