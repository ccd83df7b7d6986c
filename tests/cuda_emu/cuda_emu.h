// CUDA on the CPU, for tests without a GPU: the names that kernels and launchers use, on top of
// thread_model.h (which says what is checked and what is not). build.py puts this header in front
// of a .cu file and compiles it with g++.
#pragma once

#include "thread_model.h"

// === The names that kernels use. A name missing here is a compile error: add it when the first
// kernel needs it. ======

// g++ would make it an ordinary static variable, shared by all blocks, and ignores attributes that
// could prevent that.
#undef __shared__
#define __shared__ error_use_shared_memory_from_common_shared_memory_cuh_instead_of___shared__
#define __launch_bounds__(...)

inline const uint3& threadIdx = cuda_emu::emulator.thread_idx;
inline const uint3& blockIdx = cuda_emu::emulator.block_idx;
inline const dim3& blockDim = cuda_emu::emulator.block_dim;
inline const dim3& gridDim = cuda_emu::emulator.grid_dim;
constexpr int warpSize = cuda_emu::kLanes;

// Barriers, shuffles and votes. The last two arguments are the place of the call. A shuffle is
// always 32 lanes wide.
#define CUDA_EMU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(CUDA_EMU_PLACE) {
  cuda_emu::wait(cuda_emu::Thread::kAtBarrier, {"__syncthreads", file, line, 0xffffffffu});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMU_PLACE) {
  cuda_emu::vote({"__syncwarp", file, line, mask}, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, CUDA_EMU_PLACE) {
  return cuda_emu::shuffle({"__shfl_sync", file, line, mask}, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, CUDA_EMU_PLACE) {
  return cuda_emu::shuffle({"__shfl_xor_sync", file, line, mask}, value,
                           cuda_emu::lane_index() ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   CUDA_EMU_PLACE) {  // past the last lane: its own value
  const unsigned lane = cuda_emu::lane_index();
  return cuda_emu::shuffle({"__shfl_down_sync", file, line, mask}, value,
                           delta < 32 - lane ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 CUDA_EMU_PLACE) {  // before the first lane: its own value
  const unsigned lane = cuda_emu::lane_index();
  return cuda_emu::shuffle({"__shfl_up_sync", file, line, mask}, value,
                           delta <= lane ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMU_PLACE) {
  return cuda_emu::vote({"__ballot_sync", file, line, mask}, predicate);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMU_PLACE) {
  return cuda_emu::vote({"__any_sync", file, line, mask}, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMU_PLACE) {
  return cuda_emu::vote({"__all_sync", file, line, mask}, predicate) == mask;
}
#undef CUDA_EMU_PLACE
unsigned __activemask() =
    delete;  // since Volta its answer is the compiler's choice: pass the lanes you mean

inline void __threadfence() {}  // threads run one at a time, so every store is seen at once

// Atomics on integers only: the order of float additions would change the bits from run to run.
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return std::exchange(*address, *address + value);
}
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

// The special function unit, as far off as PTX's manual allows, to one side or the other: what is
// made with it is right on every GPU if it is right here. Subnormal arguments and results are 0.
namespace cuda_emu {
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }
inline float off_by(float y, float x, double relative) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return flushed(static_cast<float>(y * (1 + (bits * 2654435761u >> 31 ? relative : -relative))));
}
inline float exp2_approx(float x) {
  return off_by(static_cast<float>(std::exp2(static_cast<double>(flushed(x)))), x, 0x1p-22);
}
inline float reciprocal_approx(float x) { return off_by(1.0f / flushed(x), x, 0x1p-23); }
}  // namespace cuda_emu

// Arithmetic. extern "C", because some C libraries declare functions of the same names.
extern "C" {
inline float rsqrtf(float x) noexcept { return 1.0f / sqrtf(x); }
inline float __expf(float x) noexcept { return expf(x); }
}
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned __int128>(x) * y >> 64;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Both arguments of one type: CUDA's own overloads turn min(-1, 1u) silently into unsigned.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

// === The runtime functions that launchers use. Every stream is synchronous.
// ==========================================

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied byte by byte");
  return [&](Parameters... parameters) {
    return cuda_emu::launch(*config, reinterpret_cast<const void*>(kernel),
                            [&] { kernel(parameters...); });
  }(std::forward<Arguments>(arguments)...);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    cuda_emu::fail("function attribute %d is not emulated", attribute);
  if (value < 0 || value > cuda_emu::kMaxSharedBytes)
    return cuda_emu::result(cudaErrorInvalidValue);
  cuda_emu::emulator.max_shared_bytes[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

extern "C" {
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_emu::emulator.last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      cuda_emu::fail("error %d is none that the emulation returns", error);
  }
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emu::kMultiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_emu::kMaxSharedBytes;
      break;
    default:
      cuda_emu::fail("device attribute %d is not emulated", attribute);
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t count, cudaStream_t) {
  std::fill_n(static_cast<unsigned char*>(memory), count,
              byte);  // unlike memset, also 0 bytes at a null pointer
  return cudaSuccess;
}
}
