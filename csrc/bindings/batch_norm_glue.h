// What the torch glue of batch_norm_act shares with that of its synchronised statistics.
#pragma once

#include <tuple>

#include "batch_norm_act.h"
#include "bindings/on_device.h"

namespace fastcnn {

// What the kernels of the forward read and write.
inline BatchNormActFwdParams fwd_params(const Check& check, const Tensor& x,
                                        const OptionalTensor& residual,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const Tensor& mean, const Tensor& var, double eps,
                                        int64_t act, const Tensor& y) {
  BatchNormActFwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.eps = check.eps(eps);
  p.x = x.const_data_ptr();
  p.residual = check.image("residual", residual);
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  p.mean = const_cast<void*>(check.channels("mean", mean));
  p.var = const_cast<void*>(check.channels("var", var));
  p.y = y.mutable_data_ptr();
  return p;
}

// What all kernels of the backward read; dx, dresidual, dweight and dbias are not there yet.
inline BatchNormActBwdParams bwd_params(const Check& check, const Tensor& dy, const Tensor& x,
                                        const OptionalTensor& saved, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const Tensor& mean,
                                        const Tensor& var, double eps, int64_t act) {
  BatchNormActBwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.eps = check.eps(eps);
  p.training = true;
  p.dy = check.image("dy", dy);
  p.x = x.const_data_ptr();
  p.saved = check.image("saved", saved);
  p.mean = check.channels("mean", mean);
  p.var = check.channels("var", var);
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  return p;
}

// Allocates what the sums are written to, and launches. -> dresidual (empty if not wanted),
// dweight, dbias
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> sum_up(const char* op, const Check& check, const Tensor& x,
                                          BatchNormActBwdParams p, bool want_dresidual) {
  Tensor dresidual =
      want_dresidual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dweight = check.new_channels(), dbias = check.new_channels();
  p.dresidual = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  if (p.shape.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    launch(op, p, x);
  }
  return {dresidual, dweight, dbias};
}

#ifdef FASTCNN_WITH_CUDA
// For the kernels that sum over the batch in two stages.
template <auto launch>
void on_cuda_summing(const char* op, const auto& p, const Tensor& x) {
  on_cuda_with_workspace<launch, batch_norm_act_workspace>(op, p, x);
}
#endif

}  // namespace fastcnn
