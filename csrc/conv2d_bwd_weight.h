// conv2d_bwd_weight: the gradient of a convolution's weight, in bfloat16 on CPUs that have its dot
// product (AVX512-BF16).
//   dweight[o, i, a, b] = sum over n, y, x of
//                         dy[n, o, y, x] * x[n, i, y * stride + a * dilation - padding, likewise x]
// What the kernel sees: sizes and pointers. No torch header.
#pragma once

#include <cstdint>

namespace fastcnn {

struct Conv2dBwdWeightParams {
  int64_t n, c_in, h, w, c_out, h_out, w_out;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  const uint16_t* dy;  // [n, c_out, h_out, w_out] bfloat16, channels_last
  const uint16_t* x;   // [n, c_in, h, w] bfloat16, channels_last
  uint16_t* dweight;   // [c_out, c_in, kernel_h, kernel_w] bfloat16, channels_last
};

namespace avx512_bf16 {
void conv2d_bwd_weight_cpu(const Conv2dBwdWeightParams& p);
}

}  // namespace fastcnn
