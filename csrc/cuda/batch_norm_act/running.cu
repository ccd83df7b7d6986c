// Statistics of batch_norm_act beyond one batch, on CUDA: those of several ranks merged, and the
// running ones. A few numbers a channel, one thread each.
#include "batch_norm_act.h"
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastcnn {
namespace {

__device__ int64_t thread_index() {
  return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
}

// Thread j merges channel j over the ranks, in their order; thread c adds up the count.
__global__ void __launch_bounds__(kThreads) batch_norm_merge_kernel(BatchNormMergeParams p) {
  const int64_t j = thread_index(), length = 2 * p.c + 1;
  const float* gathered = static_cast<const float*>(p.gathered);
  if (j < p.c) {
    Moments moments;
    for (int64_t rank = 0; rank < p.ranks; ++rank) {
      const float* of_rank = gathered + rank * length;
      moments.merge(of_rank[2 * p.c], of_rank[j], of_rank[p.c + j] * of_rank[2 * p.c]);
    }
    // Of no values: as of an empty batch.
    static_cast<float*>(p.mean)[j] = moments.mean;
    static_cast<float*>(p.var)[j] = moments.count == 0 ? 1.f : moments.var();
  } else if (j == p.c) {
    float total = 0;
    for (int64_t rank = 0; rank < p.ranks; ++rank) total += gathered[rank * length + 2 * p.c];
    *static_cast<float*>(p.total) = total;
  }
}

__device__ void blend(DType dtype, void* running, int64_t c, float next, float momentum) {
  const auto update = [&](auto* value) {
    using T = std::remove_pointer_t<decltype(value)>;
    const float kept = to_float(value[c]);
    value[c] = from_float<T>((1 - momentum) * kept + momentum * next);
  };
  if (dtype == DType::kFloat32) update(static_cast<float*>(running));
  if (dtype == DType::kBFloat16) update(static_cast<__nv_bfloat16*>(running));
  if (dtype == DType::kFloat16) update(static_cast<__half*>(running));
}

__global__ void __launch_bounds__(kThreads) batch_norm_running_kernel(BatchNormRunningParams p) {
  const int64_t c = thread_index();
  if (c >= p.c) return;
  float unbias = static_cast<float>(p.unbias);
  if (p.total != nullptr) {
    const float total = *static_cast<const float*>(p.total);
    if (!(total >= 2)) return;  // there is no unbiased variance
    unbias = total / (total - 1);
  }
  const float momentum = static_cast<float>(p.momentum);
  blend(p.dtype, p.running_mean, c, static_cast<const float*>(p.mean)[c], momentum);
  blend(p.dtype, p.running_var, c, static_cast<const float*>(p.var)[c] * unbias, momentum);
}

dim3 grid_for(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
}

}  // namespace

int launch_batch_norm_merge(const BatchNormMergeParams& p, const CudaDevice& device) {
  if (p.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  return launch(device, grid_for(p.c + 1), kThreads, 0, batch_norm_merge_kernel, p);
}

int launch_batch_norm_running(const BatchNormRunningParams& p, const CudaDevice& device) {
  if (p.dtype == DType::kFloat64 || p.stats_dtype != DType::kFloat32) return cudaErrorInvalidValue;
  return launch(device, grid_for(p.c), kThreads, 0, batch_norm_running_kernel, p);
}

}  // namespace fastcnn
