// pixel_norm_act on CUDA: each pixel normalised over its channels.
//
// Data movement, T = one pass over the tensor:
//   forward   reads x and writes y (2T). channels_last: a pixel is a tile of c elements side by
//             side, cuda/group_norm_act/one_pass.cuh. NCHW: cuda/group_norm_act/pixel_tiles.cuh.
//   backward  dx reads dy and x, twice in a row as above, and is written (3T); the sums of dweight
//             and dbias read both again, channel by channel (2T).
// Sums have two stages and a fixed order; no atomics. Statistics in two passes around the mean.
#include "cuda/activation.cuh"
#include "cuda/columns.cuh"
#include "cuda/group_norm_act/one_pass.cuh"
#include "cuda/group_norm_act/pixel_tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_coefficients.cuh"
#include "cuda/reduce.cuh"
#include "group_norm_act.h"

namespace fastcnn {
namespace {

// ---- channels_last: pixels are rows -------------------------------------------------------------

template <class T, int kVector>
__global__ void __launch_bounds__(kOnePassThreads, 1)
    pixel_norm_act_dx_rows_kernel(GroupNormActBwdParams p, OnePassPlan plan) {
  const int lanes = plan.lanes, lane = threadIdx.x % lanes;
  const int64_t row = blockIdx.x * static_cast<int64_t>(plan.per_block) + threadIdx.x / plan.lanes;
  const bool active = row < plan.tiles;
  const int64_t c = p.shape.c, vectors = active ? plan.vectors : 0;
  const T* x = static_cast<const T*>(p.x) + row * c;
  const T* dy = static_cast<const T*>(p.dy) + row * c;
  T* dx = static_cast<T*>(p.dx) + row * c;
  const float mean = active ? static_cast<const float*>(p.mean)[row] : 0.f;
  const float rstd = active ? rstd_of(static_cast<const float*>(p.var)[row], p.eps) : 0.f;
  // body(channel, xhat, weight * dz) for each of the lane's vectors
  const auto for_each = [&](auto body) {
    with_act<T>(p.act, [&](auto act) {
      for_each_of_lane(
          vectors, lane, lanes,
          [&]<int kN>(const int64_t(&numbers)[kN]) {
            int64_t channels[kN];
#pragma unroll
            for (int u = 0; u < kN; ++u) channels[u] = numbers[u] * kVector;
            return Group<T, kVector, kN, 2>({x, dy}, channels);
          },
          [&](const auto& group, int u, int64_t i) {
            const int64_t channel = i * kVector;
            float weight[kVector], bias[kVector], xhat[kVector], grad[kVector], z[kVector];
            load_parameters(p.weight, channel, 1.f, weight);
            load_parameters(p.bias, channel, 0.f, bias);
            group.to_floats(0, u, xhat);
            group.to_floats(1, u, grad);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              const float centered = xhat[v] - mean;
              z[v] = centered * (rstd * weight[v]) + bias[v];
              xhat[v] = centered * rstd;
            }
            act.bwd_each(grad, z);
#pragma unroll
            for (int v = 0; v < kVector; ++v) grad[v] *= weight[v];
            body(channel, xhat, grad);
          });
    });
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
  shift = sum_of_tile(shift, lanes, shared_memory<float>()) * inverse;
  slope = sum_of_tile(slope, lanes, shared_memory<float>()) * inverse;
  for_each([&](int64_t o, const float(&xhat)[kVector], const float(&grad)[kVector]) {
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = rstd * (grad[v] - shift - xhat[v] * slope);
    store(dx + o, out);
  });
}

// ---- dweight and dbias --------------------------------------------------------------------------

struct Gradients {
  float dweight = 0, dbias = 0;
};

struct MergeGradients {
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
  with_act<T>(p.act, [&](auto act) {
    walk.template for_each<kUnroll>(
        [&]<int kN>(const int64_t(&offsets)[kN]) {
          return Group<T, kVector, kN, 2>({x, dy}, offsets);
        },
        [&](const auto& group, int u, int64_t offset) {
          // Of the vector's first element. The division costs less than the wait for memory.
          const int64_t pixel =
              is_channels_last<kVector, kChannelsLast>(p.shape)
                  ? offset / p.shape.c
                  : offset / (p.shape.c * p.shape.hw) * p.shape.hw +
                        (offset - walk.channel * p.shape.hw) % (p.shape.c * p.shape.hw);
          float xhat[kVector], dz[kVector], z[kVector];
          group.to_floats(0, u, xhat);
          group.to_floats(1, u, dz);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const int s = kChannelsLast ? v : 0;
            const int64_t at = pixel + (kChannelsLast ? 0 : v);
            const float rstd = rstd_of(var[at], p.eps), centered = xhat[v] - mean[at];
            xhat[v] = centered * rstd;
            z[v] = centered * (rstd * weight[s]) + bias[s];
          }
          act.bwd_each(dz, z);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const int s = kChannelsLast ? v : 0;
            sums[s].dbias += dz[v];
            sums[s].dweight += dz[v] * xhat[v];
          }
        });
  });
  merge_lanes(sums, plan.columns, plan.lanes, MergeGradients{});
  if (threadIdx.x / plan.columns == 0 && walk.active) {
    for (int s = 0; s < kCount; ++s) {
      partial[blockIdx.y * p.shape.c + walk.channel + s] = sums[s];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    pixel_norm_act_finalize_reduce_kernel(GroupNormActBwdParams p, const Gradients* partial,
                                          int splits) {
  const int64_t channel = finalize_channel();
  const Gradients total = merge_splits(partial, splits, p.shape.c, channel, MergeGradients{});
  if (threadIdx.x < kFinalizeColumns && channel < p.shape.c) {
    static_cast<float*>(p.dweight)[channel] = total.dweight;
    static_cast<float*>(p.dbias)[channel] = total.dbias;
  }
}

// ---- launching ----------------------------------------------------------------------------------

OnePassPlan plan_rows(const ImageShape& shape, int element_bytes, bool aligned) {
  return plan_one_pass({shape.per_channel(), shape.c, 1, true}, 1, element_bytes, aligned);
}

// One kernel over NCHW tiles.
template <class Params, class Pick>
int launch_tiles(const Params& p, const CudaDevice& device, bool whole, Pick pick) {
  const TilePlan plan = plan_tiles(p.shape, element_bytes(p.dtype), whole);
  if (!fits_a_grid(p.shape.n * plan.tiles)) return cudaErrorInvalidValue;
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
  const bool words = whole && aligned({p.weight, p.bias});  // it loads them by 16 bytes too
  const OnePassPlan plan = plan_rows(p.shape, element_bytes(p.dtype), words);
  if (!plan.fits) return cudaErrorInvalidValue;
  const int64_t blocks = (plan.tiles + plan.per_block - 1) / plan.per_block;
  if (!fits_a_grid(blocks)) return cudaErrorInvalidValue;
  return dispatch(p.dtype, plan.vector, true, [&](auto t, auto vector, auto) {
    const int threads = plan.lanes * plan.per_block;
    return launch(device, dim3(static_cast<unsigned>(blocks)), threads, threads * sizeof(float),
                  pixel_norm_act_dx_rows_kernel<decltype(t), decltype(vector)::value>, p, plan);
  });
}

}  // namespace

int64_t pixel_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  const int bytes = element_bytes(dtype);
  const int64_t whole = plan_columns(shape, bytes, true, device.sm_count).splits;
  const int64_t single = plan_columns(shape, bytes, false, device.sm_count).splits;
  const int64_t splits = whole > single ? whole : single;
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
  const bool words = whole && aligned({p.weight, p.bias});  // it loads them by 16 bytes too
  return launch_one_pass_norm_act_fwd(rows, plan_rows(p.shape, element_bytes(p.dtype), words),
                                      device);
}

int launch_pixel_norm_act_bwd(const GroupNormActBwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const bool whole = aligned({p.dy, p.x, p.dx});
  const ColumnPlan plan = plan_columns(p.shape, element_bytes(p.dtype), whole, device.sm_count);
  if (!fits_a_grid(plan.tiles, plan.splits)) return cudaErrorInvalidValue;
  const int dx = launch_dx(p, device, whole);
  if (dx != cudaSuccess) return dx;
  Gradients* partial = reinterpret_cast<Gradients*>(workspace);
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    const cudaError_t error =
        launch(device, dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
               kThreads, kThreads * (cl.value ? kVector : 1) * sizeof(Gradients),
               pixel_norm_act_reduce_kernel<decltype(t), kVector, cl.value>, p, plan, partial);
    if (error != cudaSuccess) return error;
    const unsigned blocks =
        static_cast<unsigned>((p.shape.c + kFinalizeColumns - 1) / kFinalizeColumns);
    return launch(device, dim3(blocks), kThreads, kThreads * sizeof(Gradients),
                  pixel_norm_act_finalize_reduce_kernel, p, static_cast<const Gradients*>(partial),
                  plan.splits);
  });
}

}  // namespace fastcnn
