// One launch on a GPU, from torch's side: the right device, its stream, and memory in its order.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/check.h"
#include "common/cuda_device.h"

namespace fastcnn {

// Makes x's device current for the lifetime of the object.
class CudaCall {
 public:
  // Fails where this build has no code for the GPU.
  CudaCall(const char* op, const Tensor& x);

  const CudaDevice& device() const { return device_; }

  // Uninitialised; its lifetime ends in stream order.
  Tensor workspace(int64_t floats) const {
    return torch::stable::new_empty(x_, {floats}, ScalarType::Float);
  }

  // Fails with CUDA's words where a launcher did not return cudaSuccess.
  void check(int error) const;

 private:
  const char* op_;
  const Tensor& x_;
  torch::stable::accelerator::DeviceGuard guard_;
  CudaDevice device_;
};

}  // namespace fastcnn
