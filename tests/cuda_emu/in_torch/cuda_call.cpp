// CudaCall of the emulated build; compiled with the emulator's header in front.
#include "bindings/cuda_call.h"

namespace fastcnn {
namespace {

constexpr int64_t kBehind = 1024;         // floats behind a workspace
constexpr unsigned char kPattern = 0xff;  // NaN, as memory that nobody has written yet

// CUDA_EMU_SMS: of another GPU, for the paths that are chosen there.
int multiprocessors() {
  const char* given = std::getenv("CUDA_EMU_SMS");
  return given == nullptr ? cuda_emu::kMultiprocessors : std::atoi(given);
}

}  // namespace

CudaCall::CudaCall(const char* op, const Tensor& x) : op_(op), x_(x), device_{} {
  static std::mutex one_at_a_time;
  alone_ = std::unique_lock(one_at_a_time);
  device_ = {multiprocessors(), nullptr, cuda_emu::kMaxSharedBytes};
}

Tensor CudaCall::workspace(int64_t floats) const {
  workspace_ = torch::stable::new_empty(x_, {floats + kBehind}, ScalarType::Float);
  std::memset(workspace_->mutable_data_ptr(), kPattern, (floats + kBehind) * sizeof(float));
  return *workspace_;
}

void CudaCall::check(int error) const {
  if (error != cudaSuccess) fail(op_, cudaGetErrorString(static_cast<cudaError_t>(error)));
  if (!workspace_) return;
  const auto* end = static_cast<const unsigned char*>(workspace_->const_data_ptr()) +
                    workspace_->numel() * sizeof(float);
  const auto* behind = end - kBehind * sizeof(float);
  if (std::any_of(behind, end, [](unsigned char byte) { return byte != kPattern; })) {
    fail(op_, "a kernel wrote behind its workspace of ", workspace_->numel() - kBehind, " floats");
  }
}

}  // namespace fastcnn
