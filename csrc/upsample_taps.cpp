// upsample_taps between torch and the kernels: what fastcnn/ops/upsample_conv2d/taps.py declares,
// here checked, allocated and called.
#include "upsample_taps.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "bindings/check.h"

namespace fastcnn {
namespace {

using OptionalScale = std::optional<double>;

Axis axis_of(const char* op, const char* name, int64_t in, int64_t out,
             const OptionalScale& scale) {
  if (in < 1 || in > kMaxPixels || out < 1 || out > kMaxPixels) {
    fail(op, name, ": expected 1 to ", kMaxPixels, " pixels, got ", in, " to be resized to ", out);
  }
  if (!scale) return {in, out, 0};
  // Tables count on a scale that agrees with the sizes: no pixel is in more outputs than that.
  if (!(*scale > 0) || std::floor(static_cast<double>(in) * *scale) != static_cast<double>(out)) {
    fail(op, name, ": expected a scale that makes ", out, " pixels of ", in, ", got ", *scale);
  }
  return {in, out, *scale};
}

// Checks an image, and gives params all but the axes and pointers; -> its height and width.
void read(const char* op, const char* name, const Tensor& t, int64_t sampling,
          UpsampleTapsParams& p) {
  if (t.dim() != 4 || !t.is_cpu()) {
    fail(op, name, ": expected a CPU tensor [n, c, h, w], got sizes ", sizes_of(t));
  }
  check_storage(op, name, t);
  if (!is_dense(t, true)) fail(op, name, ": expected the channels_last layout, got other strides");
  if (sampling < 0 || sampling >= kSamplingCount) {
    fail(op, "sampling: expected 0 to ", kSamplingCount - 1, ", got ", sampling);
  }
  p.n = t.size(0);
  p.dtype = dtype_of(op, name, t);
  p.sampling = static_cast<Sampling>(sampling);
  p.from = t.const_data_ptr();
}

// -> y
Tensor fwd(const Tensor& z, int64_t h, int64_t w, OptionalScale scale_h, OptionalScale scale_w,
           int64_t sampling) {
  constexpr const char* kOp = "upsample_taps_fwd";
  UpsampleTapsParams p{};
  read(kOp, "z", z, sampling, p);
  if (z.size(1) % kTaps != 0) {
    fail(kOp, "z: expected a multiple of ", kTaps, " channels, got ", z.size(1));
  }
  p.c = z.size(1) / kTaps;
  p.rows = axis_of(kOp, "h", z.size(2), h, scale_h);
  p.columns = axis_of(kOp, "w", z.size(3), w, scale_w);
  Tensor y = empty_image(z, z.scalar_type(), p.n, p.c, h, w, true);
  p.to = y.mutable_data_ptr();
  if (y.numel() > 0) upsample_taps_fwd_cpu(p);
  return y;
}

// -> dz
Tensor bwd(const Tensor& dy, int64_t h, int64_t w, OptionalScale scale_h, OptionalScale scale_w,
           int64_t sampling) {
  constexpr const char* kOp = "upsample_taps_bwd";
  UpsampleTapsParams p{};
  read(kOp, "dy", dy, sampling, p);
  p.c = dy.size(1);
  p.rows = axis_of(kOp, "h", h, dy.size(2), scale_h);
  p.columns = axis_of(kOp, "w", w, dy.size(3), scale_w);
  if (p.c > INT32_MAX) fail(kOp, "dy: expected at most 2^31 - 1 channels, got ", p.c);
  Tensor dz = empty_image(dy, dy.scalar_type(), p.n, kTaps * p.c, h, w, true);
  p.to = dz.mutable_data_ptr();
  if (dz.numel() > 0) upsample_taps_bwd_cpu(p);
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("upsample_taps_fwd", TORCH_BOX((&fwd)));
  m.impl("upsample_taps_bwd", TORCH_BOX((&bwd)));
}

}  // namespace fastcnn
