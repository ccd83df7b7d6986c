// Sums over the batch in two stages, in a fixed order and without atomics: the lanes of a block
// merge what they hold, each block writes one partial value a channel, and a last kernel merges
// those.
#pragma once

#include "common/variance.h"
#include "cuda/columns.cuh"
#include "cuda/shared_memory.cuh"

namespace fastcnn {

__device__ inline float rstd_of(float var, double eps) {
  return rsqrtf(var + static_cast<float>(eps));
}

// mean + step towards `target`. A mean that is not finite has no way to go: PyTorch's is then the
// sum over the count, which is infinite where all such values are, and inf - inf would be NaN.
__device__ inline float moved_mean(float mean, float target, float step) {
  const float moved = mean + step;
  return moved == moved ? moved : mean + target;
}

// Count, mean and squares around the mean of some values; merged by Chan's formula.
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  __device__ void merge(float other_count, float other_mean, float other_m2) {
    if (other_count == 0) return;
    const float total = count + other_count;
    const float delta = other_mean - mean, share = other_count / total;
    mean = moved_mean(mean, other_mean, delta * share);
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
  __device__ float var() const { return variance_of(mean, m2 / count); }
};

// What the backward of a normalisation adds up.
struct Sums {
  float dz = 0, dzx = 0;  // sum(dz), sum(dz * (x - mean))
};

struct MergeSums {
  __device__ void operator()(Sums& a, const Sums& b) const {
    a.dz += b.dz;
    a.dzx += b.dzx;
  }
};

// Merges what the lanes of a block hold, value by value: a tree in shared memory, in a fixed order.
// Lane l of a column is thread l * columns + column. Every thread calls it; lane 0 gets the result.
template <int kCount, class Value, class Merge>
__device__ void merge_lanes(Value (&values)[kCount], int columns, int lanes, Merge merge) {
  Value* shared = shared_memory<Value>();
  const int lane = threadIdx.x / columns;
  for (int s = 0; s < kCount; ++s) shared[threadIdx.x * kCount + s] = values[s];
  for (int left = lanes, half; left > 1; left = half) {
    half = (left + 1) / 2;
    __syncthreads();
    if (lane < left - half) {
      for (int s = 0; s < kCount; ++s) {
        merge(shared[threadIdx.x * kCount + s],
              shared[(threadIdx.x + half * columns) * kCount + s]);
      }
    }
  }
  if (lane == 0) {  // its own slot: no barrier needed
    for (int s = 0; s < kCount; ++s) values[s] = shared[threadIdx.x * kCount + s];
  }
}

struct MergeMoments {
  __device__ void operator()(Moments& a, const Moments& b) const { a.merge(b.count, b.mean, b.m2); }
};

// Merges what the lanes of a block hold and writes it to partial [splits, c], c counted in columns.
template <int kCount, class Value, class Merge>
__device__ void write_partial(Value (&values)[kCount], const ColumnPlan& plan, int64_t c,
                              int64_t column, bool active, Value* partial, Merge merge) {
  merge_lanes(values, plan.columns, plan.lanes, merge);
  if (threadIdx.x / plan.columns == 0 && active) {
    for (int s = 0; s < kCount; ++s) partial[blockIdx.y * c + column + s] = values[s];
  }
}

// A block merges the splits of 8 channels with 32 lanes: a lane has few of them, one after another,
// and 8 neighbouring partial values fill 3 sectors of 32 bytes.
constexpr int kFinalizeColumns = 8, kFinalizeLanes = 32;

// `repeat`: neighbouring columns of partial [splits, c * repeat] that are one channel.
template <class Value, class Merge>
__device__ Value merge_splits(const Value* partial, int splits, int64_t c, int64_t channel,
                              Merge merge, int64_t repeat = 1) {
  Value total[1] = {};
  const int64_t count = channel < c ? splits * repeat : 0;
  const auto at = [&](int64_t i) {
    const int64_t split = repeat == 1 ? i : i / repeat;
    return partial[(split * c + channel) * repeat + (i - split * repeat)];
  };
  int64_t i = threadIdx.x / kFinalizeColumns;
  for (; i + (kUnroll - 1) * kFinalizeLanes < count; i += kUnroll * kFinalizeLanes) {
    Value values[kUnroll];  // asked for together, then merged
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = at(i + u * kFinalizeLanes);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) merge(total[0], values[u]);
  }
  for (; i < count; i += kFinalizeLanes) merge(total[0], at(i));
  merge_lanes(total, kFinalizeColumns, kFinalizeLanes, merge);
  return total[0];
}

__device__ inline int64_t finalize_channel() {
  return blockIdx.x * static_cast<int64_t>(kFinalizeColumns) + threadIdx.x % kFinalizeColumns;
}

}  // namespace fastcnn
