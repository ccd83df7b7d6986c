// squeeze_excite between torch and the kernels: what fastcnn/ops/squeeze_excite.py declares, here
// checked, allocated and launched.
#include "squeeze_excite.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

// empty: what stands for the sum over no pixels.
template <auto launch>
Tensor reduce(const char* op, const Tensor& x, const OptionalTensor& dy, double empty) {
  const Check check(op, x);
  SqueezeExciteReduceParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.dy = check.image("dy", dy);
  p.x = x.const_data_ptr();
  Tensor out = check.new_matrix(p.shape.n, p.shape.c);
  p.out = out.mutable_data_ptr();
  if (p.shape.numel() == 0) {
    torch::stable::fill_(out, empty);
  } else {
    launch(op, p, x);
  }
  return out;
}

template <auto launch>
Tensor mean(const Tensor& x) {
  return reduce<launch>("squeeze_excite_mean", x, std::nullopt,
                        std::numeric_limits<double>::quiet_NaN());
}

template <auto launch>
Tensor bwd_gate(const Tensor& dy, const Tensor& x) {
  return reduce<launch>("squeeze_excite_bwd_gate", x, dy, 0);
}

template <auto launch>
Tensor scale(const Tensor& x, const Tensor& gate, const OptionalTensor& dmean) {
  constexpr const char* kOp = "squeeze_excite_scale";
  const Check check(kOp, x);
  SqueezeExciteScaleParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.gate = check.matrix("gate", gate, p.shape.n, p.shape.c);
  if (dmean) p.dmean = check.matrix("dmean", *dmean, p.shape.n, p.shape.c);
  Tensor y = torch::stable::empty_like(x);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (p.shape.numel() > 0) launch(kOp, p, x);
  return y;
}

}  // namespace

using ReduceParams = SqueezeExciteReduceParams;
using ScaleParams = SqueezeExciteScaleParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("squeeze_excite_mean",
         TORCH_BOX((&mean<on_cpu<squeeze_excite_reduce_cpu, ReduceParams>>)));
  m.impl("squeeze_excite_bwd_gate",
         TORCH_BOX((&bwd_gate<on_cpu<squeeze_excite_reduce_cpu, ReduceParams>>)));
  m.impl("squeeze_excite_scale",
         TORCH_BOX((&scale<on_cpu<squeeze_excite_scale_cpu, ScaleParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("squeeze_excite_mean",
         TORCH_BOX((&mean<on_cuda_with_workspace<launch_squeeze_excite_reduce,
                                                 squeeze_excite_workspace, ReduceParams>>)));
  m.impl("squeeze_excite_bwd_gate",
         TORCH_BOX((&bwd_gate<on_cuda_with_workspace<launch_squeeze_excite_reduce,
                                                     squeeze_excite_workspace, ReduceParams>>)));
  m.impl("squeeze_excite_scale",
         TORCH_BOX((&scale<on_cuda<launch_squeeze_excite_scale, ScaleParams>>)));
}
#endif

}  // namespace fastcnn
