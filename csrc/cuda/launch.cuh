// From an op's parameters to its kernels: template arguments and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/cuda_device.h"
#include "common/types.h"

namespace fastcnn {

inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Returns body(T{}, constant vector width, constant layout) for the kernels' template arguments, or
// cudaErrorInvalidValue for float64, which is the CPU's. Kernels of single elements serve both
// layouts, under std::false_type.
template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class Body>
cudaError_t dispatch(DType dtype, int vector, bool channels_last, Body body) {
  const auto width = [&](auto element) {
    constexpr Constant<16 / sizeof(element)> wide;
    if (vector == 1) return body(element, Constant<1>{}, std::false_type{});
    return channels_last ? body(element, wide, std::true_type{})
                         : body(element, wide, std::false_type{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return width(float{});
    case DType::kBFloat16:
      return width(__nv_bfloat16{});
    case DType::kFloat16:
      return width(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

// What a GPU takes: more blocks would be refused, or counted modulo 2^32.
inline bool fits_a_grid(int64_t x, int64_t y = 1) { return x <= INT32_MAX && y <= UINT16_MAX; }

template <class... Parameters, class... Arguments>
cudaError_t launch(const CudaDevice& device, dim3 grid, int threads, size_t shared_bytes,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream;
  if (shared_bytes > kSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

}  // namespace fastcnn
