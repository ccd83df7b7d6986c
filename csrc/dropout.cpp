// dropout between torch and the kernels: what fastcnn/ops/dropout.py declares, here checked,
// allocated and launched.
#include "dropout.h"

#include <torch/csrc/stable/library.h>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

// A view with the same logical indices, [n, c, h, w].
Tensor as_images(const char* op, const char* name, const Tensor& t, bool per_channel) {
  if (t.dim() == 4) return t;
  if (!t.is_contiguous()) {
    fail(op, name, ": expected a contiguous tensor, got sizes ", sizes_of(t),
         " with other strides; call .contiguous() first");
  }
  if (!per_channel) return torch::stable::view(t, {1, 1, 1, t.numel()});
  if (t.dim() < 3) fail(op, "x: expected [n, c, ...] with per_channel, got sizes ", sizes_of(t));
  const int64_t planes = t.size(0) * t.size(1);
  return torch::stable::view(t, {t.size(0), t.size(1), 1, planes == 0 ? 0 : t.numel() / planes});
}

template <class Launch>
void run(const char* op, const Tensor& x, const OptionalTensor& residual, const Tensor& seed,
         double p, bool per_channel, const Tensor& y, Launch launch) {
  const Tensor images = as_images(op, "x", x, per_channel);
  OptionalTensor added = residual;
  if (residual) {
    // Of their views as images the sizes may agree where these do not.
    bool same = residual->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = residual->size(d) == x.size(d);
    if (!same) {
      fail(op, "residual: expected sizes ", sizes_of(x), " as x, got ", sizes_of(*residual));
    }
    added = as_images(op, "residual", *residual, per_channel);
  }
  const Check check(op, images);
  if (!(p >= 0 && p <= 1)) fail(op, "p: expected a probability from 0 to 1, got ", p);
  check_storage(op, "seed", seed);
  if (seed.scalar_type() != ScalarType::Long || seed.numel() != 1 || seed.device() != x.device()) {
    fail(op, "seed: expected one int64 where x is, got sizes ", sizes_of(seed), " of ",
         torch::headeronly::toString(seed.scalar_type()), ", ", device_of(seed));
  }
  DropoutParams call{};
  call.shape = check.shape();
  call.dtype = check.dtype();
  call.per_channel = per_channel;
  call.threshold = keep_threshold(p);
  call.scale = keep_scale(call.threshold);
  call.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  call.x = images.const_data_ptr();
  call.residual = check.image("residual", added);
  call.y = y.mutable_data_ptr();
  if (call.shape.numel() == 0) return;
  // Elements are read where they are written, or not at all.
  const auto address = [](const void* pointer) { return reinterpret_cast<intptr_t>(pointer); };
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  const int64_t apart = address(call.residual) - address(call.y);
  if (call.residual != nullptr && apart != 0 && -bytes < apart && apart < bytes) {
    fail(op, "residual: expected x itself or memory of its own, got some that overlaps x's");
  }
  launch(op, call, x);
}

template <auto launch>
Tensor apply(const Tensor& x, const OptionalTensor& residual, const Tensor& seed, double p,
             bool per_channel) {
  Tensor y = torch::stable::empty_like(x);
  run("dropout_apply", x, residual, seed, p, per_channel, y, launch);
  return y;
}

template <auto launch>
void apply_inplace(const Tensor& x, const OptionalTensor& residual, const Tensor& seed, double p,
                   bool per_channel) {
  run("dropout_apply_", x, residual, seed, p, per_channel, x, launch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("dropout_apply", TORCH_BOX((&apply<on_cpu<dropout_apply_cpu, DropoutParams>>)));
  m.impl("dropout_apply_", TORCH_BOX((&apply_inplace<on_cpu<dropout_apply_cpu, DropoutParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("dropout_apply", TORCH_BOX((&apply<on_cuda<launch_dropout_apply, DropoutParams>>)));
  m.impl("dropout_apply_",
         TORCH_BOX((&apply_inplace<on_cuda<launch_dropout_apply, DropoutParams>>)));
}
#endif

}  // namespace fastcnn
