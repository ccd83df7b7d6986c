#include "bindings/cuda_call.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <mutex>

#include "bindings/cuda_archs.h"

namespace fastcnn {
namespace {

// This library links neither libtorch_cuda nor needs it to load: the function that tells torch's
// current stream is looked up in the copy that is already in the process. RTLD_DEFAULT does not
// find it, since Python loads torch's libraries without RTLD_GLOBAL.
using GetStream = AOTITorchError (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol =
      torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetStream>(symbol);
}

struct DeviceFacts {
  int sm_count;
  int shared_bytes;
  int capability;  // 90 for sm_90
};

constexpr int kMaxDevices = 64;

const DeviceFacts& facts_of(const char* op, int device) {
  static std::array<DeviceFacts, kMaxDevices> facts{};
  static std::array<std::once_flag, kMaxDevices> known;
  if (device < 0 || device >= kMaxDevices) {
    fail(op, "x: expected a device below cuda:", kMaxDevices, ", got cuda:", device);
  }
  std::call_once(known[device], [&] {
    int sm_count = 0, shared_bytes = 0, major = 0, minor = 0;
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
      if (error != cudaSuccess) fail(op, "cuda:", device, ": ", cudaGetErrorString(error));
    };
    ask(&sm_count, cudaDevAttrMultiProcessorCount);
    ask(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&minor, cudaDevAttrComputeCapabilityMinor);
    const std::string missing = missing_cuda_code(FASTCNN_CUDA_ARCHS, 10 * major + minor);
    if (!missing.empty()) fail(op, "x: ", missing);
    facts[device] = {sm_count, shared_bytes, 10 * major + minor};
  });
  return facts[device];
}

}  // namespace

CudaCall::CudaCall(const char* op, const Tensor& x)
    : op_(op), x_(x), guard_(x.get_device_index()), device_{} {
  static const GetStream get_stream = find_get_stream();
  if (get_stream == nullptr) {
    fail(op, "expected libtorch_cuda.so with aoti_torch_get_current_cuda_stream in this process, ",
         "got a torch without it; fastcnn needs torch 2.11 or later with CUDA");
  }
  void* stream = nullptr;
  if (get_stream(x.get_device_index(), &stream) != 0) fail(op, "torch gave no current CUDA stream");
  const DeviceFacts& facts = facts_of(op, x.get_device_index());
  device_ = {facts.sm_count, static_cast<CUstream_st*>(stream), facts.shared_bytes};
}

void CudaCall::check(int error) const {
  if (error != cudaSuccess) fail(op_, cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace fastcnn
