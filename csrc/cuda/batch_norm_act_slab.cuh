// The kernels of batch_norm_act for layers whose statistics stay on chip: one launch each way.
//
// A block owns whole channels. It reads their slab once, keeps it in shared memory as it lies in
// memory, and goes over it again there: T = one pass over the tensor,
//   forward   reads x (1T), then residual, and writes y: 2T or 3T; stages take 3T or 4T
//   backward  reads dy, x (and what was saved where a residual was added, then writing dresidual),
//             writes dx: 3T, and 5T with a residual; stages take 5T or 7T
// A thread reads back only what it has written itself, so the slab needs no barrier, and word i of
// thread t lies at i * kThreads + t, so it has no bank conflicts. Sums go through shared memory
// behind the slab, in a fixed order.
// Variance: squares around the mean; the sum of the deviations corrects the mean's rounding.
#pragma once

#include "batch_norm_act.cuh"
#include "common/reduce.cuh"

namespace fastcnn {

// Shared memory of a block: `tensors` slabs of `steps` words a thread, then the values to be
// joined.
template <class T, int kVector, bool kChannelsLast, class Value>
size_t slab_bytes(const ColumnPlan& plan, int tensors) {
  const int64_t steps = (plan.length + plan.lanes - 1) / plan.lanes;
  return static_cast<size_t>(tensors * steps * kThreads) * sizeof(Word<T, kVector>) +
         kThreads * kSlots<kVector, kChannelsLast> * sizeof(Value);
}

template <class T, int kVector>
struct Slab {
  Word<T, kVector>* words;  // this thread's first
  int64_t next;             // of the next block of words, beyond this one

  __device__ Slab(const ColumnPlan& plan, int tensor) {
    const int64_t steps = (plan.length + plan.lanes - 1) / plan.lanes;
    words = shared_memory<Word<T, kVector>>() + tensor * steps * kThreads + threadIdx.x;
    next = steps * kThreads;
  }
  __device__ Word<T, kVector>& operator[](int64_t i) const { return words[i * kThreads]; }
  __device__ void* end() const { return words - threadIdx.x + next; }
};

// Joins what all threads of a block hold for a channel, in a fixed order: first the lanes of each
// column, then the columns of each channel. Every thread gets the totals of its slots.
template <int kCount, class Value, class Join>
__device__ void join_block(Value (&values)[kCount], void* memory, const ColumnPlan& plan,
                           Join join) {
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
        join(shared[at], shared[at + half * row]);
      }
    }
  }
  for (int left = repeat; left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2, pairs = left - half;
    __syncthreads();
    for (int i = threadIdx.x; i < row / repeat * pairs; i += kThreads) {
      const int at = i / pairs * repeat + i % pairs;
      join(shared[at], shared[at + half]);
    }
  }
  __syncthreads();
  for (int s = 0; s < kCount; ++s) values[s] = shared[(column * kCount + s) / repeat * repeat];
}

struct JoinFloats {
  __device__ void operator()(float& a, float b) const { a += b; }
};

// Whether this thread writes what its block knows of slot s's channel: the first column's does.
template <bool kChannelsLast>
__device__ bool writes_channel(const ColumnPlan& plan, int64_t column, int s) {
  if (threadIdx.x >= plan.columns) return false;
  return !kChannelsLast || plan.repeat == 1 || (column + s) % plan.repeat == 0;
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_slab_fwd_kernel(BatchNormActFwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const Slab<T, kVector> slab(plan, 0);
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  const int64_t steps = walk.left();
  float sum[kCount] = {};
  int64_t i = 0;
  walk.run_groups([&]<int kN>(const int64_t(&offsets)[kN]) {
    Word<T, kVector> words[kN];
#pragma unroll
    for (int u = 0; u < kN; ++u) words[u] = load_word<kVector>(x + offsets[u]);
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      slab[i++] = words[u];
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        sum[kChannelsLast ? v : 0] += element<T, kVector>(words[u], v);
    }
  });
  join_block(sum, slab.end(), plan, JoinFloats{});
  const float count = static_cast<float>(p.shape.per_channel() * plan.repeat);
  Coefficients<kCount> k;
#pragma unroll
  for (int s = 0; s < kCount; ++s) k.mean[s] = sum[s] / count;
  Sums around[kCount];  // of the deviations and of their squares
  for (i = 0; i < steps; ++i) {
    const Word<T, kVector> word = slab[i];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kChannelsLast ? v : 0;
      const float centered = element<T, kVector>(word, v) - k.mean[s];
      around[s].dz += centered;
      around[s].dzx += centered * centered;
    }
  }
  join_block(around, slab.end(), plan, JoinSums{});
  if (!walk.active) return;
  const SlotChannels<kCount> channels(walk.channel, plan.repeat);
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const float drift = around[s].dz / count;
    const float mean = drift == drift ? k.mean[s] + drift : k.mean[s];
    const float var = (around[s].dzx - around[s].dz * drift) / count;
    k.set(p, s, channels.of[s], mean, var);
    if (writes_channel<kChannelsLast>(plan, walk.channel, s)) {
      static_cast<float*>(p.mean)[channels.of[s]] = mean;
      static_cast<float*>(p.var)[channels.of[s]] = var;
    }
  }
  if (p.y == nullptr) return;
  T* y = static_cast<T*>(p.y);
  Walk<kVector, kChannelsLast> again(p.shape, plan);
  i = 0;
  again.run_groups([&]<int kN>(const int64_t(&offsets)[kN]) {
    Word<T, kVector> added[kN];
    if (residual != nullptr) {
#pragma unroll
      for (int u = 0; u < kN; ++u) added[u] = load_last<kVector>(residual + offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      store_word<kVector>(y + offsets[u], normalized<T, kVector>(p, k, slab[i++], added[u]));
    }
  });
}

// Where z was made with a residual, dz takes dy's place in the slab, rounded as dresidual is.
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_slab_bwd_kernel(BatchNormActBwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const Slab<T, kVector> slab_x(plan, 0), slab_dy(plan, 1);
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  const SlotChannels<kCount> channels(walk.active ? walk.channel : 0, plan.repeat);
  const Coefficients<kCount> k(p, channels);
  T* dresidual = static_cast<T*>(p.dresidual);
  Sums sums[kCount];
  int64_t i = 0;
  walk.run_groups([&]<int kN>(const int64_t(&offsets)[kN]) {
    BwdGroup<T, kVector, kN> group;
    group.template load<false>(p, offsets);
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      float dz[kVector], centered[kVector];
      group.grad_z(p, k, u, dz, centered);
      const Word<T, kVector> rounded = to_word<T>(dz);
      if (dresidual != nullptr) store_word<kVector>(dresidual + offsets[u], rounded);
      slab_x[i] = group.x[u];
      slab_dy[i++] = p.saved != nullptr ? rounded : group.dy[u];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const int s = kChannelsLast ? v : 0;
        sums[s].dz += dz[v];
        sums[s].dzx += dz[v] * centered[v];
      }
    }
  });
  join_block(sums, slab_dy.end(), plan, JoinSums{});
  if (!walk.active) return;
  const float count = static_cast<float>(p.shape.per_channel() * plan.repeat);
  float shift[kCount], slope[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const float rstd = rstd_of(static_cast<const float*>(p.var)[channels.of[s]], p.eps);
    const float dweight = sums[s].dzx * rstd;
    shift[s] = sums[s].dz / count;
    slope[s] = dweight / count * rstd;
    if (writes_channel<kChannelsLast>(plan, walk.channel, s)) {
      static_cast<float*>(p.dbias)[channels.of[s]] = sums[s].dz;
      static_cast<float*>(p.dweight)[channels.of[s]] = dweight;
    }
  }
  if (p.dx == nullptr) return;
  if (p.saved != nullptr) {
    p.act = Act::kNone;
    p.saved = nullptr;
  }
  T* dx = static_cast<T*>(p.dx);
  Walk<kVector, kChannelsLast> again(p.shape, plan);
  i = 0;
  again.run_groups([&]<int kN>(const int64_t(&offsets)[kN]) {
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      BwdGroup<T, kVector, 1> one;
      one.x[0] = slab_x[i];
      one.dy[0] = slab_dy[i++];
      float dz[kVector], centered[kVector];
      one.grad_z(p, k, 0, dz, centered);
      store_word<kVector>(dx + offsets[u], grad_x<T>(p, k, shift, slope, dz, centered));
    }
  });
}

}  // namespace fastcnn
