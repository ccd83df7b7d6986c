// Must not compile: one error for each line of the kernel.
#include <cuda_runtime.h>

__global__ void not_offered_kernel(float* y) {
  __shared__ float sums[32];
  y[__activemask() & 31] = 0;
  atomicAdd(y, 1.0f);
  __shfl_down_sync(0xffffffff, short{1}, 1);
}
