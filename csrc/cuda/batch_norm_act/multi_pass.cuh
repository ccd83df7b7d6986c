// The kernels of batch_norm_act for layers that do not stay on chip.
//
// Data movement, T = one pass over the tensor:
//   forward   stats reads x (1T); apply reads x and residual, writes y (2T or 3T).
//   backward  reduce reads dy, x (and what was saved where a residual was added, then writing
//             dresidual); dx reads dy (or dresidual) and x and writes dx: 5T, and 7T with a
//             residual.
// The second pass walks backwards, so that it finds the end of the first in the L2 cache, and what
// it reads and writes is marked as the first to leave that cache.
// Sums over the batch have two stages: each block reduces its split to one partial a column, which
// `finalize` merges in a fixed order. No atomics: the same bits from run to run.
// Variance: kUnroll values are summed, then squared around their own mean, in registers; groups,
// threads and splits are merged by Chan's formula. There is never a difference of large squares.
// p.shape is the walked shape: of a flat walk [n, c * hw, 1], where plan.repeat = hw.
#pragma once

#include "cuda/batch_norm_act/norm.cuh"

namespace fastcnn {

// partial: Moments [splits, p.shape.c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kSmallBlocksPerSm)
    batch_norm_act_stats_kernel(BatchNormActFwdParams p, ColumnPlan plan, Moments* partial) {
  const T* x = static_cast<const T*>(p.x);
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  float count = 0, mean[kVector] = {}, m2[kVector] = {};
  walk.template run_groups<kUnroll>([&]<int kN>(const int64_t(&offsets)[kN]) {
    Word<T, kVector> words[kN];
#pragma unroll
    for (int u = 0; u < kN; ++u) words[u] = load_word<kVector>(x + offsets[u]);
    const float share = kN / (count + kN), spread = count * share;
    count += kN;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float values[kN], sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < kN; ++u) {
        values[u] = element<T, kVector>(words[u], v);
        sum += values[u];
      }
      const float center = sum * (1.f / kN);
#pragma unroll
      for (int u = 0; u < kN; ++u) squares += (values[u] - center) * (values[u] - center);
      const float delta = center - mean[v];
      mean[v] = moved_mean(mean[v], center, delta * share);
      m2[v] += squares + delta * delta * spread;
    }
  });
  Moments moments[kSlots<kVector, kChannelsLast>];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if constexpr (kChannelsLast) {
      moments[v] = {count, mean[v], m2[v]};
    } else {
      moments[0].merge(count, mean[v], m2[v]);
    }
  }
  write_partial(moments, plan, p.shape.c, walk.channel, walk.active, partial, MergeMoments{});
}

__global__ void __launch_bounds__(kThreads)
    batch_norm_act_finalize_stats_kernel(BatchNormActFwdParams p, ColumnPlan plan,
                                         const Moments* partial) {
  const int64_t channel = finalize_channel(), c = p.shape.c / plan.repeat;
  const Moments total = merge_splits(partial, plan.splits, c, channel, MergeMoments{}, plan.repeat);
  if (threadIdx.x < kFinalizeColumns && channel < c) {
    static_cast<float*>(p.mean)[channel] = total.mean;
    static_cast<float*>(p.var)[channel] = total.var();
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_apply_kernel(BatchNormActFwdParams p, ColumnPlan plan) {
  Walk<kVector, kChannelsLast, true> walk(p.shape, plan);
  if (!walk.active) return;
  T* y = static_cast<T*>(p.y);
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const auto k = read_coefficients<kCount>(p, SlotChannels(walk.channel, plan.repeat));
  with_act<T>(p.act, [&](auto act) {
    walk.template for_each<kUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          FwdGroup<T, kVector, kN> group;
          group.load_x(p, offsets);
          group.load_residual(p, offsets);
          return group;
        },
        [&](const auto& group, int u, int64_t offset) {
          store_last<kVector>(y + offset,
                              normalized<T, kVector>(p, act, k, group.x[u], group.residual[u]));
        });
  });
}

// ---- backward ----------------------------------------------------------------------------------

// partial: Sums [splits, p.shape.c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_reduce_kernel(BatchNormActBwdParams p, ColumnPlan plan, Sums* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  Sums sums[kCount];
  if (walk.active) {
    const auto k = read_coefficients<kCount>(p, SlotChannels(walk.channel, plan.repeat));
    T* dresidual = static_cast<T*>(p.dresidual);
    with_act<T>(p.act, [&](auto act) {
      walk.template for_each<kBwdUnroll>(
          [&]<int kN>(const int64_t(&offsets)[kN]) {
            BwdGroup<T, kVector, kN> group;
            group.template load<false>(p, offsets);
            return group;
          },
          [&](const auto& group, int u, int64_t offset) {
            const Word<T, kVector> dz = add_up(p, act, k, group, u, sums);
            if (dresidual != nullptr) store_word<kVector>(dresidual + offset, dz);
          });
    });
  }
  write_partial(sums, plan, p.shape.c, walk.channel, walk.active, partial, MergeSums{});
}

__global__ void __launch_bounds__(kThreads)
    batch_norm_act_finalize_reduce_kernel(BatchNormActBwdParams p, ColumnPlan plan,
                                          const Sums* partial) {
  const int64_t channel = finalize_channel(), c = p.shape.c / plan.repeat;
  const Sums total = merge_splits(partial, plan.splits, c, channel, MergeSums{}, plan.repeat);
  if (threadIdx.x < kFinalizeColumns && channel < c) {
    static_cast<float*>(p.dbias)[channel] = total.dz;
    static_cast<float*>(p.dweight)[channel] =
        total.dzx * rstd_of(static_cast<const float*>(p.var)[channel], p.eps);
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_act_dx_kernel(BatchNormActBwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast, true> walk(p.shape, plan);
  if (!walk.active) return;
  const SlotChannels channels(walk.channel, plan.repeat);
  const auto k = read_coefficients<kCount>(p, channels);
  const float count = p.total == nullptr ? static_cast<float>(p.shape.per_channel() * plan.repeat)
                                         : *static_cast<const float*>(p.total);
  GradX<kCount> grad_x;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const int64_t channel = channels[s];
    grad_x.set(s, static_cast<const float*>(p.dbias)[channel],
               static_cast<const float*>(p.dweight)[channel],
               rstd_of(static_cast<const float*>(p.var)[channel], p.eps), 1.f / count);
  }
  T* dx = static_cast<T*>(p.dx);
  with_act<T>(p.act, [&](auto act) {
    walk.template for_each<kBwdUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          BwdGroup<T, kVector, kN> group;
          group.template load<true>(p, offsets);
          return group;
        },
        [&](const auto& group, int u, int64_t offset) {
          store_last<kVector>(dx + offset, grad_x.of(p, act, k, group, u));
        });
  });
}

}  // namespace fastcnn
