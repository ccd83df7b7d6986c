// upsample between torch and the kernels: what fastcnn/ops/upsample/interface.py declares, here
// checked, allocated and launched.
#include "upsample.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

using OptionalScale = std::optional<double>;

const char* layout_name(bool channels_last) { return channels_last ? "channels_last" : "NCHW"; }

// A tensor of x's dtype and device, with a storage that holds it.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  if (t.dim() != 4) {
    fail(op, name, ": expected 4 dimensions [n, c, h, w], got sizes ", sizes_of(t));
  }
  if (t.scalar_type() != x.scalar_type() || t.device() != x.device()) {
    fail(op, name, ": expected ", torch::headeronly::toString(x.scalar_type()), " and ",
         device_of(x), ", got ", torch::headeronly::toString(t.scalar_type()), " and ",
         device_of(t));
  }
  check_storage(op, name, t);
}

void check_dense(const char* op, const char* name, const Tensor& t, bool channels_last) {
  if (!is_dense(t, channels_last)) {
    fail(op, name, ": expected a dense ", layout_name(channels_last), " tensor, got sizes ",
         sizes_of(t), " with other strides");
  }
}

Axis axis_of(const char* op, const char* name, int64_t in, int64_t out,
             const OptionalScale& scale) {
  if (in < 1 || in > kMaxPixels || out < 1 || out > kMaxPixels) {
    fail(op, name, ": expected 1 to ", kMaxPixels, " pixels, got ", in, " to be resized to ", out);
  }
  if (!scale) return {in, out, 0};
  // Kernels count on a scale that agrees with the sizes: no pixel is in more outputs than that.
  const double expected = std::floor(static_cast<double>(in) * *scale);
  if (!(*scale > 0) || expected != static_cast<double>(out)) {
    fail(op, name, ": expected a scale that makes ", out, " pixels of ", in, ", got ", *scale);
  }
  return {in, out, *scale};
}

UpsampleShape shape_of(const char* op, int64_t n, int64_t c, int64_t h_in, int64_t w_in,
                       int64_t h_out, int64_t w_out, const OptionalScale& scale_h,
                       const OptionalScale& scale_w, int64_t sampling, bool channels_last) {
  if (sampling < 0 || sampling >= kSamplingCount) {
    fail(op, "sampling: expected 0 to ", kSamplingCount - 1, ", got ", sampling);
  }
  UpsampleShape s{};
  s.n = n;
  s.c = c;
  s.rows = axis_of(op, "h", h_in, h_out, scale_h);
  s.columns = axis_of(op, "w", w_in, w_out, scale_w);
  s.sampling = static_cast<Sampling>(sampling);
  s.channels_last = channels_last;
  return s;
}

// -> y
template <auto launch>
Tensor fwd(const Tensor& x, const OptionalTensor& skip, int64_t h, int64_t w, OptionalScale scale_h,
           OptionalScale scale_w, int64_t sampling, bool channels_last, bool skip_last) {
  constexpr const char* kOp = "upsample_fwd";
  check_like(kOp, "x", x, x);
  check_dense(kOp, "x", x, channels_last);
  UpsampleFwdParams p{};
  p.dtype = dtype_of(kOp, "x", x);
  p.shape = shape_of(kOp, x.size(0), x.size(1), x.size(2), x.size(3), h, w, scale_h, scale_w,
                     sampling, channels_last);
  if (skip) {
    check_like(kOp, "skip", *skip, x);
    if (skip->size(0) != x.size(0) || skip->size(2) != h || skip->size(3) != w) {
      fail(kOp, "skip: expected sizes [", x.size(0), ", any, ", h, ", ", w, "], got ",
           sizes_of(*skip));
    }
    check_dense(kOp, "skip", *skip, channels_last);
    p.c_skip = skip->size(1);
    p.skip = skip->const_data_ptr();
  }
  (skip_last ? p.skip_at : p.x_at) = skip_last ? p.shape.c : p.c_skip;
  const int64_t c = p.c_skip + p.shape.c;
  Tensor y = empty_image(x, x.scalar_type(), p.shape.n, c, h, w, channels_last);
  p.shape.image = c * h * w;
  p.shape.pixel = channels_last ? c : 1;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (y.numel() > 0) launch(kOp, p, x);
  return y;
}

// Channels of a wider dense tensor, or all of them: what a gradient of concatenated images is. The
// strides between its images and pixels.
void gradient_strides(const char* op, const Tensor& dy, UpsampleShape& s) {
  const int64_t h = s.rows.out, w = s.columns.out, c = s.c;
  s.pixel = 1;
  if (s.channels_last) s.pixel = w > 1 ? dy.stride(3) : h > 1 ? dy.stride(2) : c;
  const int64_t one = s.channels_last ? s.pixel * h * w : c * h * w;  // elements of an image
  s.image = s.n > 1 ? dy.stride(0) : one;
  const auto is = [&](int64_t d, int64_t stride) {
    return dy.size(d) == 1 || dy.stride(d) == stride;
  };
  const bool dense = s.channels_last ? is(1, 1) && is(3, s.pixel) && is(2, w * s.pixel)
                                     : is(3, 1) && is(2, w) && is(1, h * w);
  if (!dense || s.image < one || (s.channels_last && s.pixel < c)) {
    fail(op, "dy: expected a dense ", layout_name(s.channels_last),
         " tensor or channels of one, got sizes ", sizes_of(dy), " with other strides");
  }
}

// -> dx
template <auto launch>
Tensor bwd(const Tensor& dy, int64_t h, int64_t w, OptionalScale scale_h, OptionalScale scale_w,
           int64_t sampling, bool channels_last) {
  constexpr const char* kOp = "upsample_bwd";
  check_like(kOp, "dy", dy, dy);
  UpsampleBwdParams p{};
  p.dtype = dtype_of(kOp, "dy", dy);
  p.shape = shape_of(kOp, dy.size(0), dy.size(1), h, w, dy.size(2), dy.size(3), scale_h, scale_w,
                     sampling, channels_last);
  Tensor dx = empty_image(dy, dy.scalar_type(), p.shape.n, p.shape.c, h, w, channels_last);
  if (dx.numel() == 0) return dx;
  gradient_strides(kOp, dy, p.shape);
  p.dy = dy.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  launch(kOp, p, dy);
  return dx;
}

#ifdef FASTCNN_WITH_CUDA
int64_t workspace(const UpsampleShape& shape, DType, const CudaDevice&) {
  return upsample_workspace(shape);
}
#endif

}  // namespace

using FwdParams = UpsampleFwdParams;
using BwdParams = UpsampleBwdParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("upsample_fwd", TORCH_BOX((&fwd<on_cpu<upsample_fwd_cpu, FwdParams>>)));
  m.impl("upsample_bwd", TORCH_BOX((&bwd<on_cpu<upsample_bwd_cpu, BwdParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("upsample_fwd",
         TORCH_BOX((&fwd<on_cuda_with_workspace<launch_upsample_fwd, workspace, FwdParams>>)));
  m.impl("upsample_bwd",
         TORCH_BOX((&bwd<on_cuda_with_workspace<launch_upsample_bwd, workspace, BwdParams>>)));
}
#endif

}  // namespace fastcnn
