// batch_norm_act on CUDA.
//
// Data movement, T = one pass over the tensor:
//   forward   stats reads x (1T); apply reads x and residual, writes y (2T or 3T).
//   backward  reduce reads dy, x (and what was saved where a residual was added, then writing
//             dresidual); dx reads dy (or dresidual) and x and writes dx: 5T, and 7T with a
//             residual.
// Sums over the batch have two stages: each block reduces its split to one partial a channel, which
// `finish` joins in a fixed order. No atomics: the same bits from run to run.
// Variance: kUnroll values are summed, then squared around their own mean, in registers; groups,
// threads and splits are joined by Chan's formula. There is never a difference of large squares.
#include <algorithm>

#include "batch_norm_act.h"
#include "common/columns.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace fastcnn {
namespace {

__device__ float rstd_of(float var, double eps) { return rsqrtf(var + static_cast<float>(eps)); }

// The numbers of a thread's channels: one for each element of its vector, or one for all (NCHW).
template <int kVector, bool kChannelsLast>
constexpr int kSlots = kChannelsLast ? kVector : 1;

template <int kCount, class Params>
struct Coefficients {
  float mean[kCount], scale[kCount], bias[kCount], rstd[kCount];

  __device__ Coefficients(const Params& p, int64_t channel) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      mean[s] = static_cast<const float*>(p.mean)[channel + s];
      rstd[s] = rstd_of(static_cast<const float*>(p.var)[channel + s], p.eps);
      scale[s] = rstd[s];
      if (p.weight != nullptr) scale[s] *= static_cast<const float*>(p.weight)[channel + s];
      bias[s] = p.bias == nullptr ? 0.f : static_cast<const float*>(p.bias)[channel + s];
    }
  }
};

// ---- forward statistics ------------------------------------------------------------------------

// partial: Moments [splits, c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_stats_kernel(BatchNormActFwdParams p, ColumnPlan plan, Moments* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  const T* x = static_cast<const T*>(p.x);
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  float count = 0, mean[kVector] = {}, m2[kVector] = {};
  walk.run(
      [&](const int64_t(&offsets)[kUnroll]) {
        float values[kUnroll][kVector];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) load(x + offsets[u], values[u]);
        const float share = kUnroll / (count + kUnroll), spread = count * share;
        count += kUnroll;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          float sum = 0, squares = 0;
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) sum += values[u][v];
          const float center = sum * (1.f / kUnroll);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            squares += (values[u][v] - center) * (values[u][v] - center);
          }
          const float delta = center - mean[v];
          mean[v] = moved_mean(mean[v], center, delta * share);
          m2[v] += squares + delta * delta * spread;
        }
      },
      [&](int64_t offset) {
        float value[kVector];
        load(x + offset, value);
        const float share = 1.f / (count + 1), spread = count * share;
        count += 1;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float delta = value[v] - mean[v];
          mean[v] = moved_mean(mean[v], value[v], delta * share);
          m2[v] += delta * delta * spread;
        }
      });
  Moments moments[kCount];
#pragma unroll
  for (int v = 0; v < kVector; ++v) moments[kChannelsLast ? v : 0].join(count, mean[v], m2[v]);
  join_lanes(moments, plan.columns, plan.lanes, JoinMoments{});
  if (threadIdx.x / plan.columns == 0 && walk.active) {
    for (int s = 0; s < kCount; ++s) {
      partial[blockIdx.y * p.shape.c + walk.channel + s] = moments[s];
    }
  }
}

__global__ void batch_norm_act_finish_stats_kernel(BatchNormActFwdParams p, const Moments* partial,
                                                   int splits) {
  const int64_t channel = finish_channel();
  const Moments total = join_splits(partial, splits, p.shape.c, channel, JoinMoments{});
  if (threadIdx.x < kFinishColumns && channel < p.shape.c) {
    static_cast<float*>(p.mean)[channel] = total.mean;
    static_cast<float*>(p.var)[channel] = total.m2 / total.count;
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_apply_kernel(BatchNormActFwdParams p, ColumnPlan plan) {
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  if (!walk.active) return;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  const Coefficients<kSlots<kVector, kChannelsLast>, BatchNormActFwdParams> k(p, walk.channel);
  const auto finish = [&](int64_t offset, const float(&value)[kVector],
                          const float(&added)[kVector]) {
    float z[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kChannelsLast ? v : 0;
      z[v] = (value[v] - k.mean[s]) * k.scale[s] + k.bias[s] + added[v];
    }
    act_fwd(p.act, z);
    store(y + offset, z);
  };
  walk.run(
      [&](const int64_t(&offsets)[kUnroll]) {
        float values[kUnroll][kVector], added[kUnroll][kVector] = {};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) load(x + offsets[u], values[u]);
        if (residual != nullptr) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) load(residual + offsets[u], added[u]);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) finish(offsets[u], values[u], added[u]);
      },
      [&](int64_t offset) {
        float value[kVector], added[kVector] = {};
        load(x + offset, value);
        if (residual != nullptr) load(residual + offset, added);
        finish(offset, value, added);
      });
}

// ---- backward ----------------------------------------------------------------------------------

// dz of one vector, in place of dy. z is rebuilt as the forward made it; where a residual was
// added, with the saved residual, or y is read in place of z.
template <class T, int kVector, bool kChannelsLast, class Coefficients>
__device__ void grad_z(const BatchNormActBwdParams& p, const Coefficients& k, int64_t offset,
                       const float (&x)[kVector], float (&dy)[kVector]) {
  if (p.act == Act::kNone) return;
  float z[kVector];
  float saved[kVector] = {};
  if (p.saved != nullptr) load(static_cast<const T*>(p.saved) + offset, saved);
  const bool from_y = p.saved != nullptr && slope_is_in_y(p.act);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const int s = kChannelsLast ? v : 0;
    const float rebuilt = (x[v] - k.mean[s]) * k.scale[s] + k.bias[s] + saved[v];
    z[v] = from_y ? saved[v] : rebuilt;
  }
  act_bwd(p.act, dy, z);
}

struct Sums {
  float dz = 0, dzx = 0;  // sum(dz), sum(dz * (x - mean))
};

struct JoinSums {
  __device__ void operator()(Sums& a, const Sums& b) const {
    a.dz += b.dz;
    a.dzx += b.dzx;
  }
};

// Loads dy and x of kUnroll vectors or of one, then body(offset, x, dz) for each.
template <class T, int kVector, bool kChannelsLast, class Coefficients, class Body>
__device__ void for_each_dz(const BatchNormActBwdParams& p, Walk<kVector, kChannelsLast>& walk,
                            const Coefficients& k, Body body) {
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  walk.run(
      [&](const int64_t(&offsets)[kUnroll]) {
        float grads[kUnroll][kVector], values[kUnroll][kVector];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          load(dy + offsets[u], grads[u]);
          load(x + offsets[u], values[u]);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          grad_z<T, kVector, kChannelsLast>(p, k, offsets[u], values[u], grads[u]);
          body(offsets[u], values[u], grads[u]);
        }
      },
      [&](int64_t offset) {
        float grad[kVector], value[kVector];
        load(dy + offset, grad);
        load(x + offset, value);
        grad_z<T, kVector, kChannelsLast>(p, k, offset, value, grad);
        body(offset, value, grad);
      });
}

// partial: Sums [splits, c]
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_reduce_kernel(BatchNormActBwdParams p, ColumnPlan plan, Sums* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  Sums sums[kCount];
  if (walk.active) {
    const Coefficients<kCount, BatchNormActBwdParams> k(p, walk.channel);
    T* dresidual = static_cast<T*>(p.dresidual);
    for_each_dz<T>(p, walk, k,
                   [&](int64_t offset, const float(&x)[kVector], const float(&dz)[kVector]) {
                     if (dresidual != nullptr) store(dresidual + offset, dz);
#pragma unroll
                     for (int v = 0; v < kVector; ++v) {
                       const int s = kChannelsLast ? v : 0;
                       sums[s].dz += dz[v];
                       sums[s].dzx += dz[v] * (x[v] - k.mean[s]);
                     }
                   });
  }
  join_lanes(sums, plan.columns, plan.lanes, JoinSums{});
  if (threadIdx.x / plan.columns == 0 && walk.active) {
    for (int s = 0; s < kCount; ++s) {
      partial[blockIdx.y * p.shape.c + walk.channel + s] = sums[s];
    }
  }
}

__global__ void batch_norm_act_finish_reduce_kernel(BatchNormActBwdParams p, const Sums* partial,
                                                    int splits) {
  const int64_t channel = finish_channel();
  const Sums total = join_splits(partial, splits, p.shape.c, channel, JoinSums{});
  if (threadIdx.x < kFinishColumns && channel < p.shape.c) {
    static_cast<float*>(p.dbias)[channel] = total.dz;
    static_cast<float*>(p.dweight)[channel] =
        total.dzx * rstd_of(static_cast<const float*>(p.var)[channel], p.eps);
  }
}

// dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)); with fixed statistics dx = scale * dz.
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_act_dx_kernel(BatchNormActBwdParams p, ColumnPlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  if (!walk.active) return;
  const Coefficients<kCount, BatchNormActBwdParams> k(p, walk.channel);
  const float inverse = 1.f / (p.total == nullptr ? static_cast<float>(p.shape.per_channel())
                                                  : *static_cast<const float*>(p.total));
  float shift[kCount], slope[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    shift[s] = static_cast<const float*>(p.dbias)[walk.channel + s] * inverse;
    slope[s] = static_cast<const float*>(p.dweight)[walk.channel + s] * inverse * k.rstd[s];
  }
  T* dx = static_cast<T*>(p.dx);
  for_each_dz<T>(p, walk, k,
                 [&](int64_t offset, const float(&x)[kVector], const float(&dz)[kVector]) {
                   float out[kVector];
#pragma unroll
                   for (int v = 0; v < kVector; ++v) {
                     const int s = kChannelsLast ? v : 0;
                     out[v] = dz[v];
                     if (p.training) out[v] -= shift[s] + (x[v] - k.mean[s]) * slope[s];
                     out[v] *= k.scale[s];
                   }
                   store(dx + offset, out);
                 });
}

// ---- launching ---------------------------------------------------------------------------------

dim3 grid_of(const ColumnPlan& plan) {
  return dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
}

dim3 finish_grid(const ImageShape& shape) {
  return dim3(static_cast<unsigned>((shape.c + kFinishColumns - 1) / kFinishColumns));
}

}  // namespace

int64_t batch_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  // Unaligned tensors take one element at a time and then need the most splits.
  const int bytes = element_bytes(dtype);
  const int64_t splits = std::max(plan_columns(shape, bytes, true, device.sm_count).splits,
                                  plan_columns(shape, bytes, false, device.sm_count).splits);
  return splits * shape.c * static_cast<int64_t>(sizeof(Moments) / sizeof(float));
}

int launch_batch_norm_act_apply(const BatchNormActFwdParams& p, const CudaDevice& device) {
  const ColumnPlan plan = plan_columns(p.shape, element_bytes(p.dtype),
                                       aligned({p.x, p.residual, p.y}), device.sm_count);
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    return launch(device, grid_of(plan), kThreads, 0,
                  batch_norm_act_apply_kernel<decltype(t), decltype(vector)::value, cl.value>, p,
                  plan);
  });
}

int launch_batch_norm_act_fwd(const BatchNormActFwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const ColumnPlan plan = plan_columns(p.shape, element_bytes(p.dtype),
                                       aligned({p.x, p.residual, p.y}), device.sm_count);
  Moments* partial = reinterpret_cast<Moments*>(workspace);
  const cudaError_t error =
      dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
        constexpr int kVector = decltype(vector)::value;
        return launch(
            device, grid_of(plan), kThreads, kThreads * kSlots<kVector, cl.value> * sizeof(Moments),
            batch_norm_act_stats_kernel<decltype(t), kVector, cl.value>, p, plan, partial);
      });
  if (error != cudaSuccess) return error;
  const cudaError_t finished =
      launch(device, finish_grid(p.shape), kThreads, kThreads * sizeof(Moments),
             batch_norm_act_finish_stats_kernel, p, partial, plan.splits);
  return finished != cudaSuccess || p.y == nullptr ? finished
                                                   : launch_batch_norm_act_apply(p, device);
}

int launch_batch_norm_act_bwd(const BatchNormActBwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const ColumnPlan plan =
      plan_columns(p.shape, element_bytes(p.dtype),
                   aligned({p.dy, p.x, p.saved, p.dx, p.dresidual}), device.sm_count);
  Sums* partial = reinterpret_cast<Sums*>(workspace);
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    if (p.total == nullptr) {
      const size_t shared_bytes = kThreads * kSlots<kVector, cl.value> * sizeof(Sums);
      cudaError_t error =
          launch(device, grid_of(plan), kThreads, shared_bytes,
                 batch_norm_act_reduce_kernel<T, kVector, cl.value>, p, plan, partial);
      if (error != cudaSuccess) return error;
      error = launch(device, finish_grid(p.shape), kThreads, kThreads * sizeof(Sums),
                     batch_norm_act_finish_reduce_kernel, p, partial, plan.splits);
      if (error != cudaSuccess || p.dx == nullptr) return error;
    }
    BatchNormActBwdParams second = p;
    if (p.dresidual != nullptr) {  // dz lies there now
      second.dy = p.dresidual;
      second.act = Act::kNone;
    }
    return launch(device, grid_of(plan), kThreads, 0,
                  batch_norm_act_dx_kernel<T, kVector, cl.value>, second, plan);
  });
}

}  // namespace fastcnn
