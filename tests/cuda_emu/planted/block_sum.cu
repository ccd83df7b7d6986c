// The sum of n ints in two launches: the smallest kernel with everything in it (a loop over the
// grid, shuffles, shared memory, barriers, partial results). Without its barrier it is a planted
// defect.
#include <cuda_runtime.h>

#include "cuda/shared_memory.cuh"
#include "planted.h"

namespace {

// Block b sums x[i] for i = b * blockDim.x + threadIdx.x, and on in steps of the grid. Shared: one
// int a warp.
template <bool kWithBarrier>
__global__ void __launch_bounds__(1024) block_sum_kernel(const int* x, int64_t n, int* sums) {
  int sum = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step)
    sum += __ldg(x + i);
#pragma unroll
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2)
    sum += __shfl_down_sync(0xffffffff, sum, lanes);

  int* warp_sums = fastcnn::shared_memory<int>();
  const int warps = blockDim.x / warpSize;
  if (threadIdx.x % warpSize == 0) warp_sums[threadIdx.x / warpSize] = sum;
  if (kWithBarrier) __syncthreads();
  if (threadIdx.x >= warpSize) return;
  sum = int(threadIdx.x) < warps ? warp_sums[threadIdx.x] : 0;
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2)
    sum += __shfl_xor_sync(0xffffffff, sum, lanes);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

cudaError_t launch_block_sum(const int* x, int64_t n, unsigned blocks, unsigned threads,
                             bool with_barrier, int* partial, int* sum) {
  const auto kernel = with_barrier ? block_sum_kernel<true> : block_sum_kernel<false>;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = threads / 32 * sizeof(int);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, x, n, partial);
  if (error != cudaSuccess) return error;
  config.gridDim = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<const int*>(partial), int64_t{blocks},
                            sum);
}
