// pixel_norm_act in NCHW: pixels are columns of the [c, hw] matrix of a sample. A block has the
// vectors of 32 neighbouring pixels, or as many as there are, and its lanes share their channels;
// the second reading is close behind the first, and its tile (512 bytes a channel) small beside the
// L2 cache.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "group_norm_act.h"

namespace fastcnn {
namespace {

__device__ float number(const void* values, int64_t i, float otherwise) {
  return values == nullptr ? otherwise : static_cast<const float*>(values)[i];
}

struct Sum {
  float value = 0;
};

struct MergeSum {
  __device__ void operator()(Sum& a, const Sum& b) const { a.value += b.value; }
};

// ---- NCHW: pixels are columns of the [c, hw] matrix of a sample ---------------------------------

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

// in_groups for what a lane has of `count` vectors, of which it takes every `lanes`-th: their
// numbers are the offsets.
template <class Load, class Each>
__device__ void for_each_of_lane(int64_t count, int lane, int lanes, Load load, Each each) {
  int64_t next = lane;
  const auto take = [&] {
    const int64_t at = next;
    next += lanes;
    return at;
  };
  in_groups<kUnroll>(count > lane ? (count - lane + lanes - 1) / lanes : 0, take, load, each);
}

// The sum over the lanes of each column, for all of them.
template <int kVector>
__device__ void sum_of_lanes(float (&values)[kVector], const TilePlan& plan) {
  Sum sums[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[v].value = values[v];
  merge_lanes(sums, plan.columns, plan.lanes, MergeSum{});
  const Sum* shared = shared_memory<Sum>() + threadIdx.x % plan.columns * kVector;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVector; ++v) values[v] = shared[v].value;
  __syncthreads();  // the next call writes there
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    pixel_norm_act_fwd_kernel(GroupNormActFwdParams p, TilePlan plan) {
  const int64_t c = p.shape.c, hw = p.shape.hw, pixel = plan.pixel();
  const bool active = pixel < hw;
  const int64_t begin = plan.sample() * c * hw + pixel, statistic = plan.sample() * hw + pixel;
  const T* x = static_cast<const T*>(p.x) + begin;
  T* y = static_cast<T*>(p.y) + begin;
  // body(channel, x) for each of the lane's channels
  const auto for_each = [&](auto body) {
    for_each_of_lane(
        active ? c : 0, plan.lane(), plan.lanes,
        [&]<int kN>(const int64_t(&channels)[kN]) {
          int64_t offsets[kN];
#pragma unroll
          for (int u = 0; u < kN; ++u) offsets[u] = channels[u] * hw;
          return Group<T, kVector, kN, 1>({x}, offsets);
        },
        [&](const auto& group, int u, int64_t channel) {
          float values[kVector];
          group.to_floats(0, u, values);
          body(channel, values);
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
    var[v] = variance_of(mean[v], (var[v] - deviations[v] * drift) * inverse);
    rstd[v] = rstd_of(var[v], p.eps);
    if (active && plan.lane() == 0) {
      static_cast<float*>(p.mean)[statistic + v] = mean[v];
      static_cast<float*>(p.var)[statistic + v] = var[v];
    }
  }
  with_act<T>(p.act, [&](auto act) {
    for_each([&](int64_t j, const float(&values)[kVector]) {
      const float weight = number(p.weight, j, 1.f), bias = number(p.bias, j, 0.f);
      float out[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        out[v] = (values[v] - mean[v]) * (rstd[v] * weight) + bias;
      }
      act.fwd_each(out);
      store(y + j * hw, out);
    });
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
    with_act<T>(p.act, [&](auto act) {
      for_each_of_lane(
          active ? c : 0, plan.lane(), plan.lanes,
          [&]<int kN>(const int64_t(&channels)[kN]) {
            int64_t offsets[kN];
#pragma unroll
            for (int u = 0; u < kN; ++u) offsets[u] = channels[u] * hw;
            return Group<T, kVector, kN, 2>({x, dy}, offsets);
          },
          [&](const auto& group, int u, int64_t channel) {
            const float weight = number(p.weight, channel, 1.f);
            const float bias = number(p.bias, channel, 0.f);
            float xhat[kVector], grad[kVector], z[kVector];
            group.to_floats(0, u, xhat);
            group.to_floats(1, u, grad);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              const float centered = xhat[v] - mean[v];
              z[v] = centered * (rstd[v] * weight) + bias;
              xhat[v] = centered * rstd[v];
            }
            act.bwd_each(grad, z);
#pragma unroll
            for (int v = 0; v < kVector; ++v) grad[v] *= weight;
            body(channel, xhat, grad);
          });
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

}  // namespace
}  // namespace fastcnn
