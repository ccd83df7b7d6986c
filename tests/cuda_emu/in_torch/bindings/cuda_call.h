// In place of csrc/bindings/cuda_call.h in the emulated build: a call "on a GPU" with CPU tensors.
#pragma once

#include <mutex>

#include "bindings/check.h"
#include "common/cuda_device.h"

namespace fastcnn {

// A workspace holds no more floats than were asked for: those behind are looked at afterwards.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& x);

  const CudaDevice& device() const { return device_; }

  Tensor workspace(int64_t floats) const;

  // Fails with CUDA's words where a launcher did not return cudaSuccess.
  void check(int error) const;

 private:
  const char* op_;
  const Tensor& x_;
  std::unique_lock<std::mutex> alone_;  // the emulator is one GPU, and runs one kernel at a time
  CudaDevice device_;
  mutable OptionalTensor workspace_;
};

}  // namespace fastcnn
