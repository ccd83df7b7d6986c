// How a CUDA kernel walks a dense image batch channel by channel, in either layout.
//
// A block is `columns` x `lanes` threads and owns `columns` vectors of neighbouring elements of one
// pixel's channels (channels_last) or one channel (NCHW, columns = 1). Its lanes walk down the
// reduction (pixels, or a channel's vectors), in steps of lanes * splits; blockIdx.y is the split.
// Neighbouring threads read neighbouring memory in both layouts, 16 bytes each where the sizes and
// the addresses allow it (kVector elements), else one element each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/types.h"

namespace fastcnn {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors that a thread has in flight

// Loads and stores of kVector neighbouring elements, and the way from and to float.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T values[kVector];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ inline T from_float(float v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

template <int kVector, class T>
__device__ inline void load(const T* p, float (&out)[kVector]) {
  const Pack<T, kVector> pack = *reinterpret_cast<const Pack<T, kVector>*>(p);
#pragma unroll
  for (int v = 0; v < kVector; ++v) out[v] = to_float(pack.values[v]);
}

template <int kVector, class T>
__device__ inline void store(T* p, const float (&in)[kVector]) {
  Pack<T, kVector> pack;
#pragma unroll
  for (int v = 0; v < kVector; ++v) pack.values[v] = from_float<T>(in[v]);
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    // An ordinary store of a struct may be taken apart: nvcc 13.0 made eight of one in a loop over
    // rows. Past L1 is where stores go anyway.
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    __stcg(reinterpret_cast<uint4*>(p), bits);
  } else {
    *reinterpret_cast<Pack<T, kVector>*>(p) = pack;
  }
}

// The cut of one call over the card, the same for all kernels of an op.
struct ColumnPlan {
  int vector;      // elements of a vector: 16 bytes of them, or 1
  int columns;     // column vectors of a block; 1 for NCHW
  int lanes;       // kThreads / columns
  int64_t tiles;   // blocks side by side: they cover the channels
  int splits;      // blocks along the reduction
  int64_t length;  // vectors along the reduction
};

// `aligned`: every tensor of the call lies on a 16-byte address.
inline ColumnPlan plan_columns(const ImageShape& shape, int element_bytes, bool aligned,
                               int sm_count) {
  ColumnPlan plan{};
  const int wide = 16 / element_bytes;
  const int64_t row = shape.channels_last ? shape.c : shape.hw;  // must be whole vectors
  plan.vector = aligned && row % wide == 0 ? wide : 1;
  const int64_t vectors = shape.channels_last ? shape.c / plan.vector : 1;
  plan.columns = 1;
  while (plan.columns < 32 && plan.columns < vectors) plan.columns *= 2;
  plan.lanes = kThreads / plan.columns;
  plan.tiles = shape.channels_last ? (vectors + plan.columns - 1) / plan.columns : shape.c;
  plan.length = shape.channels_last ? shape.per_channel() : shape.per_channel() / plan.vector;
  // Eight blocks of 256 threads fill an SM; no more blocks than there is unrolled work for.
  const int64_t fill = (int64_t{8} * sm_count + plan.tiles - 1) / plan.tiles;
  const int64_t useful = (plan.length + plan.lanes * kUnroll - 1) / (plan.lanes * kUnroll);
  const int64_t splits = fill < useful ? fill : useful;
  plan.splits = static_cast<int>(splits < 1 ? 1 : (splits > 1024 ? 1024 : splits));
  return plan;
}

// One thread's walk: element offsets of its vectors, step by step, without a division.
template <int kVector, bool kChannelsLast>
struct Walk {
  int64_t channel;  // of the first element
  bool active;      // false: this thread's column is beyond the last channel

  __device__ Walk(const ImageShape& s, const ColumnPlan& plan) {
    const int column = threadIdx.x % plan.columns, lane = threadIdx.x / plan.columns;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * plan.lanes + lane;
    const int64_t step = static_cast<int64_t>(plan.lanes) * plan.splits;
    left_ = plan.length > first ? (plan.length - first + step - 1) / step : 0;
    if constexpr (kChannelsLast) {
      channel = (blockIdx.x * static_cast<int64_t>(plan.columns) + column) * kVector;
      offset_ = first * s.c + channel;
      advance_ = step * s.c;
    } else {
      channel = blockIdx.x;
      const int64_t per_plane = s.hw / kVector;
      within_ = first % per_plane;
      offset_ = (first / per_plane * s.c + channel) * s.hw + within_ * kVector;
      within_step_ = step % per_plane;
      advance_ = step / per_plane * s.c * s.hw + within_step_ * kVector;
      per_plane_ = per_plane;
      wrap_ = (s.c - 1) * s.hw;
    }
    active = channel < s.c;
    if (!active) left_ = 0;
  }

  __device__ int64_t left() const { return left_; }  // vectors still to come

  __device__ int64_t next() {
    const int64_t offset = offset_;
    --left_;
    offset_ += advance_;
    if constexpr (!kChannelsLast) {
      within_ += within_step_;
      if (within_ >= per_plane_) {
        within_ -= per_plane_;
        offset_ += wrap_;
      }
    }
    return offset;
  }

  // body(offsets) for kUnroll vectors at a time, then body for what is left, one at a time.
  template <class Many, class One>
  __device__ void run(Many many, One one) {
    while (left_ >= kUnroll) {
      int64_t offsets[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) offsets[u] = next();
      many(offsets);
    }
    while (left_ > 0) one(next());
  }

 private:
  int64_t left_, offset_, advance_;
  int64_t within_ = 0, within_step_ = 0, per_plane_ = 0, wrap_ = 0;
};

}  // namespace fastcnn
