// pixel_norm_act on CUDA: each pixel normalised over its channels.
//
// Data movement, T = one pass over the tensor:
//   forward   reads x and writes y (2T). channels_last: a pixel is a slab of c neighbouring
//   elements,
//             slab_norm.cuh. NCHW: a block has the vectors of 32 neighbouring pixels, or as many as
//             there are, and its lanes share their channels; the second reading is close behind the
//             first, and its tile (512 bytes a channel) small beside the L2 cache.
//   backward  dx reads dy and x, twice in a row as above, and is written (3T); the sums of dweight
//             and dbias read both again, channel by channel (2T).
// Sums have two stages and a fixed order; no atomics. Statistics in two passes around the mean.
#include <algorithm>

#include "common/columns.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "cuda/slab_norm.cuh"
#include "group_norm_act.h"

namespace fastcnn {
namespace {

__device__ float rstd_of(float var, double eps) { return rsqrtf(var + static_cast<float>(eps)); }

__device__ float number(const void* values, int64_t i, float otherwise) {
  return values == nullptr ? otherwise : static_cast<const float*>(values)[i];
}

struct Sum {
  float value = 0;
};

struct JoinSum {
  __device__ void operator()(Sum& a, const Sum& b) const { a.value += b.value; }
};

// ---- NCHW: pixels are columns of the [c, hw] matrix of a sample
// ----------------------------------

// A block: `columns` vectors of neighbouring pixels, `lanes` threads for each.
struct TilePlan {
  int vector, columns, lanes;
  int64_t tiles;  // of a sample

  __device__ int lane() const { return threadIdx.x / columns; }
  __device__ int64_t sample() const { return blockIdx.x / tiles; }
  // Of the thread's first pixel.
  __device__ int64_t pixel() const {
    return (blockIdx.x % tiles * columns + threadIdx.x % columns) * static_cast<int64_t>(vector);
  }
};

// body(channels, count) for this lane's channels, kUnroll at a time and then one by one.
template <class Body>
__device__ void for_each_channel(int64_t c, const TilePlan& plan, bool active, Body body) {
  int64_t j = active ? plan.lane() : c;
  for (; j + (kUnroll - 1) * plan.lanes < c; j += kUnroll * plan.lanes)
    body(j, Constant<kUnroll>{});
  for (; j < c; j += plan.lanes) body(j, Constant<1>{});
}

// The sum over the lanes of each column, for all of them.
template <int kVector>
__device__ void sum_of_lanes(float (&values)[kVector], const TilePlan& plan) {
  Sum sums[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[v].value = values[v];
  join_lanes(sums, plan.columns, plan.lanes, JoinSum{});
  const Sum* shared = shared_memory<Sum>() + threadIdx.x % plan.columns * kVector;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVector; ++v) values[v] = shared[v].value;
  __syncthreads();  // the next call writes there
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    pixel_norm_act_fwd_kernel(GroupNormActFwdParams p, TilePlan plan) {
  const int64_t c = p.shape.c, hw = p.shape.hw, pixel = plan.pixel();
  const bool active = pixel < hw;
  const int64_t begin = plan.sample() * c * hw + pixel, statistic = plan.sample() * hw + pixel;
  const T* x = static_cast<const T*>(p.x) + begin;
  T* y = static_cast<T*>(p.y) + begin;
  // body(channel, x) for each of the lane's channels
  const auto for_each = [&](auto body) {
    for_each_channel(c, plan, active, [&](int64_t j, auto count) {
      float values[count.value][kVector];
#pragma unroll
      for (int u = 0; u < count.value; ++u) load(x + (j + u * plan.lanes) * hw, values[u]);
#pragma unroll
      for (int u = 0; u < count.value; ++u) body(j + u * plan.lanes, values[u]);
    });
  };
  const float inverse = 1.f / static_cast<float>(c);
  float mean[kVector] = {}, deviations[kVector] = {}, var[kVector] = {}, rstd[kVector];
  for_each([&](int64_t, const float(&values)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) mean[v] += values[v];
  });
  sum_of_lanes(mean, plan);
#pragma unroll
  for (int v = 0; v < kVector; ++v) mean[v] *= inverse;
  for_each([&](int64_t, const float(&values)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float a = values[v] - mean[v];
      deviations[v] += a;
      var[v] += a * a;
    }
  });
  sum_of_lanes(deviations, plan);
  sum_of_lanes(var, plan);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const float drift = deviations[v] * inverse;
    mean[v] += drift;
    var[v] = (var[v] - deviations[v] * drift) * inverse;
    rstd[v] = rstd_of(var[v], p.eps);
    if (active && plan.lane() == 0) {
      static_cast<float*>(p.mean)[statistic + v] = mean[v];
      static_cast<float*>(p.var)[statistic + v] = var[v];
    }
  }
  for_each([&](int64_t j, const float(&values)[kVector]) {
    const float weight = number(p.weight, j, 1.f), bias = number(p.bias, j, 0.f);
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      out[v] = (values[v] - mean[v]) * (rstd[v] * weight) + bias;
    }
    act_fwd(p.act, out);
    store(y + j * hw, out);
  });
}

// dx = rstd * (weight * dz - mean(weight * dz) - xhat * mean(weight * dz * xhat))
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    pixel_norm_act_dx_kernel(GroupNormActBwdParams p, TilePlan plan) {
  const int64_t c = p.shape.c, hw = p.shape.hw, pixel = plan.pixel();
  const bool active = pixel < hw;
  const int64_t begin = plan.sample() * c * hw + pixel, statistic = plan.sample() * hw + pixel;
  const T* x = static_cast<const T*>(p.x) + begin;
  const T* dy = static_cast<const T*>(p.dy) + begin;
  T* dx = static_cast<T*>(p.dx) + begin;
  float mean[kVector] = {}, rstd[kVector] = {};
  if (active) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      mean[v] = static_cast<const float*>(p.mean)[statistic + v];
      rstd[v] = rstd_of(static_cast<const float*>(p.var)[statistic + v], p.eps);
    }
  }
  // body(channel, xhat, weight * dz) for each of the lane's channels
  const auto for_each = [&](auto body) {
    for_each_channel(c, plan, active, [&](int64_t j, auto count) {
      float values[count.value][kVector], grads[count.value][kVector];
#pragma unroll
      for (int u = 0; u < count.value; ++u) {
        load(x + (j + u * plan.lanes) * hw, values[u]);
        load(dy + (j + u * plan.lanes) * hw, grads[u]);
      }
#pragma unroll
      for (int u = 0; u < count.value; ++u) {
        const int64_t channel = j + u * plan.lanes;
        const float weight = number(p.weight, channel, 1.f), bias = number(p.bias, channel, 0.f);
        float z[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float centered = values[u][v] - mean[v];
          z[v] = centered * (rstd[v] * weight) + bias;
          values[u][v] = centered * rstd[v];
        }
        act_bwd(p.act, grads[u], z);
#pragma unroll
        for (int v = 0; v < kVector; ++v) grads[u][v] *= weight;
        body(channel, values[u], grads[u]);
      }
    });
  };
  float shift[kVector] = {}, slope[kVector] = {};
  for_each([&](int64_t, const float(&xhat)[kVector], const float(&grad)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      shift[v] += grad[v];
      slope[v] += grad[v] * xhat[v];
    }
  });
  sum_of_lanes(shift, plan);
  sum_of_lanes(slope, plan);
  const float inverse = 1.f / static_cast<float>(c);
  for_each([&](int64_t j, const float(&xhat)[kVector], const float(&grad)[kVector]) {
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      out[v] = rstd[v] * (grad[v] - shift[v] * inverse - xhat[v] * (slope[v] * inverse));
    }
    store(dx + j * hw, out);
  });
}

// ---- channels_last: pixels are rows
// --------------------------------------------------------------

template <class T, int kVector>
__global__ void __launch_bounds__(kSlabThreads, 1)
    pixel_norm_act_dx_rows_kernel(GroupNormActBwdParams p, SlabPlan plan) {
  const int lanes = plan.lanes, lane = threadIdx.x % lanes;
  const int64_t row = blockIdx.x * static_cast<int64_t>(plan.per_block) + threadIdx.x / plan.lanes;
  const bool active = row < plan.slabs;
  const int64_t c = p.shape.c, vectors = active ? plan.vectors : 0;
  const T* x = static_cast<const T*>(p.x) + row * c;
  const T* dy = static_cast<const T*>(p.dy) + row * c;
  T* dx = static_cast<T*>(p.dx) + row * c;
  const float mean = active ? static_cast<const float*>(p.mean)[row] : 0.f;
  const float rstd = active ? rstd_of(static_cast<const float*>(p.var)[row], p.eps) : 0.f;
  // body(offset, xhat, weight * dz) for each of the lane's vectors
  const auto for_each = [&](auto body) {
    const auto some = [&](int64_t i, auto count) {
      float values[count.value][kVector], grads[count.value][kVector];
#pragma unroll
      for (int u = 0; u < count.value; ++u) {
        load(x + (i + u * lanes) * kVector, values[u]);
        load(dy + (i + u * lanes) * kVector, grads[u]);
      }
#pragma unroll
      for (int u = 0; u < count.value; ++u) {
        const int64_t channel = (i + u * lanes) * kVector;
        float weight[kVector], z[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          weight[v] = number(p.weight, channel + v, 1.f);
          const float centered = values[u][v] - mean;
          z[v] = centered * (rstd * weight[v]) + number(p.bias, channel + v, 0.f);
          values[u][v] = centered * rstd;
        }
        act_bwd(p.act, grads[u], z);
#pragma unroll
        for (int v = 0; v < kVector; ++v) grads[u][v] *= weight[v];
        body(channel, values[u], grads[u]);
      }
    };
    int64_t i = lane;
    for (; i + (kUnroll - 1) * lanes < vectors; i += kUnroll * lanes) some(i, Constant<kUnroll>{});
    for (; i < vectors; i += lanes) some(i, Constant<1>{});
  };
  float shift = 0, slope = 0;
  for_each([&](int64_t, const float(&xhat)[kVector], const float(&grad)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      shift += grad[v];
      slope += grad[v] * xhat[v];
    }
  });
  const float inverse = 1.f / static_cast<float>(c);
  shift = sum_of_slab(shift, lanes, shared_memory<float>()) * inverse;
  slope = sum_of_slab(slope, lanes, shared_memory<float>()) * inverse;
  for_each([&](int64_t o, const float(&xhat)[kVector], const float(&grad)[kVector]) {
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = rstd * (grad[v] - shift - xhat[v] * slope);
    store(dx + o, out);
  });
}

// ---- dweight and dbias
// ---------------------------------------------------------------------------

struct Gradients {
  float dweight = 0, dbias = 0;
};

struct JoinGradients {
  __device__ void operator()(Gradients& a, const Gradients& b) const {
    a.dweight += b.dweight;
    a.dbias += b.dbias;
  }
};

// partial: Gradients [splits, c]. A walk over the channel's pixels, as ColumnPlan cuts them; the
// pixel of an element, whose statistics it needs, is counted beside it.
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    pixel_norm_act_reduce_kernel(GroupNormActBwdParams p, ColumnPlan plan, Gradients* partial) {
  constexpr int kCount = kChannelsLast ? kVector : 1;
  Walk<kVector, kChannelsLast> walk(p.shape, plan);
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  const auto *mean = static_cast<const float*>(p.mean), *var = static_cast<const float*>(p.var);
  Gradients sums[kCount];
  float weight[kCount], bias[kCount];
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    weight[s] = walk.active ? number(p.weight, walk.channel + s, 1.f) : 0.f;
    bias[s] = walk.active ? number(p.bias, walk.channel + s, 0.f) : 0.f;
  }
  const auto add = [&](int64_t offset, const float(&values)[kVector], float(&dz)[kVector]) {
    // Of the vector's first element. The division costs less than the wait for memory.
    const int64_t pixel = kChannelsLast
                              ? offset / p.shape.c
                              : offset / (p.shape.c * p.shape.hw) * p.shape.hw +
                                    (offset - walk.channel * p.shape.hw) % (p.shape.c * p.shape.hw);
    float xhat[kVector], z[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kChannelsLast ? v : 0;
      const int64_t at = pixel + (kChannelsLast ? 0 : v);
      const float rstd = rstd_of(var[at], p.eps), centered = values[v] - mean[at];
      xhat[v] = centered * rstd;
      z[v] = centered * (rstd * weight[s]) + bias[s];
    }
    act_bwd(p.act, dz, z);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kChannelsLast ? v : 0;
      sums[s].dbias += dz[v];
      sums[s].dweight += dz[v] * xhat[v];
    }
  };
  walk.run(
      [&](const int64_t(&offsets)[kUnroll]) {
        float values[kUnroll][kVector], grads[kUnroll][kVector];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          load(x + offsets[u], values[u]);
          load(dy + offsets[u], grads[u]);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add(offsets[u], values[u], grads[u]);
      },
      [&](int64_t offset) {
        float value[kVector], grad[kVector];
        load(x + offset, value);
        load(dy + offset, grad);
        add(offset, value, grad);
      });
  join_lanes(sums, plan.columns, plan.lanes, JoinGradients{});
  if (threadIdx.x / plan.columns == 0 && walk.active) {
    for (int s = 0; s < kCount; ++s) {
      partial[blockIdx.y * p.shape.c + walk.channel + s] = sums[s];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    pixel_norm_act_finish_reduce_kernel(GroupNormActBwdParams p, const Gradients* partial,
                                        int splits) {
  const int64_t channel = finish_channel();
  const Gradients total = join_splits(partial, splits, p.shape.c, channel, JoinGradients{});
  if (threadIdx.x < kFinishColumns && channel < p.shape.c) {
    static_cast<float*>(p.dweight)[channel] = total.dweight;
    static_cast<float*>(p.dbias)[channel] = total.dbias;
  }
}

// ---- launching
// -----------------------------------------------------------------------------------

TilePlan plan_tiles(const ImageShape& shape, int element_bytes, bool aligned) {
  TilePlan plan{};
  const int wide = 16 / element_bytes;
  plan.vector = aligned && shape.hw % wide == 0 ? wide : 1;
  const int64_t vectors = shape.hw / plan.vector;
  plan.columns = 1;
  while (plan.columns < 32 && plan.columns < vectors) plan.columns *= 2;
  plan.lanes = kThreads / plan.columns;
  plan.tiles = (vectors + plan.columns - 1) / plan.columns;
  return plan;
}

SlabPlan plan_rows(const ImageShape& shape, int element_bytes, bool aligned) {
  return plan_slabs({shape.per_channel(), shape.c, 1, true}, 1, element_bytes, aligned);
}

// One kernel over NCHW tiles.
template <class Params, class Pick>
int launch_tiles(const Params& p, const CudaDevice& device, bool whole, Pick pick) {
  const TilePlan plan = plan_tiles(p.shape, element_bytes(p.dtype), whole);
  if (p.shape.n * plan.tiles > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch(p.dtype, plan.vector, false, [&](auto t, auto vector, auto) {
    return launch(device, dim3(static_cast<unsigned>(p.shape.n * plan.tiles)), kThreads,
                  kThreads * vector.value * sizeof(Sum), pick(t, vector), p, plan);
  });
}

int launch_dx(const GroupNormActBwdParams& p, const CudaDevice& device, bool whole) {
  if (!p.shape.channels_last) {
    return launch_tiles(p, device, whole, [](auto t, auto vector) {
      return pixel_norm_act_dx_kernel<decltype(t), decltype(vector)::value>;
    });
  }
  const SlabPlan plan = plan_rows(p.shape, element_bytes(p.dtype), whole);
  const int64_t blocks = (plan.slabs + plan.per_block - 1) / plan.per_block;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch(p.dtype, plan.vector, true, [&](auto t, auto vector, auto) {
    const int threads = plan.lanes * plan.per_block;
    return launch(device, dim3(static_cast<unsigned>(blocks)), threads, threads * sizeof(float),
                  pixel_norm_act_dx_rows_kernel<decltype(t), decltype(vector)::value>, p, plan);
  });
}

}  // namespace

int64_t pixel_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  const int bytes = element_bytes(dtype);
  const int64_t splits = std::max(plan_columns(shape, bytes, true, device.sm_count).splits,
                                  plan_columns(shape, bytes, false, device.sm_count).splits);
  return splits * shape.c * static_cast<int64_t>(sizeof(Gradients) / sizeof(float));
}

int launch_pixel_norm_act_fwd(const GroupNormActFwdParams& p, float*, const CudaDevice& device) {
  const bool whole = aligned({p.x, p.y});
  if (!p.shape.channels_last) {
    return launch_tiles(p, device, whole, [](auto t, auto vector) {
      return pixel_norm_act_fwd_kernel<decltype(t), decltype(vector)::value>;
    });
  }
  GroupNormActFwdParams rows = p;
  rows.shape = {p.shape.per_channel(), p.shape.c, 1, true};
  rows.groups = 1;
  return launch_slab_norm_act_fwd(rows, plan_rows(p.shape, element_bytes(p.dtype), whole), device);
}

int launch_pixel_norm_act_bwd(const GroupNormActBwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const bool whole = aligned({p.dy, p.x, p.dx});
  const int dx = launch_dx(p, device, whole);
  if (dx != cudaSuccess) return dx;
  const ColumnPlan plan = plan_columns(p.shape, element_bytes(p.dtype), whole, device.sm_count);
  Gradients* partial = reinterpret_cast<Gradients*>(workspace);
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    const cudaError_t error =
        launch(device, dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
               kThreads, kThreads * (cl.value ? kVector : 1) * sizeof(Gradients),
               pixel_norm_act_reduce_kernel<decltype(t), kVector, cl.value>, p, plan, partial);
    if (error != cudaSuccess) return error;
    const unsigned blocks =
        static_cast<unsigned>((p.shape.c + kFinishColumns - 1) / kFinishColumns);
    return launch(device, dim3(blocks), kThreads, kThreads * sizeof(Gradients),
                  pixel_norm_act_finish_reduce_kernel, p, static_cast<const Gradients*>(partial),
                  plan.splits);
  });
}

}  // namespace fastcnn
