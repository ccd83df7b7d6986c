// The kernels of batch_norm_act for layers whose statistics stay on chip: one launch each way.
//
// A block owns whole channels. It reads their tile once, keeps it in shared memory as it lies in
// memory, and goes over it again there: T = one pass over the tensor,
//   forward   reads x (1T), then residual, and writes y: 2T or 3T; multi-pass 3T or 4T
//   backward  reads dy, x (and what was saved where a residual was added, then writing dresidual),
//             writes dx: 3T, and 5T with a residual; multi-pass 5T or 7T
// A thread reads back only what it has written itself, so the tile needs no barrier, and word i of
// thread t lies at i * kThreads + t, so it has no bank conflicts. Sums go through shared memory
// behind the tile, in a fixed order.
// Variance: squares around the mean; the sum of the deviations corrects the mean's rounding.
#pragma once

#include "cuda/batch_norm_act/norm.cuh"

namespace fastcnn {

// Shared memory of a block: `tensors` tiles of `steps` words a thread, then the values to be
// merged.
template <class T, int kVector, bool kChannelsLast, class Value>
size_t one_pass_bytes(const ColumnPlan& plan, int tensors) {
  const int64_t steps = (plan.length + plan.lanes - 1) / plan.lanes;
  return static_cast<size_t>(tensors * steps * kThreads) * sizeof(Word<T, kVector>) +
         kThreads * kSlots<kVector, kChannelsLast> * sizeof(Value);
}

template <class T, int kVector>
class SharedTile {
 public:
  __device__ SharedTile(const ColumnPlan& plan, int tensor) {
    const int64_t steps = (plan.length + plan.lanes - 1) / plan.lanes;
    words_ = shared_memory<Word<T, kVector>>() + tensor * steps * kThreads + threadIdx.x;
    end_ = words_ - threadIdx.x + steps * kThreads;
  }
  __device__ Word<T, kVector>& operator[](int i) const { return words_[i * kThreads]; }
  __device__ void* end() const { return end_; }

 private:
  Word<T, kVector>*words_, *end_;
};

// Reads this thread's part of the tensors into their tiles, kUnroll vectors of each in flight.
template <class T, int kVector, bool kChannelsLast, int kTensors>
__device__ void fill(const SharedTile<T, kVector> (&tiles)[kTensors],
                     const void* const (&from)[kTensors], const ImageShape& shape,
                     const ColumnPlan& plan) {
  Walk<kVector, kChannelsLast> walk(shape, plan);
  int i = 0;
  walk.template run_groups<kUnroll>([&]<int kN>(const int64_t(&offsets)[kN]) {
    Word<T, kVector> words[kTensors][kN];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
#pragma unroll
      for (int u = 0; u < kN; ++u) {
        words[t][u] = load_word<kVector>(static_cast<const T*>(from[t]) + offsets[u]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
#pragma unroll
      for (int u = 0; u < kN; ++u) tiles[t][i + u] = words[t][u];
    }
    i += kN;
  });
}

// Merges what all threads of a block hold for a channel, in a fixed order: first the lanes of each
// column, then the columns of each channel. Every thread gets the totals of its slots.
template <int kCount, class Value, class Merge>
__device__ void merge_block(Value (&values)[kCount], void* memory, const ColumnPlan& plan,
                            Merge merge) {
  Value* shared = static_cast<Value*>(memory);
  const int lane = threadIdx.x / plan.columns, column = threadIdx.x % plan.columns;
  const int row = plan.columns * kCount, repeat = static_cast<int>(plan.repeat);
  __syncthreads();  // the totals of the last time may still be read
  if (lane < plan.lanes) {
    for (int s = 0; s < kCount; ++s) shared[lane * row + column * kCount + s] = values[s];
  }
  for (int left = plan.lanes; left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (lane < left - half) {
      for (int s = 0; s < kCount; ++s) {
        const int at = lane * row + column * kCount + s;
        merge(shared[at], shared[at + half * row]);
      }
    }
  }
  for (int left = repeat; left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2, pairs = left - half;
    __syncthreads();
    for (int i = threadIdx.x; i < row / repeat * pairs; i += kThreads) {
      const int at = i / pairs * repeat + i % pairs;
      merge(shared[at], shared[at + half]);
    }
  }
  __syncthreads();
  for (int s = 0; s < kCount; ++s) values[s] = shared[(column * kCount + s) / repeat * repeat];
}

struct MergeFloats {
  __device__ void operator()(float& a, float b) const { a += b; }
};

// Whether this thread writes what its block knows of a channel: the first lane's at its first
// column does.
__device__ inline bool writes_channel(const ColumnPlan& plan, int64_t column, int64_t channel) {
  return threadIdx.x < static_cast<unsigned>(plan.columns) && column == channel * plan.repeat;
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_one_pass_fwd_kernel(BatchNormActFwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const SharedTile<T, kVector> tiles[] = {{plan, 0}};
  fill<T, kVector, kChannelsLast>(tiles, {p.x}, p.shape, plan);
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  const int steps = static_cast<int>(walk.left());
  float sum[kCount] = {};
  for (int i = 0; i < steps; ++i) {
    const Word<T, kVector> word = tiles[0][i];
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[kChannelsLast ? v : 0] += element<T, kVector>(word, v);
  }
  merge_block(sum, tiles[0].end(), plan, MergeFloats{});
  const float inverse = 1.f / static_cast<float>(p.shape.per_channel() * plan.repeat);
  NormCoefficients<kCount> k;
#pragma unroll
  for (int s = 0; s < kCount; ++s) k.mean[s] = sum[s] * inverse;
  Sums around[kCount];  // of the deviations and of their squares
  for (int i = 0; i < steps; ++i) {
    const Word<T, kVector> word = tiles[0][i];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kChannelsLast ? v : 0;
      const float centered = element<T, kVector>(word, v) - k.mean[s];
      around[s].dz += centered;
      around[s].dzx += centered * centered;
    }
  }
  merge_block(around, tiles[0].end(), plan, MergeSums{});
  if (!walk.active) return;
  const SlotChannels channels(walk.channel, plan.repeat);
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const float drift = around[s].dz * inverse;
    const float mean = drift == drift ? k.mean[s] + drift : k.mean[s];
    const float var = variance_of(mean, (around[s].dzx - around[s].dz * drift) * inverse);
    k.set(p, s, channels[s], mean, var);
    if (writes_channel(plan, walk.channel + s, channels[s])) {
      static_cast<float*>(p.mean)[channels[s]] = mean;
      static_cast<float*>(p.var)[channels[s]] = var;
    }
  }
  if (p.y == nullptr) return;
  T* y = static_cast<T*>(p.y);
  with_act<T>(p.act, [&](auto act) {
    int i = 0;
    walk.template for_each<kUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          FwdGroup<T, kVector, kN> group;
          group.load_residual(p, offsets);
          return group;
        },
        [&](const auto& group, int u, int64_t offset) {
          store_word<kVector>(y + offset,
                              normalized<T, kVector>(p, act, k, tiles[0][i++], group.residual[u]));
        });
  });
}

// Where z was made with a residual, dz takes dy's place in the tile, rounded as dresidual is.
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_one_pass_bwd_kernel(BatchNormActBwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const SharedTile<T, kVector> tiles[] = {{plan, 0}, {plan, 1}};  // dy, x
  fill<T, kVector, kChannelsLast>(tiles, {p.dy, p.x}, p.shape, plan);
  T* dresidual = static_cast<T*>(p.dresidual);
  Sums sums[kCount];
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  const bool active = walk.active;
  const SlotChannels channels(active ? walk.channel : 0, plan.repeat);
  const auto k = read_coefficients<kCount>(p, channels);
  with_act<T>(p.act, [&](auto act) {
    int i = 0;
    walk.template for_each<kBwdUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          BwdGroup<T, kVector, kN> group;
          group.template load_saved<true>(p, offsets);
          return group;
        },
        [&](const auto& group, int u, int64_t offset) {
          const BwdGroup<T, kVector, 1> one{{tiles[0][i]}, {tiles[1][i]}, {group.saved[u]}};
          const Word<T, kVector> dz = add_up(p, act, k, one, 0, sums);
          if (dresidual != nullptr) store_word<kVector>(dresidual + offset, dz);
          if (p.saved != nullptr) tiles[0][i] = dz;
          ++i;
        });
  });
  merge_block(sums, tiles[1].end(), plan, MergeSums{});
  if (!active) return;
  const float inverse = 1.f / static_cast<float>(p.shape.per_channel() * plan.repeat);
  GradX<kCount> grad_x;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const float rstd = rstd_of(static_cast<const float*>(p.var)[channels[s]], p.eps);
    const float dweight = sums[s].dzx * rstd;
    grad_x.set(s, sums[s].dz, dweight, rstd, inverse);
    if (writes_channel(plan, walk.channel + s, channels[s])) {
      static_cast<float*>(p.dbias)[channels[s]] = sums[s].dz;
      static_cast<float*>(p.dweight)[channels[s]] = dweight;
    }
  }
  if (p.dx == nullptr) return;
  if (p.saved != nullptr) {
    p.act = Act::kNone;
    p.saved = nullptr;
  }
  T* dx = static_cast<T*>(p.dx);
  Walk<kVector, kChannelsLast> again(p.shape, plan);
  with_act<T>(p.act, [&](auto act) {
    for (int i = 0; again.left() > 0; ++i) {
      const BwdGroup<T, kVector, 1> one{{tiles[0][i]}, {tiles[1][i]}, {}};
      store_word<kVector>(dx + again.next(), grad_x.of(p, act, k, one, 0));
    }
  });
}

}  // namespace fastcnn
