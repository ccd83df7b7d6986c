// augment and augment_mask on CUDA.
//
// Data movement: a thread owns kVector neighbouring pixels of one output row with all their
// channels. It reads four bytes a pixel and channel through the read-only cache (neighbouring
// threads read neighbouring places, up to the sample's rotation) and writes whole 16-byte words
// where the row's length and the addresses allow it, else single elements. y is written once.
// A sample whose contrast changes is sampled once more before: `gray` leaves one sum a block, and
// every block of the second kernel adds up its sample's in the same order. No atomics: the same
// bits from run to run. Samples that change no contrast cost the first kernel one read each.
#include "augment.h"
#include "common/color.h"
#include "common/normal.h"
#include "common/philox.h"
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/shared_memory.cuh"

namespace fastcnn {
namespace {

constexpr int kGrayBlocks = 16;       // of a sample: their sums are added by each block
constexpr int64_t kMaxGridY = 65535;  // samples side by side; a block walks to the next ones

struct Root {
  __device__ float operator()(float x) const { return sqrtf(x); }
};

__device__ float at_least_zero(float v) { return v > 0.f ? v : 0.f; }

// The grey levels of one output pixel: bilinear, as csrc/cpu/augment/augment.cpp tells it.
template <int kChannels>
__device__ void sample_pixel(const AugmentParams& p, const AugmentSample& s, int64_t sample,
                             int64_t row, int64_t column, float (&levels)[kChannels]) {
  const float u = s.u(static_cast<float>(column)), v = s.v(static_cast<float>(row));
  const float x = s.x(u, v), y = s.y(u, v);
  int64_t right = p.w_in > 1 ? 1 : 0, below = p.h_in > 1 ? 1 : 0;
  const float x_base = static_cast<float>(p.w_in - 1 - right);
  const float y_base = static_cast<float>(p.h_in - 1 - below);
  const int left = static_cast<int>(AugmentSample::clamp(x, 0.f, x_base));
  const int top = static_cast<int>(AugmentSample::clamp(y, 0.f, y_base));
  const float from_left = x - static_cast<float>(left), from_top = y - static_cast<float>(top);
  const float w_left = at_least_zero(1.f - fabsf(from_left));
  const float w_right = right ? at_least_zero(1.f - fabsf(from_left - 1.f)) : 0.f;
  const float w_top = at_least_zero(1.f - fabsf(from_top));
  const float w_bottom = below ? at_least_zero(1.f - fabsf(from_top - 1.f)) : 0.f;
  const float outside = 1.f - (w_left + w_right) * (w_top + w_bottom);
  const int64_t pixel = p.in_channels_last ? kChannels : 1;
  const int64_t plane = p.in_channels_last ? 1 : p.h_in * p.w_in;
  const uint8_t* first = p.images + sample * kChannels * p.h_in * p.w_in +
                         (static_cast<int64_t>(top) * p.w_in + left) * pixel;
  right *= pixel;
  below *= p.w_in * pixel;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    const uint8_t* at = first + j * plane;
    const float upper =
        static_cast<float>(at[0]) * w_left + static_cast<float>(at[right]) * w_right;
    const float lower =
        static_cast<float>(at[below]) * w_left + static_cast<float>(at[below + right]) * w_right;
    levels[j] = upper * w_top + lower * w_bottom + outside * p.channels[j].fill;
  }
}

template <int kChannels>
__device__ float gray_of(const float (&levels)[kChannels]) {
  if constexpr (kChannels == 3) {
    return gray(levels[0], levels[1], levels[2]);
  } else {
    return levels[0];
  }
}

// partial: [n, kGrayBlocks], the sums of the grey levels after brightness
template <int kChannels>
__global__ void __launch_bounds__(kThreads) augment_gray_kernel(AugmentParams p, float* partial) {
  float* sums = shared_memory<float>();
  for (int64_t sample = blockIdx.y; sample < p.n; sample += gridDim.y) {
    const AugmentSample s = p.samples[sample];
    if (s.contrast == 1.f) continue;  // the whole block
    float sum = 0;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < p.h * p.w;
         i += kGrayBlocks * kThreads) {
      float levels[kChannels];
      sample_pixel(p, s, sample, i / p.w, i % p.w, levels);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] * s.brightness);
      sum += gray_of(levels);
    }
    sums[threadIdx.x] = sum;
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[sample * kGrayBlocks + blockIdx.x] = sums[0];
    __syncthreads();
  }
}

template <int kChannels>
__device__ void colour(const AugmentSample& s, float mean, int64_t seed, int64_t pixel,
                       float (&levels)[kChannels]) {
  if (s.brightness != 1.f) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] * s.brightness);
  }
  if (s.contrast != 1.f) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) levels[j] = blend(levels[j], mean, s.contrast);
  }
  if constexpr (kChannels == 3) {  // grey stays as it is, as in torchvision
    if (s.saturation != 1.f) {
      const float towards = gray_of(levels);
#pragma unroll
      for (int j = 0; j < kChannels; ++j) levels[j] = blend(levels[j], towards, s.saturation);
    }
    if (s.hue != 0.f) turn_hue(levels[0], levels[1], levels[2], s.hue);
  }
  if (s.noise != 0.f) {
    uint64_t words[4] = {static_cast<uint64_t>(pixel), static_cast<uint64_t>(pixel) >> 32, 0, 0};
    philox4x32_10(words, PhiloxKeys(static_cast<uint64_t>(seed)), MultiplyScalar{});
    float normal[4];
    normal_pair(static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), Root{}, normal[0],
                normal[1]);
    if constexpr (kChannels > 2) {
      normal_pair(static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3]), Root{},
                  normal[2], normal[3]);
    }
#pragma unroll
    for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] + normal[j] * s.noise);
  }
}

// blockIdx.x: kThreads groups of kVector pixels of a sample; w is whole groups.
template <class T, int kVector, int kChannels>
__global__ void __launch_bounds__(kThreads) augment_kernel(AugmentParams p, const float* partial) {
  const int64_t groups = p.w / kVector;
  const int64_t group = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (group >= groups * p.h) return;
  const int64_t row = group / groups, column = group % groups * kVector;
  for (int64_t sample = blockIdx.y; sample < p.n; sample += gridDim.y) {
    const AugmentSample s = p.samples[sample];
    const AugmentIntegers marks = p.integers[sample];
    float mean = 0;
    if (s.contrast != 1.f) {
      for (int i = 0; i < kGrayBlocks; ++i) mean += partial[sample * kGrayBlocks + i];
      mean /= static_cast<float>(p.h * p.w);
    }
    float out[kChannels][kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      float levels[kChannels];
      sample_pixel(p, s, sample, row, column + k, levels);
      colour(s, mean, marks.seed, row * p.w + column + k, levels);
      const bool erased = marks.top <= row && row < marks.bottom && marks.left <= column + k &&
                          column + k < marks.right;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const AugmentChannel& channel = p.channels[j];
        out[j][k] = erased ? channel.erased : levels[j] * channel.scale + channel.shift;
      }
    }
    T* y = static_cast<T*>(p.y) + sample * kChannels * p.h * p.w;
    if (p.channels_last) {
      T* to = y + (row * p.w + column) * kChannels;
#pragma unroll
      for (int word = 0; word < kChannels; ++word) {
        float mixed[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const int element = word * kVector + k;
          mixed[k] = out[element % kChannels][element / kChannels];
        }
        store(to + word * kVector, mixed);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) store(y + (j * p.h + row) * p.w + column, out[j]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) augment_mask_kernel(AugmentMaskParams p) {
  const int64_t pixel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (pixel >= p.h * p.w) return;
  const int64_t row = pixel / p.w, column = pixel % p.w;
  const float width = static_cast<float>(p.w_in), height = static_cast<float>(p.h_in);
  for (int64_t sample = blockIdx.y; sample < p.n; sample += gridDim.y) {
    const AugmentSample s = p.samples[sample];
    const float u = s.u(static_cast<float>(column)), v = s.v(static_cast<float>(row));
    const float x = s.x(u, v) + 0.5f, y = s.y(u, v) + 0.5f;  // halves go up
    T value = static_cast<T>(p.fill);
    if (x >= 0.f && x < width && y >= 0.f && y < height) {
      value = static_cast<const T*>(
          p.masks)[(sample * p.h_in + static_cast<int64_t>(y)) * p.w_in + static_cast<int64_t>(x)];
    }
    static_cast<T*>(p.y)[sample * p.h * p.w + pixel] = value;
  }
}

// ---- launching ---------------------------------------------------------------------------------

dim3 grid_of(int64_t threads, int64_t n) {
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
              static_cast<unsigned>(n < kMaxGridY ? n : kMaxGridY));
}

template <int kChannels>
int launch_images(const AugmentParams& p, float* partial, const CudaDevice& device) {
  const cudaError_t error =
      launch(device, grid_of(kGrayBlocks * kThreads, p.n), kThreads, kThreads * sizeof(float),
             augment_gray_kernel<kChannels>, p, partial);
  if (error != cudaSuccess) return error;
  const int wide = 16 / element_bytes(p.dtype);
  const int vector = aligned({p.y}) && p.w % wide == 0 ? wide : 1;
  return dispatch(p.dtype, vector, false, [&](auto t, auto width, auto) {
    constexpr int kVector = decltype(width)::value;
    return launch(device, grid_of(p.h * (p.w / kVector), p.n), kThreads, 0,
                  augment_kernel<decltype(t), kVector, kChannels>, p,
                  static_cast<const float*>(partial));
  });
}

}  // namespace

int64_t augment_workspace(const AugmentParams& p) { return p.n * kGrayBlocks; }

int launch_augment(const AugmentParams& p, float* workspace, const CudaDevice& device) {
  return p.c == 1 ? launch_images<1>(p, workspace, device) : launch_images<3>(p, workspace, device);
}

int launch_augment_mask(const AugmentMaskParams& p, const CudaDevice& device) {
  const dim3 grid = grid_of(p.h * p.w, p.n);
  return p.wide ? launch(device, grid, kThreads, 0, augment_mask_kernel<int64_t>, p)
                : launch(device, grid, kThreads, 0, augment_mask_kernel<uint8_t>, p);
}

}  // namespace fastcnn
