// Element types, layouts and activations as every kernel sees them. No torch header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTCNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTCNN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastcnn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A dense image batch of logical shape [n, c, h, w] with hw = h * w.
//   NCHW:          element (i, j, p) lies at (i * c + j) * hw + p
//   channels_last: element (i, j, p) lies at (i * hw + p) * c + j
struct ImageShape {
  int64_t n, c, hw;
  bool channels_last;

  FASTCNN_HOST_DEVICE int64_t numel() const { return n * c * hw; }
  FASTCNN_HOST_DEVICE int64_t per_channel() const { return n * hw; }
};

}  // namespace fastcnn
