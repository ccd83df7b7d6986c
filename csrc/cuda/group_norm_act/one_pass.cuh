// The forward of a normalisation whose tiles (the values that share a statistic) are small: one
// kernel that reads x once, from then on from shared memory, and writes y: 2T.
//
// A block has per_block tiles of `lanes` threads each; a tile's threads take its vectors in turn,
// and each finds in shared memory what it put there itself. Statistics in two passes: the sum, then
// deviations and squares around the mean, whose rounding the deviations' sum corrects.
#pragma once

#include <cstdint>

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared_memory.cuh"
#include "group_norm_act.h"

namespace fastcnn {

constexpr int kOnePassThreads = 512;
// What a block may hold: less than the 99 KB of sm_86 and sm_89, the least from sm_80 on, and twice
// of it are on an SM of sm_80 (164 KB) almost, and of sm_90 (228 KB).
constexpr int64_t kOnePassBytes = 80 << 10;

struct OnePassPlan {
  int vector;     // elements of a vector: 16 bytes of them, or 1
  int lanes;      // threads of a tile, a power of two
  int per_block;  // tiles of a block
  bool fits;      // the numbers below do
  bool held;      // in shared memory; else read from global memory three times
  int64_t tiles;  // n * groups
  int vectors;    // of a tile
  int per_pixel;  // of a pixel's channels of the tile (channels_last)
  int per_plane;  // of a channel's pixels (NCHW)
};

inline OnePassPlan plan_one_pass(const ImageShape& shape, int64_t groups, int element_bytes,
                                 bool aligned) {
  OnePassPlan plan{};
  const int64_t per_group = shape.c / groups, size = per_group * shape.hw;
  const int wide = 16 / element_bytes;
  const int64_t row = shape.channels_last ? per_group : shape.hw;  // must be whole vectors
  plan.vector = aligned && row % wide == 0 ? wide : 1;
  plan.tiles = shape.n * groups;
  plan.fits = size <= INT32_MAX / 2;
  if (!plan.fits) return plan;
  plan.vectors = static_cast<int>(size / plan.vector);
  plan.per_pixel = static_cast<int>(per_group / (shape.channels_last ? plan.vector : 1));
  plan.per_plane = static_cast<int>(shape.hw / (shape.channels_last ? 1 : plan.vector));
  plan.held = size * element_bytes <= kOnePassBytes;
  plan.lanes = 1;
  while (plan.lanes < kOnePassThreads && plan.lanes * 2 * kUnroll <= plan.vectors) plan.lanes *= 2;
  plan.per_block = plan.lanes < kThreads ? kThreads / plan.lanes : 1;
  return plan;
}

// The sum over the `lanes` neighbouring threads of a tile, for all of them, in a fixed order. Every
// thread of the block calls it; `shared` has a float for each.
__device__ inline float sum_of_tile(float value, int lanes, float* shared) {
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

// One kernel over the tiles of a call.
cudaError_t launch_one_pass_norm_act_fwd(const GroupNormActFwdParams& p, const OnePassPlan& plan,
                                         const CudaDevice& device);

}  // namespace fastcnn
