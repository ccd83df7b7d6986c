// A block's dynamic shared memory as an array of T. All shared memory of the kernels is reached
// through here: its size is the launch's dynamicSmemBytes, so the emulator of the tests can own a
// block of exactly that size and see every access outside it (a `__shared__` variable would be an
// ordinary C++ variable there).
#pragma once

#include <cuda_runtime.h>

namespace fastcnn {

// Every T gets the same block: a kernel that needs two arrays places the second behind the first
// itself.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
#ifdef FASTCNN_CUDA_EMULATION
  return static_cast<T*>(cuda_emu::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char shared_memory_bytes[];
  return reinterpret_cast<T*>(shared_memory_bytes);
#endif
}

}  // namespace fastcnn
