// augment between torch and the kernels: what fastcnn/ops/augment/interface.py declares, here
// checked, allocated and launched.
#include "augment.h"

#include <torch/csrc/stable/library.h>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

using torch::headeronly::toString;

constexpr int64_t kMaxSide = 1 << 24;  // integers that a float holds

// A dense matrix of `rows` x `columns` where the images are.
const void* table(const char* op, const char* name, const Tensor& t, const Tensor& images,
                  ScalarType type, int64_t rows, int64_t columns) {
  if (t.device() != images.device()) {
    fail(op, name, ": expected ", device_of(images), " as the first argument, got ", device_of(t));
  }
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns || t.scalar_type() != type ||
      !t.is_contiguous()) {
    fail(op, name, ": expected a dense matrix [", rows, ", ", columns, "] of ", toString(type),
         ", got sizes ", sizes_of(t), " of ", toString(t.scalar_type()));
  }
  check_storage(op, name, t);
  return t.const_data_ptr();
}

// Sizes that the kernels' arithmetic holds: one sample's offsets fit into 32 bits.
void check_sizes(const char* op, int64_t c, int64_t h_in, int64_t w_in, int64_t h, int64_t w) {
  const auto fits = [](int64_t side) { return side > 0 && side <= kMaxSide; };
  if (!fits(h) || !fits(w)) {
    fail(op, "h, w: expected 1 to ", kMaxSide, ", got ", h, " and ", w);
  }
  if (!fits(h_in) || !fits(w_in) || h_in * w_in > INT32_MAX / c) {
    fail(op, "expected samples of at least one pixel and less than 2^31 elements, got ", c, " x ",
         h_in, " x ", w_in);
  }
}

template <auto launch>
Tensor augment(const Tensor& images, const Tensor& reals, const Tensor& integers,
               const Tensor& channels, int64_t h, int64_t w, int64_t dtype, bool channels_last) {
  constexpr const char* kOp = "augment";
  if (images.dim() != 4 || images.scalar_type() != ScalarType::Byte) {
    fail(kOp, "images: expected uint8 of 4 dimensions [n, c, h, w], got sizes ", sizes_of(images),
         " of ", toString(images.scalar_type()));
  }
  check_storage(kOp, "images", images);
  AugmentParams p{};
  p.n = images.size(0);
  p.c = images.size(1);
  p.h_in = images.size(2);
  p.w_in = images.size(3);
  p.h = h;
  p.w = w;
  if (p.c != 1 && p.c != 3) fail(kOp, "images: expected 1 or 3 channels, got ", p.c);
  check_sizes(kOp, p.c, p.h_in, p.w_in, h, w);
  p.in_channels_last = !is_dense(images, false);
  if (p.in_channels_last && !is_dense(images, true)) {
    fail(kOp, "images: expected a dense NCHW or channels_last tensor, got sizes ", sizes_of(images),
         " with other strides; call .contiguous() first");
  }
  if (dtype < 0 || dtype > static_cast<int64_t>(DType::kFloat16)) {
    fail(kOp, "dtype: expected 0 to 2, got ", dtype);
  }
  p.dtype = static_cast<DType>(dtype);
  p.channels_last = channels_last;
  p.images = static_cast<const uint8_t*>(images.const_data_ptr());
  p.samples = static_cast<const AugmentSample*>(
      table(kOp, "reals", reals, images, ScalarType::Float, p.n, kAugmentReals));
  p.integers = static_cast<const AugmentIntegers*>(
      table(kOp, "integers", integers, images, ScalarType::Long, p.n, kAugmentIntegers));
  p.channels = static_cast<const AugmentChannel*>(
      table(kOp, "channels", channels, images, ScalarType::Float, p.c, kAugmentChannelReals));
  static constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16,
                                          ScalarType::Half};
  Tensor y = empty_image(images, kTypes[dtype], p.n, p.c, h, w, channels_last);
  p.y = y.mutable_data_ptr();
  if (p.n > 0) launch(kOp, p, images);
  return y;
}

template <auto launch>
Tensor augment_mask(const Tensor& masks, const Tensor& reals, int64_t h, int64_t w, int64_t fill) {
  constexpr const char* kOp = "augment_mask";
  const bool wide = masks.scalar_type() == ScalarType::Long;
  if (masks.dim() != 3 || !(wide || masks.scalar_type() == ScalarType::Byte) ||
      !masks.is_contiguous()) {
    fail(kOp, "masks: expected dense uint8 or int64 of 3 dimensions [n, h, w], got sizes ",
         sizes_of(masks), " of ", toString(masks.scalar_type()));
  }
  check_storage(kOp, "masks", masks);
  AugmentMaskParams p{};
  p.n = masks.size(0);
  p.h_in = masks.size(1);
  p.w_in = masks.size(2);
  p.h = h;
  p.w = w;
  check_sizes(kOp, 1, p.h_in, p.w_in, h, w);
  p.wide = wide;
  p.fill = fill;
  p.masks = masks.const_data_ptr();
  p.samples = static_cast<const AugmentSample*>(
      table(kOp, "reals", reals, masks, ScalarType::Float, p.n, kAugmentReals));
  Tensor y = torch::stable::new_empty(masks, {p.n, h, w});
  p.y = y.mutable_data_ptr();
  if (p.n > 0) launch(kOp, p, masks);
  return y;
}

#ifdef FASTCNN_WITH_CUDA
void augment_on_cuda(const char* op, const AugmentParams& p, const Tensor& images) {
  const CudaCall call(op, images);
  Tensor workspace = call.workspace(augment_workspace(p));
  call.check(launch_augment(p, static_cast<float*>(workspace.mutable_data_ptr()), call.device()));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("augment", TORCH_BOX((&augment<on_cpu<augment_cpu, AugmentParams>>)));
  m.impl("augment_mask", TORCH_BOX((&augment_mask<on_cpu<augment_mask_cpu, AugmentMaskParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("augment", TORCH_BOX((&augment<augment_on_cuda>)));
  m.impl("augment_mask",
         TORCH_BOX((&augment_mask<on_cuda<launch_augment_mask, AugmentMaskParams>>)));
}
#endif

}  // namespace fastcnn
