// Where a call of the torch glue runs: its `template <auto launch>` takes one of these functions.
#pragma once

#include "bindings/check.h"
#ifdef FASTCNN_WITH_CUDA
#include "bindings/cuda_call.h"
#endif

namespace fastcnn {

template <auto kernel>
void on_cpu(const char*, const auto& p, const Tensor&) {
  kernel(p);
}

#ifdef FASTCNN_WITH_CUDA
template <auto launch>
void on_cuda(const char* op, const auto& p, const Tensor& x) {
  const CudaCall call(op, x);
  call.check(launch(p, call.device()));
}

// workspace_floats(shape, dtype, device): how many the launcher is given.
template <auto launch, auto workspace_floats>
void on_cuda_with_workspace(const char* op, const auto& p, const Tensor& x) {
  const CudaCall call(op, x);
  Tensor workspace = call.workspace(workspace_floats(p.shape, p.dtype, call.device()));
  call.check(launch(p, static_cast<float*>(workspace.mutable_data_ptr()), call.device()));
}
#endif

}  // namespace fastcnn
