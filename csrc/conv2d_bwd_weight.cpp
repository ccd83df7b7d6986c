// conv2d_bwd_weight between torch and the kernel: what fastcnn/ops/conv2d/weight_grad.py declares,
// here checked, allocated and called.
#include "conv2d_bwd_weight.h"

#include <torch/csrc/stable/library.h>

#include "bindings/check.h"
#include "cpu/capability.h"

namespace fastcnn {
namespace {

constexpr const char* kOp = "conv2d_bwd_weight";

const uint16_t* channels_last(const char* name, const Tensor& t, const Tensor& x) {
  if (t.dim() != 4 || t.scalar_type() != ScalarType::BFloat16 || !t.is_cpu()) {
    fail(kOp, name, ": expected a bfloat16 CPU tensor [n, c, h, w], got sizes ", sizes_of(t),
         " of ", torch::headeronly::toString(t.scalar_type()));
  }
  check_storage(kOp, name, t);
  if (t.size(0) != x.size(0)) {
    fail(kOp, name, ": expected a batch of ", x.size(0), " as x, got ", t.size(0));
  }
  if (!is_dense(t, true)) fail(kOp, name, ": expected the channels_last layout, got other strides");
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

// The kernel's places in one direction, or a failure: together they must give dy's size.
void check_direction(const char* name, int64_t size, int64_t size_out, int64_t kernel,
                     int64_t stride, int64_t padding, int64_t dilation) {
  constexpr int64_t kLargest = int64_t{1} << 20;  // products below stay far from overflow
  const auto within = [](int64_t value, int64_t least) {
    return value >= least && value <= kLargest;
  };
  const bool sound = within(kernel, 1) && within(stride, 1) && within(padding, 0) &&
                     within(dilation, 1) && size <= INT32_MAX;
  const int64_t reach = sound ? size + 2 * padding - dilation * (kernel - 1) - 1 : -1;
  if (reach < 0 || reach / stride + 1 != size_out) {
    fail(kOp, name, ": expected a kernel, stride, padding and dilation that lead from ", size,
         " to dy's ", size_out, ", got ", kernel, ", ", stride, ", ", padding, ", ", dilation);
  }
}

Tensor conv2d_bwd_weight(const Tensor& dy, const Tensor& x, int64_t kernel_h, int64_t kernel_w,
                         int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                         int64_t dilation_h, int64_t dilation_w) {
  if (!has_bf16_dot()) {
    fail(kOp,
         "x: expected a processor with AVX512-BF16, and FASTCNN_CPU_CAPABILITY not below "
         "avx512; use aten::convolution_backward");
  }
  Conv2dBwdWeightParams p{};
  p.x = channels_last("x", x, x);
  p.dy = channels_last("dy", dy, x);
  p.n = x.size(0), p.c_in = x.size(1), p.h = x.size(2), p.w = x.size(3);
  p.c_out = dy.size(1), p.h_out = dy.size(2), p.w_out = dy.size(3);
  p.kernel_h = kernel_h, p.kernel_w = kernel_w;
  p.stride_h = stride_h, p.stride_w = stride_w;
  p.padding_h = padding_h, p.padding_w = padding_w;
  p.dilation_h = dilation_h, p.dilation_w = dilation_w;
  check_direction("h", p.h, p.h_out, kernel_h, stride_h, padding_h, dilation_h);
  check_direction("w", p.w, p.w_out, kernel_w, stride_w, padding_w, dilation_w);
  Tensor dweight =
      empty_image(x, x.scalar_type(), p.c_out, p.c_in, kernel_h, kernel_w, /*channels_last=*/true);
  if (x.numel() == 0 || dy.numel() == 0) {
    torch::stable::zero_(dweight);
  } else {
    p.dweight = static_cast<uint16_t*>(dweight.mutable_data_ptr());
#if defined(__x86_64__)
    avx512_bf16::conv2d_bwd_weight_cpu(p);
#endif
  }
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("conv2d_bwd_weight", TORCH_BOX((&conv2d_bwd_weight)));
}

}  // namespace fastcnn
