// The forward of a normalisation whose slabs (the values that share a statistic) are small: one
// kernel that reads x once, from then on from shared memory, and writes y: 2T.
//
// A block has per_block slabs of `lanes` threads each; a slab's threads take its vectors in turn,
// and each finds in shared memory what it put there itself. Statistics in two passes: the sum, then
// deviations and squares around the mean, whose rounding the deviations' sum corrects.
#pragma once

#include <cstdint>

#include "common/columns.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/shared_memory.cuh"
#include "group_norm_act.h"

namespace fastcnn {

constexpr int kSlabThreads = 512;
// What a block may hold: less than the 99 KB of sm_86 and sm_89, the least from sm_80 on, and twice
// of it are on an SM of sm_80 (164 KB) almost, and of sm_90 (228 KB).
constexpr int64_t kSlabBytes = 80 << 10;

struct SlabPlan {
  int vector;     // elements of a vector: 16 bytes of them, or 1
  int lanes;      // threads of a slab, a power of two
  int per_block;  // slabs of a block
  bool fits;      // the numbers below do
  bool held;      // in shared memory; else read from global memory three times
  int64_t slabs;  // n * groups
  // Vectors; 32 bits, whose division has no branch that would part the loads:
  int vectors;    // of a slab
  int per_pixel;  // of a pixel's channels of the slab (channels_last)
  int per_plane;  // of a channel's pixels (NCHW)
};

inline SlabPlan plan_slabs(const ImageShape& shape, int64_t groups, int element_bytes,
                           bool aligned) {
  SlabPlan plan{};
  const int64_t per_group = shape.c / groups, size = per_group * shape.hw;
  const int wide = 16 / element_bytes;
  const int64_t row = shape.channels_last ? per_group : shape.hw;  // must be whole vectors
  plan.vector = aligned && row % wide == 0 ? wide : 1;
  plan.slabs = shape.n * groups;
  plan.fits = size <= INT32_MAX / 2;
  if (!plan.fits) return plan;
  plan.vectors = static_cast<int>(size / plan.vector);
  plan.per_pixel = static_cast<int>(per_group / (shape.channels_last ? plan.vector : 1));
  plan.per_plane = static_cast<int>(shape.hw / (shape.channels_last ? 1 : plan.vector));
  plan.held = size * element_bytes <= kSlabBytes;
  plan.lanes = 1;
  while (plan.lanes < kSlabThreads && plan.lanes * 2 * kUnroll <= plan.vectors) plan.lanes *= 2;
  plan.per_block = plan.lanes < kThreads ? kThreads / plan.lanes : 1;
  return plan;
}

// The sum over the `lanes` neighbouring threads of a slab, for all of them, in a fixed order. Every
// thread of the block calls it; `shared` has a float for each.
__device__ inline float sum_of_slab(float value, int lanes, float* shared) {
  const int lane = threadIdx.x % lanes;
  shared[threadIdx.x] = value;
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  const float sum = shared[threadIdx.x - lane];
  __syncthreads();  // the next call writes there
  return sum;
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kSlabThreads, 1)
    slab_norm_act_fwd_kernel(GroupNormActFwdParams p, SlabPlan plan) {
  using Vector = Pack<T, kVector>;
  const int lanes = plan.lanes, lane = threadIdx.x % lanes, own = threadIdx.x / lanes;
  const int64_t slab = blockIdx.x * static_cast<int64_t>(plan.per_block) + own;
  const bool active = slab < plan.slabs;
  const int vectors = active ? plan.vectors : 0;
  const int64_t per_group = p.shape.c / p.groups, group = slab % p.groups;
  const int64_t begin = kChannelsLast ? slab / p.groups * p.shape.hw * p.shape.c + group * per_group
                                      : slab * per_group * p.shape.hw;
  float* sums = shared_memory<float>();
  Vector* held =
      reinterpret_cast<Vector*>(sums + blockDim.x) + static_cast<int64_t>(own) * plan.vectors;
  const T* x = static_cast<const T*>(p.x) + begin;
  T* y = static_cast<T*>(p.y) + begin;

  const auto offset = [&](int i) {  // of the slab's vector i
    if constexpr (kChannelsLast) {
      const int pixel = i / plan.per_pixel;
      return pixel * p.shape.c + (i - pixel * plan.per_pixel) * kVector;
    } else {
      return static_cast<int64_t>(i) * kVector;
    }
  };
  const auto fetch = [&](int i) { return *reinterpret_cast<const Vector*>(x + offset(i)); };
  const auto again = [&](int i) { return plan.held ? held[i] : fetch(i); };

  float sum = 0;
  const auto take = [&](int i, const Vector& values) {
    if (plan.held) held[i] = values;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum += to_float(values.values[v]);
  };
  int i = lane;
  for (; i + (kUnroll - 1) * lanes < vectors; i += kUnroll * lanes) {
    Vector values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = fetch(i + u * lanes);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) take(i + u * lanes, values[u]);
  }
  for (; i < vectors; i += lanes) take(i, fetch(i));
  const float inverse = 1.f / static_cast<float>(per_group * p.shape.hw);
  float center = sum_of_slab(sum, lanes, sums) * inverse;
  if (center - center != 0)
    center = 0;  // the mean is to be the sum over the count: common/reduce.cuh

  float deviations = 0, squares = 0;
  for (i = lane; i < vectors; i += lanes) {
    const Vector values = again(i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float a = to_float(values.values[v]) - center;
      deviations += a;
      squares += a * a;
    }
  }
  deviations = sum_of_slab(deviations, lanes, sums);
  const float drift = deviations * inverse;
  const float var = (sum_of_slab(squares, lanes, sums) - deviations * drift) * inverse;
  const float mean = center + drift;
  const float rstd = rstd_of(var, p.eps);
  if (active && lane == 0) {
    static_cast<float*>(p.mean)[slab] = mean;
    static_cast<float*>(p.var)[slab] = var;
  }

  const float *weight = static_cast<const float*>(p.weight),
              *bias = static_cast<const float*>(p.bias);
  for (i = lane; i < vectors; i += lanes) {
    const Vector values = again(i);
    // Of the vector's first element, or of all (NCHW).
    const int64_t channel =
        group * per_group + (kChannelsLast ? i % plan.per_pixel * kVector : i / plan.per_plane);
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int64_t c = channel + (kChannelsLast ? v : 0);
      const float scale = weight == nullptr ? rstd : rstd * weight[c];
      const float added = bias == nullptr ? 0.f : bias[c];
      out[v] = (to_float(values.values[v]) - mean) * scale + added;
    }
    act_fwd(p.act, out);
    store(y + offset(i), out);
  }
}

inline cudaError_t launch_slab_norm_act_fwd(const GroupNormActFwdParams& p, const SlabPlan& plan,
                                            const CudaDevice& device) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const int64_t blocks = (plan.slabs + plan.per_block - 1) / plan.per_block;
  if (!fits_a_grid(blocks)) return cudaErrorInvalidValue;
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    const auto kernel = slab_norm_act_fwd_kernel<decltype(t), kVector, cl.value>;
    const int threads = plan.lanes * plan.per_block;
    const int64_t held =
        plan.held ? int64_t{plan.per_block} * plan.vectors * kVector * sizeof(t) : 0;
    const int bytes = static_cast<int>(threads * sizeof(float) + held);
    return launch(device, dim3(static_cast<unsigned>(blocks)), threads, bytes, kernel, p, plan);
  });
}

}  // namespace fastcnn
