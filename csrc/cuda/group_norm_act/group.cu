// group_norm_act on CUDA.
//
// Data movement, T = one pass over the tensor:
//   forward   a tile (the values of a group) that a block can hold is read once: 2T,
//             cuda/group_norm_act/one_pass.cuh.
//             Else stats reads x (1T), and apply reads x and writes y (2T).
//   backward  reduce reads dy and x (2T); dx reads both and is written (3T).
// The multi-pass kernels walk the channels of a sample: in channels_last all of a pixel's side by
// side, so that accesses are 16 bytes wide however few channels a group has. Each block reduces its
// split to one partial a channel; `finalize` merges splits and channels to groups, in a fixed
// order. No atomics: the same bits from run to run. Variance: kUnroll values are summed, then
// squared around their own mean, in registers; what follows is merged by Chan's formula. There is
// never a difference of large squares.
#include "cuda/activation.cuh"
#include "cuda/group_norm_act/one_pass.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_coefficients.cuh"
#include "cuda/sample_plan.cuh"
#include "group_norm_act.h"

namespace fastcnn {
namespace {

// dx = scale * dz - (shift + (x - mean) * slope), by group.
struct DxCoefficients {
  float shift, slope;
};

template <int kCount, class Params>
__device__ NormCoefficients<kCount> read_coefficients(const Params& p, const SamplePlan& plan,
                                                      int64_t first) {
  return NormCoefficients<kCount>::read(
      p, [&](int s) { return first + s; },
      [&](int s) { return plan.index() * plan.groups + (first + s) / plan.per_group; });
}

// ---- forward ------------------------------------------------------------------------------------

// partial: Moments [samples, splits, c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1)
    group_norm_act_stats_kernel(GroupNormActFwdParams p, SamplePlan plan, Moments* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const T* x = static_cast<const T*>(p.x) + plan.offset();
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  float count = 0, mean[kVector] = {}, m2[kVector] = {};
  walk.template run_groups<kUnroll>([&]<int kN>(const int64_t(&offsets)[kN]) {
    const Group<T, kVector, kN, 1> group({x}, offsets);
    const float share = kN / (count + kN), spread = count * share;
    count += kN;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float values[kN], sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < kN; ++u) {
        values[u] = element<T, kVector>(group.words[0][u], v);
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
  Moments moments[kCount];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if constexpr (kChannelsLast) {
      moments[v] = {count, mean[v], m2[v]};
    } else {
      moments[0].merge(count, mean[v], m2[v]);
    }
  }
  merge_lanes(moments, plan.columns.columns, plan.columns.lanes, MergeMoments{});
  if (plan.first_lane() && walk.active) {
    for (int s = 0; s < kCount; ++s) partial[plan.partial(walk.channel + s)] = moments[s];
  }
}

__global__ void __launch_bounds__(kThreads)
    group_norm_act_finalize_stats_kernel(GroupNormActFwdParams p, SamplePlan plan,
                                         FinalizePlan finalize, const Moments* partial) {
  const int64_t statistic = finalize.column();
  Moments total[1];
  for_each_partial(plan, finalize, partial,
                   [&](const Moments& m, int64_t) { total[0].merge(m.count, m.mean, m.m2); });
  merge_lanes(total, finalize.columns(), finalize.lanes, MergeMoments{});
  if (finalize.lane() == 0 && statistic < plan.statistics()) {
    static_cast<float*>(p.mean)[statistic] = total[0].mean;
    static_cast<float*>(p.var)[statistic] = total[0].var();
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1)
    group_norm_act_apply_kernel(GroupNormActFwdParams p, SamplePlan plan) {
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  if (!walk.active) return;
  const T* x = static_cast<const T*>(p.x) + plan.offset();
  T* y = static_cast<T*>(p.y) + plan.offset();
  const auto k = read_coefficients<kSlots<kVector, kChannelsLast>>(p, plan, walk.channel);
  with_act<T>(p.act, [&](auto act) {
    walk.template for_each<kUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) { return Group<T, kVector, kN, 1>({x}, offsets); },
        [&](const auto& group, int u, int64_t offset) {
          float z[kVector];
          group.to_floats(0, u, z);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const int s = kChannelsLast ? v : 0;
            z[v] = (z[v] - k.mean[s]) * k.scale[s] + k.bias[s];
          }
          act.fwd_each(z);
          store(y + offset, z);
        });
  });
}

// ---- backward -----------------------------------------------------------------------------------

// body(offset, x - mean, dz) for each vector of the walk; dz from z, recomputed as the forward made
// it.
template <class T, int kVector, bool kChannelsLast, class Coefficients, class Body>
__device__ void for_each_dz(const GroupNormActBwdParams& p, const SamplePlan& plan,
                            Walk<kVector, kChannelsLast>& walk, const Coefficients& k, Body body) {
  const T* dy = static_cast<const T*>(p.dy) + plan.offset();
  const T* x = static_cast<const T*>(p.x) + plan.offset();
  with_act<T>(p.act, [&](auto act) {
    walk.template for_each<kUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          return Group<T, kVector, kN, 2>({dy, x}, offsets);
        },
        [&](const auto& group, int u, int64_t offset) {
          float grad[kVector], value[kVector], z[kVector];
          group.to_floats(0, u, grad);
          group.to_floats(1, u, value);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const int s = kChannelsLast ? v : 0;
            value[v] -= k.mean[s];
            z[v] = value[v] * k.scale[s] + k.bias[s];
          }
          act.bwd_each(grad, z);
          body(offset, value, grad);
        });
  });
}

// partial: Sums [samples, splits, c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    group_norm_act_reduce_kernel(GroupNormActBwdParams p, SamplePlan plan, Sums* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  Sums sums[kCount];
  if (walk.active) {
    const auto k = read_coefficients<kCount>(p, plan, walk.channel);
    for_each_dz<T>(p, plan, walk, k,
                   [&](int64_t, const float(&centered)[kVector], const float(&dz)[kVector]) {
#pragma unroll
                     for (int v = 0; v < kVector; ++v) {
                       const int s = kChannelsLast ? v : 0;
                       sums[s].dz += dz[v];
                       sums[s].dzx += dz[v] * centered[v];
                     }
                   });
  }
  merge_lanes(sums, plan.columns.columns, plan.columns.lanes, MergeSums{});
  if (plan.first_lane() && walk.active) {
    for (int s = 0; s < kCount; ++s) partial[plan.partial(walk.channel + s)] = sums[s];
  }
}

// coefficients: [samples, groups]
__global__ void __launch_bounds__(kThreads)
    group_norm_act_finalize_reduce_kernel(GroupNormActBwdParams p, SamplePlan plan,
                                          FinalizePlan finalize, const Sums* partial,
                                          DxCoefficients* coefficients) {
  const int64_t statistic = finalize.column();
  Sums total[1];
  for_each_partial(plan, finalize, partial, [&](const Sums& sums, int64_t channel) {
    const float weight = p.weight == nullptr ? 1.f : static_cast<const float*>(p.weight)[channel];
    total[0].dz += weight * sums.dz;
    total[0].dzx += weight * sums.dzx;
  });
  merge_lanes(total, finalize.columns(), finalize.lanes, MergeSums{});
  if (finalize.lane() == 0 && statistic < plan.statistics()) {
    const float rstd = rstd_of(static_cast<const float*>(p.var)[statistic], p.eps);
    const float share = rstd / static_cast<float>(plan.per_group * plan.sample.hw);
    coefficients[statistic] = {total[0].dz * share, total[0].dzx * share * rstd * rstd};
  }
}

// dweight and dbias: a column is a channel, over all samples and splits.
__global__ void __launch_bounds__(kThreads)
    group_norm_act_finalize_parameters_kernel(GroupNormActBwdParams p, SamplePlan plan,
                                              FinalizePlan finalize, const Sums* partial) {
  const int64_t channel = finalize.column();
  Sums total[1];
  if (channel < plan.sample.c) {
    const int64_t group = channel / plan.per_group, rows = plan.samples * plan.columns.splits;
    for (int64_t row = finalize.lane(); row < rows; row += finalize.lanes) {
      const int64_t statistic = row / plan.columns.splits * plan.groups + group;
      Sums sums = partial[row * plan.sample.c + channel];
      sums.dzx *= rstd_of(static_cast<const float*>(p.var)[statistic], p.eps);
      MergeSums{}(total[0], sums);
    }
  }
  merge_lanes(total, finalize.columns(), finalize.lanes, MergeSums{});
  if (finalize.lane() == 0 && channel < plan.sample.c) {
    static_cast<float*>(p.dbias)[channel] = total[0].dz;
    static_cast<float*>(p.dweight)[channel] = total[0].dzx;
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    group_norm_act_dx_kernel(GroupNormActBwdParams p, SamplePlan plan,
                             const DxCoefficients* coefficients) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  if (!walk.active) return;
  const auto k = read_coefficients<kCount>(p, plan, walk.channel);
  float shift[kCount], slope[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const DxCoefficients of_group =
        coefficients[plan.index() * plan.groups + (walk.channel + s) / plan.per_group];
    shift[s] = of_group.shift;
    slope[s] = of_group.slope;
  }
  T* dx = static_cast<T*>(p.dx) + plan.offset();
  for_each_dz<T>(p, plan, walk, k,
                 [&](int64_t offset, const float(&centered)[kVector], const float(&dz)[kVector]) {
                   float out[kVector];
#pragma unroll
                   for (int v = 0; v < kVector; ++v) {
                     const int s = kChannelsLast ? v : 0;
                     out[v] = dz[v] * k.scale[s] - (shift[s] + centered[v] * slope[s]);
                   }
                   store(dx + offset, out);
                 });
}

// ---- launching ----------------------------------------------------------------------------------

// Whether the forward holds its tiles on the chip, by one kernel and 2T instead of three and 3T.
// Not
// - where a block has no room for a tile;
// - in channels_last where a group's channels are no whole vectors: it would take single elements,
//   while the other kernels take a pixel's channels, which may be whole vectors, together;
// - where tiles are too few for half of the SMs, unless they are so small that three launches would
//   take longer than one tile does.
bool is_on_chip(const ImageShape& shape, const OnePassPlan& plan, int element_bytes, int sm_count) {
  constexpr int64_t kSmall = 16 << 10;
  const int64_t bytes = int64_t{plan.vectors} * plan.vector * element_bytes;
  if (!plan.held) return false;
  if (shape.channels_last && plan.vector == 1 && shape.hw > 1) return false;
  return plan.tiles * 2 >= sm_count || bytes <= kSmall;
}

}  // namespace

int64_t group_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  // Unaligned tensors take one element at a time and then need the most splits.
  const int bytes = element_bytes(dtype);
  const int64_t whole = plan_samples(shape, 1, bytes, true, device).columns.splits;
  const int64_t single = plan_samples(shape, 1, bytes, false, device).columns.splits;
  const int64_t splits = whole > single ? whole : single;
  // A partial value a split, sample and channel, then coefficients for at most as many groups.
  const int64_t floats =
      splits * sizeof(Moments) / sizeof(float) + sizeof(DxCoefficients) / sizeof(float);
  return shape.n * shape.c * floats;
}

int launch_group_norm_act_fwd(const GroupNormActFwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const int bytes = element_bytes(p.dtype);
  const bool whole = aligned({p.x, p.y});
  // In channels_last the one-pass kernel loads parameters by 16 bytes too.
  const bool words = whole && (!p.shape.channels_last || aligned({p.weight, p.bias}));
  const OnePassPlan one_pass = plan_one_pass(p.shape, p.groups, bytes, words);
  if (is_on_chip(p.shape, one_pass, bytes, device.sm_count)) {
    return launch_one_pass_norm_act_fwd(p, one_pass, device);
  }
  const SamplePlan plan = plan_samples(p.shape, p.groups, bytes, whole, device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  Moments* partial = reinterpret_cast<Moments*>(workspace);
  const int columns = plan.columns.vector;
  return dispatch(p.dtype, columns, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    const int threads = threads_of(plan);
    cudaError_t error = launch(device, grid_of(plan), threads,
                               threads * kSlots<kVector, cl.value> * sizeof(Moments),
                               group_norm_act_stats_kernel<T, kVector, cl.value>, p, plan, partial);
    if (error != cudaSuccess) return error;
    const FinalizePlan finalize(plan.columns.splits * plan.per_group);
    error = launch(device, finalize.grid(plan.statistics()), kThreads, kThreads * sizeof(Moments),
                   group_norm_act_finalize_stats_kernel, p, plan, finalize,
                   static_cast<const Moments*>(partial));
    if (error != cudaSuccess) return error;
    return launch(device, grid_of(plan), threads, 0,
                  group_norm_act_apply_kernel<T, kVector, cl.value>, p, plan);
  });
}

int launch_group_norm_act_bwd(const GroupNormActBwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const SamplePlan plan =
      plan_samples(p.shape, p.groups, element_bytes(p.dtype), aligned({p.dy, p.x, p.dx}), device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  Sums* partial = reinterpret_cast<Sums*>(workspace);
  DxCoefficients* coefficients =
      reinterpret_cast<DxCoefficients*>(partial + plan.samples * plan.columns.splits * p.shape.c);
  const int columns = plan.columns.vector;
  return dispatch(p.dtype, columns, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    const int threads = threads_of(plan);
    const Sums* sums = partial;
    cudaError_t error =
        launch(device, grid_of(plan), threads, threads * kSlots<kVector, cl.value> * sizeof(Sums),
               group_norm_act_reduce_kernel<T, kVector, cl.value>, p, plan, partial);
    if (error != cudaSuccess) return error;
    const FinalizePlan by_group(plan.columns.splits * plan.per_group);
    error = launch(device, by_group.grid(plan.statistics()), kThreads, kThreads * sizeof(Sums),
                   group_norm_act_finalize_reduce_kernel, p, plan, by_group, sums, coefficients);
    if (error != cudaSuccess) return error;
    const FinalizePlan by_channel(plan.columns.splits * plan.samples);
    error = launch(device, by_channel.grid(p.shape.c), kThreads, kThreads * sizeof(Sums),
                   group_norm_act_finalize_parameters_kernel, p, plan, by_channel, sums);
    if (error != cudaSuccess) return error;
    return launch(device, grid_of(plan), threads, 0, group_norm_act_dx_kernel<T, kVector, cl.value>,
                  p, plan, static_cast<const DxCoefficients*>(coefficients));
  });
}

}  // namespace fastcnn
