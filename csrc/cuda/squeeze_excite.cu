// squeeze_excite on CUDA.
//
// Data movement, T = one pass over the tensor: forward reads x for the means (1T), then x again and
// writes y (2T); backward reads dy and x for the gates' gradients (2T), then dy again and writes dx
// (2T). A thread owns a vector of a sample's channels (channels_last) or of a plane and walks down
// the pixels, cuda/columns.cuh. Where a sample is one split its block writes the result of a sum;
// else each block writes a partial one a channel, and `finalize` merges them.
// Between the passes lie two products of a few numbers a sample: `rows` has a warp for four
// outputs, whose weights it reads side by side, `columns` a thread for one, of 32 side by side, and
// eight lanes for the sum. No atomics, sums in a fixed order: the same bits from run to run.
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sample_plan.cuh"
#include "squeeze_excite.h"

namespace fastcnn {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpRows = 4;                              // outputs of a warp
constexpr int kBlockRows = kThreads / kWarp * kWarpRows;  // of a block
constexpr int kColumnLanes = kThreads / kWarp;            // threads of one column's sum

struct MergeFloats {
  __device__ void operator()(float& a, float b) const { a += b; }
};

// ---- sums over pixels ---------------------------------------------------------------------------

// out [n, c]: the mean of x, or with a dy gate'(z2) times the sum of dy * x.
struct Reduction {
  const void *x, *dy;
  const float* z2;
  Gate gate;
  float* out;
  int64_t hw;

  __device__ void write(int64_t i, float sum) const {
    out[i] = dy == nullptr ? sum * (1.f / static_cast<float>(hw)) : gate_bwd(gate, sum, z2[i]);
  }
};

// partial: [samples, splits, c]
template <class T, int kVector, bool kChannelsLast, bool kDy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    squeeze_excite_reduce_kernel(Reduction r, SamplePlan plan, float* partial) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>, kTensors = kDy ? 2 : 1;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  const T* from[kTensors] = {static_cast<const T*>(r.x) + plan.offset()};
  if constexpr (kDy) from[kTensors - 1] = static_cast<const T*>(r.dy) + plan.offset();
  float sums[kVector] = {};
  walk.template for_each<kUnroll>(
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
  for (int s = 0; s < kCount; ++s) {
    if (plan.columns.splits == 1) {
      r.write(plan.index() * plan.sample.c + walk.channel + s, total[s]);
    } else {
      partial[plan.partial(walk.channel + s)] = total[s];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    squeeze_excite_finalize_kernel(Reduction r, SamplePlan plan, FinalizePlan finalize,
                                   const float* partial) {
  const int64_t statistic = finalize.column();
  float total[1] = {};
  for_each_partial(plan, finalize, partial, [&](float sum, int64_t) { total[0] += sum; });
  merge_lanes(total, finalize.columns(), finalize.lanes, MergeFloats{});
  if (finalize.lane() == 0 && statistic < plan.statistics()) r.write(statistic, total[0]);
}

// ---- products -----------------------------------------------------------------------------------

// A matrix [rows, columns] and what it multiplies, of n samples.
struct Product {
  const float *matrix, *in;
  float* out;
  int64_t rows, columns;
};

// out [n, rows] = act(in [n, columns]) @ matrix.T + bias
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_rows_kernel(Product p, const float* bias, Act act, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = blockIdx.x % blocks * kBlockRows + threadIdx.x / kWarp * kWarpRows;
  const float* in = p.in + sample * p.columns;
  float sums[kWarpRows] = {};
  for (int64_t k = lane; k < p.columns; k += kWarp) {
    float value[] = {in[k]};
    act_fwd(act, value);
#pragma unroll
    for (int s = 0; s < kWarpRows; ++s) {
      if (first + s < p.rows) sums[s] += p.matrix[(first + s) * p.columns + k] * value[0];
    }
  }
#pragma unroll
  for (int s = 0; s < kWarpRows; ++s) {
    for (int half = kWarp / 2; half > 0; half /= 2) {
      sums[s] += __shfl_xor_sync(0xffffffff, sums[s], half);
    }
    if (lane == 0 && first + s < p.rows) {
      p.out[sample * p.rows + first + s] = sums[s] + (bias == nullptr ? 0.f : bias[first + s]);
    }
  }
}

// out [n, columns] = in [n, rows] @ matrix, with a z [n, columns] times act'(z)
__global__ void __launch_bounds__(kThreads)
    squeeze_excite_columns_kernel(Product p, const float* z, Act act, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks;
  const int64_t k = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
  const float* in = p.in + sample * p.rows;
  float sum[1] = {};
  for (int64_t j = threadIdx.x / kWarp; j < p.rows; j += kColumnLanes) {
    if (k < p.columns) sum[0] += p.matrix[j * p.columns + k] * in[j];
  }
  merge_lanes(sum, kWarp, kColumnLanes, MergeFloats{});
  if (threadIdx.x >= kWarp || k >= p.columns) return;
  if (z != nullptr) {
    const float at[] = {z[sample * p.columns + k]};
    act_bwd(act, sum, at);
  }
  p.out[sample * p.columns + k] = sum[0];
}

// ---- scaling ------------------------------------------------------------------------------------

// y = x * gate(z2); with a dmean y = x * gate(z2) + dmean / hw
struct Scaling {
  const void* x;
  const float *z2, *dmean;
  Gate gate;
  void* y;
  int64_t hw;
};

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1)
    squeeze_excite_scale_kernel(Scaling p, SamplePlan plan) {
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
  Walk<kVector, kChannelsLast> walk(plan.sample, plan.columns, plan.tile());
  if (!walk.active) return;
  const int64_t at = plan.index() * plan.sample.c + walk.channel;
  const float inverse = 1.f / static_cast<float>(p.hw);
  float gate[kCount], shift[kCount] = {};
#pragma unroll
  for (int s = 0; s < kCount; ++s) gate[s] = p.z2[at + s];
  gate_fwd(p.gate, gate);
  if (p.dmean != nullptr) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) shift[s] = p.dmean[at + s] * inverse;
  }
  const T* x = static_cast<const T*>(p.x) + plan.offset();
  T* y = static_cast<T*>(p.y) + plan.offset();
  walk.template for_each<kUnroll>(
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

// ---- launching ----------------------------------------------------------------------------------

// A statistic is a sample's channel.
SamplePlan plan_of(const ImageShape& shape, DType dtype, bool whole, const CudaDevice& device) {
  return plan_samples(shape, shape.c, element_bytes(dtype), whole, device);
}

cudaError_t reduce(const Reduction& r, const ImageShape& shape, DType dtype, float* partial,
                   const CudaDevice& device) {
  const SamplePlan plan = plan_of(shape, dtype, aligned({r.x, r.dy}), device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  const int threads = threads_of(plan);
  const auto run = [&](auto t, auto vector, auto cl, auto dy) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    return launch(device, grid_of(plan), threads,
                  threads * kSlots<kVector, cl.value> * sizeof(float),
                  squeeze_excite_reduce_kernel<T, kVector, cl.value, dy.value>, r, plan, partial);
  };
  const cudaError_t error =
      dispatch(dtype, plan.columns.vector, shape.channels_last, [&](auto t, auto vector, auto cl) {
        return r.dy == nullptr ? run(t, vector, cl, std::false_type{})
                               : run(t, vector, cl, std::true_type{});
      });
  if (error != cudaSuccess || plan.columns.splits == 1) return error;
  const FinalizePlan finalize(plan.columns.splits);
  return launch(device, finalize.grid(plan.statistics()), kThreads, kThreads * sizeof(float),
                squeeze_excite_finalize_kernel, r, plan, finalize,
                static_cast<const float*>(partial));
}

cudaError_t multiply(const Product& p, int64_t n, int64_t outputs, int64_t of_block,
                     size_t shared_bytes, void (*kernel)(Product, const float*, Act, int64_t),
                     const float* beside, Act act, const CudaDevice& device) {
  const int64_t blocks = (outputs + of_block - 1) / of_block;
  if (!fits_a_grid(n * blocks)) return cudaErrorInvalidValue;
  return launch(device, dim3(static_cast<unsigned>(n * blocks)), kThreads, shared_bytes, kernel, p,
                beside, act, blocks);
}

cudaError_t by_rows(const Product& p, int64_t n, const void* bias, Act act,
                    const CudaDevice& device) {
  return multiply(p, n, p.rows, kBlockRows, 0, squeeze_excite_rows_kernel,
                  static_cast<const float*>(bias), act, device);
}

cudaError_t by_columns(const Product& p, int64_t n, const void* z, Act act,
                       const CudaDevice& device) {
  return multiply(p, n, p.columns, kWarp, kThreads * sizeof(float), squeeze_excite_columns_kernel,
                  static_cast<const float*>(z), act, device);
}

cudaError_t scale(const Scaling& p, const ImageShape& shape, DType dtype,
                  const CudaDevice& device) {
  const SamplePlan plan = plan_of(shape, dtype, aligned({p.x, p.y}), device);
  if (!can_launch(plan)) return cudaErrorInvalidValue;
  return dispatch(
      dtype, plan.columns.vector, shape.channels_last, [&](auto t, auto vector, auto cl) {
        return launch(device, grid_of(plan), threads_of(plan), 0,
                      squeeze_excite_scale_kernel<decltype(t), decltype(vector)::value, cl.value>,
                      p, plan);
      });
}

// Runs steps, one behind the other, until one fails.
template <class... Steps>
cudaError_t each(Steps... steps) {
  cudaError_t error = cudaSuccess;
  static_cast<void>((((error = steps()) == cudaSuccess) && ...));
  return error;
}

}  // namespace

// Partial sums, then dmean.
int64_t squeeze_excite_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  // Unaligned tensors take one element at a time and then need the most splits.
  const int64_t whole = plan_of(shape, dtype, true, device).columns.splits;
  const int64_t single = plan_of(shape, dtype, false, device).columns.splits;
  return shape.n * shape.c * ((whole > single ? whole : single) + 1);
}

int launch_squeeze_excite_fwd(const SqueezeExciteFwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const int64_t n = p.shape.n, c = p.shape.c;
  const auto *fc1 = static_cast<const float*>(p.fc1), *fc2 = static_cast<const float*>(p.fc2);
  auto *mean = static_cast<float*>(p.mean), *z1 = static_cast<float*>(p.z1);
  auto* z2 = static_cast<float*>(p.z2);
  const bool both = fc1 != nullptr;
  return each(
      [&] {
        const Reduction means{p.x, nullptr, nullptr, p.gate, mean, p.shape.hw};
        return reduce(means, p.shape, p.dtype, workspace, device);
      },
      [&] {
        if (!both) return cudaSuccess;
        return by_rows({fc1, mean, z1, p.m, c}, n, p.bias1, Act::kNone, device);
      },
      [&] {
        return both ? by_rows({fc2, z1, z2, c, p.m}, n, p.bias2, p.act, device)
                    : by_rows({fc2, mean, z2, c, c}, n, p.bias2, Act::kNone, device);
      },
      [&] {
        const Scaling scaling{p.x, z2, nullptr, p.gate, p.y, p.shape.hw};
        return scale(scaling, p.shape, p.dtype, device);
      });
}

int launch_squeeze_excite_bwd(const SqueezeExciteBwdParams& p, float* workspace,
                              const CudaDevice& device) {
  const int64_t n = p.shape.n, c = p.shape.c;
  const auto *fc1 = static_cast<const float*>(p.fc1), *fc2 = static_cast<const float*>(p.fc2);
  const auto* z2 = static_cast<const float*>(p.z2);
  auto *dz1 = static_cast<float*>(p.dz1), *dz2 = static_cast<float*>(p.dz2);
  float* dmean = workspace + squeeze_excite_workspace(p.shape, p.dtype, device) - n * c;
  const bool both = fc1 != nullptr;
  return each(
      [&] {
        const Reduction gradients{p.x, p.dy, z2, p.gate, dz2, p.shape.hw};
        return reduce(gradients, p.shape, p.dtype, workspace, device);
      },
      [&] {
        if (!both) return cudaSuccess;
        return by_columns({fc2, dz2, dz1, c, p.m}, n, p.z1, p.act, device);
      },
      [&] {
        return both ? by_columns({fc1, dz1, dmean, p.m, c}, n, nullptr, p.act, device)
                    : by_columns({fc2, dz2, dmean, c, c}, n, nullptr, p.act, device);
      },
      [&] {
        const Scaling scaling{p.dy, z2, dmean, p.gate, p.dx, p.shape.hw};
        return scale(scaling, p.shape, p.dtype, device);
      });
}

}  // namespace fastcnn
