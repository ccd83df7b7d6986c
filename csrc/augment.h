// augment: y = normalise(noise(colour(image at affine(crop(flip(pixel)))))), with numbers of each
// sample's own; fastcnn/ops/augment/interface.py has the formula.
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// One row of `reals`, column by column. Coordinates are of pixels' centres, the first at 0.
struct AugmentSample {
  // Output (column, row) to a place in the crop: u = clamp(u_step * column + u_start, 0, u_last).
  float u_step, u_start, u_last;
  float v_step, v_start, v_last;
  // The crop to the source: x = xu * u + xv * v + x0.
  float xu, xv, x0;
  float yu, yv, y0;
  float brightness, contrast, saturation;  // factors, 1: unchanged
  float hue;                               // in turns
  float noise;                             // standard deviation in grey levels

  template <class V>
  FASTCNN_HOST_DEVICE static V clamp(V value, float low, float high) {  // a NaN becomes low
    const V least = V{} + low, most = V{} + high;
    return value > least ? (value < most ? value : most) : least;
  }
  template <class V>
  FASTCNN_HOST_DEVICE V u(V column) const {
    return clamp(column * u_step + u_start, 0.f, u_last);
  }
  FASTCNN_HOST_DEVICE float v(float row) const {
    return clamp(row * v_step + v_start, 0.f, v_last);
  }
  template <class V>
  FASTCNN_HOST_DEVICE V x(V u, float v) const {
    return u * xu + (v * xv + x0);
  }
  template <class V>
  FASTCNN_HOST_DEVICE V y(V u, float v) const {
    return u * yu + (v * yv + y0);
  }
};
constexpr int64_t kAugmentReals = sizeof(AugmentSample) / sizeof(float);

// One row of `integers`.
struct AugmentIntegers {
  int64_t top, left, bottom, right;  // the erased rectangle of the output; bottom, right excluded
  int64_t seed;                      // of the noise
};
constexpr int64_t kAugmentIntegers = sizeof(AugmentIntegers) / sizeof(int64_t);

// One row of `channels`.
struct AugmentChannel {
  float scale, shift;  // y = level * scale + shift
  float fill;          // the grey level outside of the source
  float erased;        // y within the erased rectangle
};
constexpr int64_t kAugmentChannelReals = sizeof(AugmentChannel) / sizeof(float);

struct AugmentParams {
  int64_t n, c;  // c is 1 or 3
  int64_t h_in, w_in, h, w;
  bool in_channels_last, channels_last;  // of images, of y
  DType dtype;                           // of y: all but kFloat64
  const uint8_t* images;                 // [n, c, h_in, w_in]; an image has less than 2^31 bytes
  const AugmentSample* samples;          // [n]
  const AugmentIntegers* integers;       // [n]
  const AugmentChannel* channels;        // [c]
  void* y;                               // [n, c, h, w]
};

struct AugmentMaskParams {
  int64_t n, h_in, w_in, h, w;
  bool wide;                     // elements are int64, else uint8
  int64_t fill;                  // outside of the source
  const void* masks;             // [n, h_in, w_in]; a mask has less than 2^31 elements
  const AugmentSample* samples;  // [n]
  void* y;                       // [n, h, w]
};

FASTCNN_CPU_KERNEL(augment_cpu, AugmentParams)
FASTCNN_CPU_KERNEL(augment_mask_cpu, AugmentMaskParams)

// The CUDA launchers return a cudaError_t.
// workspace: augment_workspace(...) floats, uninitialised.
int64_t augment_workspace(const AugmentParams& p);
int launch_augment(const AugmentParams& p, float* workspace, const CudaDevice& device);
int launch_augment_mask(const AugmentMaskParams& p, const CudaDevice& device);

}  // namespace fastcnn
