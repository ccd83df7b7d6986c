// How a CUDA kernel walks a dense image batch channel by channel, in either layout.
//
// A block is `columns` x `lanes` threads and owns `columns` vectors of neighbouring elements of one
// pixel's channels (channels_last) or one channel (NCHW, columns = 1). Its lanes walk down the
// reduction (pixels, or a channel's vectors), in steps of lanes * splits; blockIdx.y is the split.
// Neighbouring threads read neighbouring memory in both layouts, 16 bytes each where the sizes and
// the addresses allow it (kVector elements), else one element each.
//
// NCHW planes that are no whole vectors (7x7, and 14x14 of half types) can be walked flat: as the
// columns of a matrix [n, c * hw], each of which belongs to channel column / hw. That is
// channels_last of images with one pixel, where `repeat` = hw neighbouring columns share a channel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "common/types.h"

namespace fastcnn {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors that a thread has in flight

// What kernels with __launch_bounds__(kThreads, kBlocksPerSm) leave room for: 128 registers a
// thread. Their 2 * 256 * kUnroll loads of 16 bytes are 32 KiB in flight on an SM; 4.3 TB/s over
// 132 SMs at a latency of 0.7 us (predicted) need 23 KB.
constexpr int kBlocksPerSm = 2;
// Of kernels that keep little: 80 registers a thread, and 48 KiB in flight.
constexpr int kSmallBlocksPerSm = 3;

// kVector neighbouring elements.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T values[kVector];
};

// The layout of a kernel's images: single elements have one kernel for both.
template <int kVector, bool kChannelsLast>
FASTCNN_HOST_DEVICE bool is_channels_last(const ImageShape& shape) {
  return kVector == 1 ? shape.channels_last : kChannelsLast;
}

// How many channels a thread has: one for each element of its vector, or one for all (NCHW).
template <int kVector, bool kChannelsLast>
constexpr int kSlots = kChannelsLast ? kVector : 1;

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

// Such elements as they lie in memory: to be kept in registers until each is used, since half types
// take twice the room once they are floats.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <class T, int kVector>
using Word = typename WordOf<sizeof(T) * kVector>::type;

template <int kVector, class T>
__device__ inline Word<T, kVector> load_word(const T* p) {
  return *reinterpret_cast<const Word<T, kVector>*>(p);
}

// The last time that this kernel, or the next of the call, wants it: first to leave the cache.
template <int kVector, class T>
__device__ inline Word<T, kVector> load_last(const T* p) {
  return __ldcs(reinterpret_cast<const Word<T, kVector>*>(p));
}

// An ordinary store of 16 bytes may be taken apart, of uint4 too: nvcc 13.0 made eight of one in a
// loop over rows. Past L1 is where stores go anyway.
template <int kVector, class T>
__device__ inline void store_word(T* p, Word<T, kVector> word) {
  if constexpr (sizeof(word) == sizeof(uint4)) {
    __stcg(reinterpret_cast<uint4*>(p), word);
  } else {
    *reinterpret_cast<Word<T, kVector>*>(p) = word;
  }
}

// Not wanted again soon.
template <int kVector, class T>
__device__ inline void store_last(T* p, Word<T, kVector> word) {
  __stcs(reinterpret_cast<Word<T, kVector>*>(p), word);
}

// Element v of a word, v known at compile time.
template <class T, int kVector>
__device__ inline float element(const Word<T, kVector>& word, int v) {
  Pack<T, kVector> pack;
  memcpy(&pack, &word, sizeof pack);
  return to_float(pack.values[v]);
}

template <class T, int kVector>
__device__ inline Word<T, kVector> to_word(const float (&in)[kVector]) {
  Pack<T, kVector> pack;
  Word<T, kVector> word;
#pragma unroll
  for (int v = 0; v < kVector; ++v) pack.values[v] = from_float<T>(in[v]);
  memcpy(&word, &pack, sizeof word);
  return word;
}

template <int kVector, class T>
__device__ inline void load(const T* p, float (&out)[kVector]) {
  const Word<T, kVector> word = load_word<kVector>(p);
#pragma unroll
  for (int v = 0; v < kVector; ++v) out[v] = element<T, kVector>(word, v);
}

template <int kVector, class T>
__device__ inline void store(T* p, const float (&in)[kVector]) {
  store_word<kVector>(p, to_word<T>(in));
}

// Vectors of kTensors tensors at kN places, as they lie in memory, all in flight together.
template <class T, int kVector, int kN, int kTensors>
struct Group {
  Word<T, kVector> words[kTensors][kN];

  __device__ Group(const T* const (&from)[kTensors], const int64_t (&offsets)[kN]) {
#pragma unroll
    for (int u = 0; u < kN; ++u) {
#pragma unroll
      for (int t = 0; t < kTensors; ++t) words[t][u] = load_word<kVector>(from[t] + offsets[u]);
    }
  }
  __device__ void to_floats(int tensor, int u, float (&out)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = element<T, kVector>(words[tensor][u], v);
  }
};

// Takes `left` vectors, whose offsets next() tells one after the other, kGroup at a time:
// group = load(offsets) has their loads in flight together, then each(group, u, offset) takes
// vector u of it. Offsets are int64_t[kGroup], or int64_t[1] for those that are left.
template <int kGroup, class Next, class Load, class Each>
__device__ void in_groups(int64_t left, Next next, Load load, Each each) {
#pragma unroll 1
  for (; left >= kGroup; left -= kGroup) {
    int64_t offsets[kGroup];
#pragma unroll
    for (int u = 0; u < kGroup; ++u) offsets[u] = next();
    auto group = load(offsets);
#pragma unroll
    for (int u = 0; u < kGroup; ++u) each(group, u, offsets[u]);
  }
#pragma unroll 1
  for (; left > 0; --left) {
    const int64_t offset[] = {next()};
    auto group = load(offset);
    each(group, 0, offset[0]);
  }
}

// The cut of one call over the GPU, the same for all kernels of an op.
struct ColumnPlan {
  int vector;      // elements of a vector: 16 bytes of them, or 1
  int columns;     // column vectors of a block; 1 for NCHW
  int lanes;       // kThreads / columns, what is left of the threads being idle
  int64_t tiles;   // blocks side by side: they cover the channels
  int splits;      // blocks along the reduction
  int64_t length;  // vectors along the reduction
  int64_t repeat;  // neighbouring columns of one channel: 1, or of a flat walk hw
};

// Column vectors of a block, at most `most`: all that there are, else so many that the blocks have
// equally many, about half of `most` at the least, and that the fewest threads have no lane.
inline int columns_of(int64_t vectors, int most) {
  if (vectors <= most) return static_cast<int>(vectors);
  int best = most;
  int64_t best_tiles = (vectors + most - 1) / most;
  for (int columns = most; 2 * columns > most; --columns) {
    const int64_t tiles = (vectors + columns - 1) / columns;
    const int even = static_cast<int>((vectors + tiles - 1) / tiles);
    // Busy threads are vectors * lanes of tiles * kThreads.
    if (kThreads / even * best_tiles > kThreads / best * tiles) {
      best = even;
      best_tiles = tiles;
    }
  }
  return best;
}

// `aligned`: every tensor of the call lies on a 16-byte address.
inline ColumnPlan plan_columns(const ImageShape& shape, int element_bytes, bool aligned,
                               int sm_count, int blocks_per_sm = kBlocksPerSm) {
  ColumnPlan plan{};
  const int wide = 16 / element_bytes;
  const int64_t row = shape.channels_last ? shape.c : shape.hw;  // must be whole vectors
  plan.vector = aligned && row % wide == 0 ? wide : 1;
  const int64_t vectors = shape.channels_last ? shape.c / plan.vector : 1;
  plan.columns = columns_of(vectors, 32);
  plan.lanes = kThreads / plan.columns;
  plan.tiles = shape.channels_last ? (vectors + plan.columns - 1) / plan.columns : shape.c;
  plan.length = shape.channels_last ? shape.per_channel() : shape.per_channel() / plan.vector;
  plan.repeat = 1;
  // As many blocks as are resident: more would be merged for nothing, and a last, partly filled
  // round of them leaves SMs idle. No more than there is unrolled work for.
  const int64_t fill = int64_t{blocks_per_sm} * sm_count / plan.tiles;
  const int64_t useful = (plan.length + plan.lanes * kUnroll - 1) / (plan.lanes * kUnroll);
  const int64_t splits = fill < useful ? fill : useful;
  plan.splits = static_cast<int>(splits < 1 ? 1 : (splits > 1024 ? 1024 : splits));
  return plan;
}

// One thread's walk: element offsets of its vectors, step by step, without a division. kBackward:
// from the end, where a pass before has left what is still in the cache. Single elements are walked
// by one kernel in both layouts, kChannelsLast = false: what is not vectors is bound by its
// accesses, and the layout is a matter of where a walk begins.
template <int kVector, bool kChannelsLast, bool kBackward = false>
struct Walk {
  int64_t channel;  // of the first element; of a flat walk its column
  bool active;      // false: this thread's column is beyond the last channel, or its lane the last

  // tile: which of the plan's; the launches of one image batch may have theirs side by side in the
  // grid.
  __device__ Walk(const ImageShape& s, const ColumnPlan& plan,
                  int64_t tile = kBackward ? gridDim.x - 1 - blockIdx.x : blockIdx.x) {
    const int column = threadIdx.x % plan.columns, lane = threadIdx.x / plan.columns;
    const int64_t step = static_cast<int64_t>(plan.lanes) * plan.splits;
    int64_t at = static_cast<int64_t>(blockIdx.y) * plan.lanes + lane;
    left_ = plan.length > at ? (plan.length - at + step - 1) / step : 0;
    if (kBackward && left_ > 0) at += (left_ - 1) * step;
    if (is_channels_last<kVector, kChannelsLast>(s)) {
      channel = (tile * plan.columns + column) * kVector;
      offset_ = at * s.c + channel;
      advance_ = step * s.c;
    } else {
      channel = tile;
      const int64_t per_plane = s.hw / kVector;
      within_ = at % per_plane;
      offset_ = (at / per_plane * s.c + channel) * s.hw + within_ * kVector;
      within_step_ = step % per_plane;
      advance_ = step / per_plane * s.c * s.hw + within_step_ * kVector;
      per_plane_ = per_plane;
      wrap_ = (s.c - 1) * s.hw;
    }
    active = channel < s.c && lane < plan.lanes;
    if (!active) left_ = 0;
  }

  __device__ int64_t left() const { return left_; }  // vectors still to come

  __device__ int64_t next() {
    const int64_t offset = offset_;
    --left_;
    offset_ += kBackward ? -advance_ : advance_;
    if constexpr (!kChannelsLast) {
      within_ += kBackward ? -within_step_ : within_step_;
      if (kBackward ? within_ < 0 : within_ >= per_plane_) {
        within_ += kBackward ? per_plane_ : -per_plane_;
        offset_ += kBackward ? -wrap_ : wrap_;
      }
    }
    return offset;
  }

  // in_groups for all vectors that are left.
  template <int kGroup, class Load, class Each>
  __device__ void for_each(Load load, Each each) {
    in_groups<kGroup>(left_, [&] { return next(); }, load, each);
  }

  // body(offsets) for kGroup vectors at a time, then one by one: int64_t[kGroup] or int64_t[1].
  template <int kGroup, class Body>
  __device__ void run_groups(Body body) {
    while (left_ >= kGroup) take<kGroup>(body);
#pragma unroll 1
    while (left_ > 0) take<1>(body);
  }

 private:
  template <int kCount, class Body>
  __device__ void take(Body& body) {
    int64_t offsets[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) offsets[u] = next();
    body(offsets);
  }

  int64_t left_, offset_, advance_;
  int64_t within_ = 0, within_step_ = 0, per_plane_ = 1, wrap_ = 0;
};

}  // namespace fastcnn
