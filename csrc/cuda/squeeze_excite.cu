// squeeze_excite on CUDA.
//
// Data movement, T = one pass over the tensor: mean 1T (reads x), scale 2T (reads x or dy, writes y
// or dx), bwd_gate 2T (reads dy and x).
// A thread owns a vector of a sample's channels (channels_last) or of a plane, and walks down the
// pixels, cuda/columns.cuh. Where a sample is one split its block writes the result; else each
// block writes a partial sum a channel, and `finalize` merges them in a fixed order. No atomics:
// the same bits from run to run.
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sample_plan.cuh"
#include "squeeze_excite.h"

namespace fastcnn {
namespace {

struct MergeFloats {
  __device__ void operator()(float& a, float b) const { a += b; }
};

// What a mean is of its sum; the sum itself of dy * x.
__device__ float share_of(const SqueezeExciteReduceParams& p) {
  return p.dy == nullptr ? 1.f / static_cast<float>(p.shape.hw) : 1.f;
}

// partial: [samples, splits, c]
template <class T, int kVector, bool kChannelsLast, bool kDy>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_reduce_kernel(SqueezeExciteReduceParams p, SamplePlan plan, float* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>, kTensors = kDy ? 2 : 1;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  const T* from[kTensors] = {static_cast<const T*>(p.x) + plan.offset()};
  if constexpr (kDy) from[1] = static_cast<const T*>(p.dy) + plan.offset();
  float sums[kVector] = {};
  walk.template for_each<kUnroll, false>(
      [&]<int kN>(const int64_t(&offsets)[kN]) {
        return Group<T, kVector, kN, kTensors>(from, offsets);
      },
      [&](const auto& group, int u, int64_t) {
        float value[kVector], grad[kVector];
        group.to_floats(0, u, value);
        if constexpr (kDy) group.to_floats(1, u, grad);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[v] += kDy ? value[v] * grad[v] : value[v];
      });
  float total[kCount] = {};
#pragma unroll
  for (int v = 0; v < kVector; ++v) total[kChannelsLast ? v : 0] += sums[v];
  merge_lanes(total, plan.columns.columns, plan.columns.lanes, MergeFloats{});
  if (!plan.first_lane() || !walk.active) return;
  const bool whole = plan.columns.splits == 1;
  const float share = whole ? share_of(p) : 1.f;
  float* to = whole ? static_cast<float*>(p.out) + plan.index() * plan.sample.c + walk.channel
                    : partial + plan.partial(walk.channel);
  for (int s = 0; s < kCount; ++s) to[s] = total[s] * share;
}

__global__ void __launch_bounds__(kThreads)
    squeeze_excite_finalize_kernel(SqueezeExciteReduceParams p, SamplePlan plan,
                                   FinalizePlan finalize, const float* partial) {
  const int64_t statistic = finalize.column();
  float total[1] = {};
  for_each_partial(plan, finalize, partial, [&](float sum, int64_t) { total[0] += sum; });
  merge_lanes(total, finalize.columns(), finalize.lanes, MergeFloats{});
  if (finalize.lane() == 0 && statistic < plan.statistics()) {
    static_cast<float*>(p.out)[statistic] = total[0] * share_of(p);
  }
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_scale_kernel(SqueezeExciteScaleParams p, SamplePlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  if (!walk.active) return;
  const int64_t at = plan.index() * plan.sample.c + walk.channel;
  const float inverse = 1.f / static_cast<float>(p.shape.hw);
  float gate[kCount], shift[kCount] = {};
#pragma unroll
  for (int s = 0; s < kCount; ++s) gate[s] = static_cast<const float*>(p.gate)[at + s];
  if (p.dmean != nullptr) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      shift[s] = static_cast<const float*>(p.dmean)[at + s] * inverse;
    }
  }
  const T* x = static_cast<const T*>(p.x) + plan.offset();
  T* y = static_cast<T*>(p.y) + plan.offset();
  walk.template for_each<kUnroll, false>(
      [&]<int kN>(const int64_t(&offsets)[kN]) { return Group<T, kVector, kN, 1>({x}, offsets); },
      [&](const auto& group, int u, int64_t offset) {
        float value[kVector];
        group.to_floats(0, u, value);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const int s = kChannelsLast ? v : 0;
          value[v] = value[v] * gate[s] + shift[s];
        }
        store(y + offset, value);
      });
}

// A statistic is a sample's channel.
SamplePlan plan_of(const ImageShape& shape, DType dtype, bool whole, const CudaDevice& device) {
  return plan_samples(shape, shape.c, element_bytes(dtype), whole, device);
}

}  // namespace

int64_t squeeze_excite_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  // Unaligned tensors take one element at a time and then need the most splits.
  const int64_t whole = plan_of(shape, dtype, true, device).columns.splits;
  const int64_t single = plan_of(shape, dtype, false, device).columns.splits;
  const int64_t splits = whole > single ? whole : single;
  return splits == 1 ? 0 : shape.n * shape.c * splits;
}

int launch_squeeze_excite_reduce(const SqueezeExciteReduceParams& p, float* workspace,
                                 const CudaDevice& device) {
  const SamplePlan plan = plan_of(p.shape, p.dtype, aligned({p.x, p.dy}), device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  const int threads = threads_of(plan);
  const auto run = [&](auto t, auto vector, auto cl, auto dy) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    return launch(device, grid_of(plan), threads,
                  threads * kSlots<kVector, cl.value> * sizeof(float),
                  squeeze_excite_reduce_kernel<T, kVector, cl.value, dy.value>, p, plan, workspace);
  };
  const cudaError_t error = dispatch(
      p.dtype, plan.columns.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
        return p.dy == nullptr ? run(t, vector, cl, std::false_type{})
                               : run(t, vector, cl, std::true_type{});
      });
  if (error != cudaSuccess || plan.columns.splits == 1) return error;
  const FinalizePlan finalize(plan.columns.splits);
  return launch(device, finalize.grid(plan.statistics()), kThreads, kThreads * sizeof(float),
                squeeze_excite_finalize_kernel, p, plan, finalize,
                static_cast<const float*>(workspace));
}

int launch_squeeze_excite_scale(const SqueezeExciteScaleParams& p, const CudaDevice& device) {
  const SamplePlan plan = plan_of(p.shape, p.dtype, aligned({p.x, p.y}), device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  return dispatch(
      p.dtype, plan.columns.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
        return launch(device, grid_of(plan), threads_of(plan), 0,
                      squeeze_excite_scale_kernel<decltype(t), decltype(vector)::value, cl.value>,
                      p, plan);
      });
}

}  // namespace fastcnn
