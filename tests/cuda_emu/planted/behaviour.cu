// One small kernel for each thing that the emulator must let through, or must catch.
// test_cuda_emu.py says why.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <map>
#include <memory>

#include "cuda/shared_memory.cuh"
#include "planted.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

cudaLaunchConfig_t config(dim3 grid, dim3 block, size_t shared_bytes = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return config;
}

template <class... Parameters, class... Arguments>
void run(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments... arguments) {
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
}

void print(const int* values, int count) {
  for (int i = 0; i < count; ++i) std::printf("%d%c", values[i], i + 1 < count ? ' ' : '\n');
}

// --- Correct
// ---------------------------------------------------------------------------------------------------------

// y: [6, 32]
__global__ void collectives_kernel(int* y) {
  const int lane = threadIdx.x;
  y[lane] = __shfl_sync(kFull, 100 + lane, lane + 3);
  y[32 + lane] = __shfl_xor_sync(kFull, 100 + lane, 5);
  y[64 + lane] = __shfl_down_sync(kFull, 100 + lane, 30);
  y[96 + lane] = __shfl_up_sync(kFull, 100 + lane, 30);
  y[128 + lane] = int(__shfl_sync(kFull, -1.5 - lane, 31) * 2);
  const unsigned low = 0x0000ffff,
                 mask = lane < 16 ? low : ~low;  // each half of the warp on its own
  const int votes = int(__ballot_sync(mask, lane % 5 == 0) >> (lane & 16) & 0xffff);
  y[160 + lane] = votes * 4 + __any_sync(mask, lane == 3) * 2 + __all_sync(mask, lane >= 16);
}

void collectives() {
  int y[6 * 32];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config(1, 32), collectives_kernel, y); });
  for (int row = 0; row < 6; ++row) print(y + row * 32, 32);
}

// y: [blocks * threads], the linear index of each thread of the grid, computed from the built-in
// variables
__global__ void indices_kernel(int* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y +
      100000 * blockIdx.z;
}

void indices() {
  int y[16 * 12];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config({2, 4, 2}, {3, 2, 2}), indices_kernel, y); });
  print(y, 16 * 12);
}

// Each block reads shared memory before it writes it: the poison, never what the block before has
// left.
__global__ void poison_kernel(int* y) {
  int* s = fastcnn::shared_memory<int>();
  y[blockIdx.x] = s[5];
  s[5] = 7;
}

void poison() {
  int y[3];
  run(config(3, 1, 6 * sizeof(int)), poison_kernel, y);
  print(y, 3);
}

__global__ void early_exit_kernel(int* y) {
  if (threadIdx.x >= 40) return;  // in the middle of a warp
  int* s = fastcnn::shared_memory<int>();
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[39 - threadIdx.x];
}

void early_exit() {
  int y[40];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config(1, 64, 160), early_exit_kernel, y); });
  print(y, 40);
}

__global__ void intrinsics_kernel(double* y, int* counter) {
  y[0] = __umulhi(0xdeadbeefu, 0xcafef00du);
  y[1] = double(__umul64hi(0xfedcba9876543210u, 0x10u));
  y[2] = rsqrtf(16.0f) + __frsqrt_rn(0.25f) + __frcp_rn(8.0f);
  y[3] = __fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f);  // 2^-24 is lost unless rounded once
  y[4] = __float_as_uint(-2.0f) + double(__uint_as_float(0x3fc00000u));
  y[5] = min(3, -4) + max(2u, 5u) + min(0.5f, NAN) + max(0.25, double(NAN));
  y[6] = __bfloat162float(__float2bfloat16_rn(1.0f + 0x1p-8f)) +
         __half2float(__float2half_rn(65504.0f));
  y[7] = __fdividef(7.0f, 2.0f) + __expf(0.0f) + atomicAdd(counter, 2);
  __threadfence();
}

void intrinsics() {
  double y[8];
  int counter = 40;
  run(config(1, 1), intrinsics_kernel, y, &counter);
  for (const double value : y) std::printf("%.17g\n", value);
  std::printf("%d\n", counter);
}

__global__ void empty_kernel() {}

void empty_tensor() {
  cuda_emu::check_schedules({{"y", nullptr, 0}}, [] { cudaMemsetAsync(nullptr, 0, 0, nullptr); });
}

void device() {
  int device = -1, processors = 0, shared_bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  std::printf("%d %d %d\n", device, processors, shared_bytes);
}

void launch_limits() {
  run(config(1, 1024), empty_kernel);  // the largest: prints nothing
  run(config(1, 1025), empty_kernel);
  run(config(1, {32, 33}), empty_kernel);
  run(config(1, {1, 1, 65}), empty_kernel);
  run(config(1, 0), empty_kernel);
  run(config(0, 1), empty_kernel);
  run(config({1, 65536}, 1), empty_kernel);
  std::printf("then: %s\n", cudaGetErrorString(cudaGetLastError()));
  std::printf("then: %s\n", cudaGetErrorString(cudaGetLastError()));
  run(config(1, 1, 48 << 10), empty_kernel);
  run(config(1, 1, (48 << 10) + 1), empty_kernel);
  const auto allow = [](int bytes) {
    return cudaGetErrorString(
        cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  };
  std::printf("228 KiB: %s\n", allow(228 << 10));
  std::printf("227 KiB: %s\n", allow(227 << 10));
  run(config(1, 1, 227 << 10), empty_kernel);
  run(config(1, 1, (227 << 10) + 1), empty_kernel);
}

// --- Planted defects
// -------------------------------------------------------------------------------------------------

__global__ void copy_kernel(const int* x, int n, int* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i % n] = x[i];  // < is meant
}

void global_out_of_bounds() {
  const auto x = std::make_unique<int[]>(33), y = std::make_unique<int[]>(33);
  run(config(2, 32), copy_kernel, x.get(), 33, y.get());
}

__global__ void shared_out_of_bounds_kernel() { fastcnn::shared_memory<float>()[threadIdx.x] = 0; }

// The index is not known to the compiler, so only the red zone behind the array can tell.
__global__ void stack_out_of_bounds_kernel(int count, int* y) {
  int values[4] = {1, 2, 3, 4};
  int* p = values;
  asm volatile("" : "+r"(p));
  __syncthreads();
  for (int i = 0; i < count; ++i) y[0] += p[i];
}

void stack_out_of_bounds() {
  int y = 0;
  run(config(1, 2), stack_out_of_bounds_kernel, 5, &y);
}

__global__ void lane_exited_kernel() {
  if (threadIdx.x == 17) return;
  __shfl_xor_sync(kFull, 1.0f, 16);
}

__global__ void partial_warp_kernel() { __shfl_xor_sync(kFull, 1, 1); }

__global__ void own_bit_missing_kernel() { __shfl_sync(0xfffffff7u, 1, 0); }

__global__ void source_not_named_kernel() {
  if (threadIdx.x < 16) __shfl_down_sync(0x0000ffffu, 1, 4);
}

__global__ void masks_differ_kernel() { __ballot_sync(threadIdx.x < 16 ? kFull : ~1u, 1); }

__global__ void deadlock_kernel() {
  if (threadIdx.y < 2)
    __syncthreads();
  else
    __syncwarp();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void no_syncwarp_kernel(int* y) {
  int* s = fastcnn::shared_memory<int>();
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

void no_syncwarp() {
  int y[32];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config(1, 32, 128), no_syncwarp_kernel, y); });
}

__global__ void blocks_depend_kernel(int* y) {
  y[blockIdx.x] = blockIdx.x ? y[blockIdx.x - 1] + 1 : 0;
}

void blocks_depend() {
  int y[4];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config(4, 1), blocks_depend_kernel, y); });
}

// Ascending and descending, each odd block runs after exactly one of its neighbours. ran: [33], y:
// [33]
__global__ void neighbours_kernel(int* ran, int* y) {
  const int b = blockIdx.x;
  ran[b] = 1;
  y[b] = b % 2 ? ran[b - 1] ^ ran[b + 1] : 0;
}

void neighbours() {
  int ran[33], y[33];
  cuda_emu::check_schedules({{"y", y, sizeof y}}, [&] {
    cudaMemsetAsync(ran, 0, sizeof ran, nullptr);
    run(config(33, 1), neighbours_kernel, ran, y);
  });
}

__global__ void all_but_last_kernel(signed char* y) { y[threadIdx.x] = -1; }

void never_written() {
  signed char y[8];
  cuda_emu::check_schedules({{"y", y, sizeof y}},
                            [&] { run(config(1, 7), all_but_last_kernel, y); });
}

__global__ void vector_load_kernel(const float* x, float* y) {
  *y = __ldg(reinterpret_cast<const float4*>(x)).w;
}

void misaligned() {
  alignas(16) float x[8] = {}, y;
  run(config(1, 1), vector_load_kernel, static_cast<const float*>(x + 1), &y);
}

__global__ void offset_kernel(int rows, int row_bytes, int* y) { *y = rows * row_bytes; }

void overflow() {
  int y;
  run(config(1, 1), offset_kernel, 65536, 32768, &y);
}

void cluster() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t two = config(2, 1);
  two.attrs = &attribute;
  two.numAttrs = 1;
  run(two, empty_kernel);
}

const std::map<std::string, std::function<void()>> cases = {
    {"collectives", collectives},
    {"indices", indices},
    {"poison", poison},
    {"early_exit", early_exit},
    {"intrinsics", intrinsics},
    {"empty_tensor", empty_tensor},
    {"device", device},
    {"launch_limits", launch_limits},
    {"global_out_of_bounds", global_out_of_bounds},
    {"shared_out_of_bounds",
     [] { run(config(1, 32, 31 * sizeof(float)), shared_out_of_bounds_kernel); }},
    {"shared_not_asked_for", [] { run(config(1, 1), shared_out_of_bounds_kernel); }},
    {"stack_out_of_bounds", stack_out_of_bounds},
    {"lane_exited", [] { run(config(1, 32), lane_exited_kernel); }},
    {"partial_warp", [] { run(config(1, 50), partial_warp_kernel); }},
    {"own_bit_missing", [] { run(config(1, 32), own_bit_missing_kernel); }},
    {"source_not_named", [] { run(config(1, 32), source_not_named_kernel); }},
    {"masks_differ", [] { run(config(1, 32), masks_differ_kernel); }},
    {"deadlock", [] { run(config({2, 2}, {8, 4}), deadlock_kernel); }},
    {"two_barriers", [] { run(config(1, 64), two_barriers_kernel); }},
    {"no_syncwarp", no_syncwarp},
    {"blocks_depend", blocks_depend},
    {"neighbours", neighbours},
    {"never_written", never_written},
    {"misaligned", misaligned},
    {"overflow", overflow},
    {"cluster", cluster},
};

}  // namespace

bool run_behaviour(const std::string& name) {
  const auto found = cases.find(name);
  if (found == cases.end()) return false;
  found->second();
  return true;
}
