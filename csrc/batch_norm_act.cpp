// batch_norm_act between torch and the kernels: what fastcnn/ops/batch_norm_act/operators.py
// declares, here checked, allocated and launched.
#include "batch_norm_act.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/batch_norm_glue.h"

namespace fastcnn {
namespace {

// -> y, mean, var
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& x, const OptionalTensor& residual,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       double eps, int64_t act) {
  constexpr const char* kOp = "batch_norm_act_fwd";
  const Check check(kOp, x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = check.new_channels(), var = check.new_channels();
  const BatchNormActFwdParams p =
      fwd_params(check, x, residual, weight, bias, mean, var, eps, act, y);
  if (p.shape.numel() == 0) {  // no values, no statistics: those of a standard normal
    torch::stable::zero_(mean);
    torch::stable::fill_(var, 1.0);
  } else {
    launch(kOp, p, x);
  }
  return {y, mean, var};
}

template <auto launch>
Tensor apply(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
             const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps,
             int64_t act) {
  constexpr const char* kOp = "batch_norm_act_apply";
  const Check check(kOp, x);
  Tensor y = torch::stable::empty_like(x);
  const BatchNormActFwdParams p =
      fwd_params(check, x, residual, weight, bias, mean, var, eps, act, y);
  if (p.shape.numel() > 0) launch(kOp, p, x);
  return y;
}

// -> dx, dresidual (empty if not wanted), dweight, dbias
template <auto launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x,
                                               const OptionalTensor& saved,
                                               const OptionalTensor& weight,
                                               const OptionalTensor& bias, const Tensor& mean,
                                               const Tensor& var, double eps, int64_t act,
                                               bool training, bool want_dresidual) {
  constexpr const char* kOp = "batch_norm_act_bwd";
  const Check check(kOp, x);
  BatchNormActBwdParams p = bwd_params(check, dy, x, saved, weight, bias, mean, var, eps, act);
  Tensor dx = torch::stable::empty_like(x);
  p.training = training;
  p.dx = dx.mutable_data_ptr();
  auto [dresidual, dweight, dbias] = sum_up<launch>(kOp, check, x, p, want_dresidual);
  return {dx, dresidual, dweight, dbias};
}

template <auto launch>
void update_running(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var,
                    const OptionalTensor& total, double momentum, int64_t count) {
  constexpr const char* kOp = "batch_norm_update_running";
  const auto numbers = [&](const char* name, const Tensor& t, int64_t size, const Tensor& like) {
    check_storage(kOp, name, t);
    if (t.dim() != 1 || t.size(0) != size || t.scalar_type() != like.scalar_type() ||
        t.device() != running_mean.device() || (t.size(0) > 1 && t.stride(0) != 1)) {
      fail(kOp, name, ": expected a dense vector of ", size,
           " on running_mean's device, got sizes ", sizes_of(t), " of ",
           torch::headeronly::toString(t.scalar_type()));
    }
  };
  const auto dense = [&](const char* name, const Tensor& t, const Tensor& like) {
    numbers(name, t, running_mean.size(0), like);
  };
  if (running_mean.dim() != 1) {
    fail(kOp, "running_mean: expected a vector, got sizes ", sizes_of(running_mean));
  }
  dense("running_mean", running_mean, running_mean);
  dense("running_var", running_var, running_mean);
  dense("mean", mean, mean);
  dense("var", var, mean);
  if (total) numbers("total", *total, 1, mean);
  if (!(momentum >= 0 && momentum <= 1)) {
    fail(kOp, "momentum: expected a number from 0 to 1, got ", momentum);
  }
  if (!total && count < 2) fail(kOp, "count: expected at least 2 values a channel, got ", count);
  BatchNormRunningParams p{};
  p.c = running_mean.size(0);
  p.dtype = dtype_of(kOp, "running_mean", running_mean);
  p.stats_dtype = dtype_of(kOp, "mean", mean);
  if (p.stats_dtype != DType::kFloat32 && p.stats_dtype != DType::kFloat64) {
    fail(kOp, "mean: expected float32 or float64, got ",
         torch::headeronly::toString(mean.scalar_type()));
  }
  p.momentum = momentum;
  p.unbias = total ? 1.0 : static_cast<double>(count) / static_cast<double>(count - 1);
  p.total = total ? total->const_data_ptr() : nullptr;
  p.mean = mean.const_data_ptr();
  p.var = var.const_data_ptr();
  p.running_mean = running_mean.mutable_data_ptr();
  p.running_var = running_var.mutable_data_ptr();
  if (p.c > 0) launch(kOp, p, running_mean);
}

}  // namespace

using FwdParams = BatchNormActFwdParams;
using BwdParams = BatchNormActBwdParams;
using RunningParams = BatchNormRunningParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX((&fwd<on_cpu<batch_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("batch_norm_act_apply", TORCH_BOX((&apply<on_cpu<batch_norm_act_apply_cpu, FwdParams>>)));
  m.impl("batch_norm_act_bwd", TORCH_BOX((&bwd<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_update_running",
         TORCH_BOX((&update_running<on_cpu<batch_norm_running_cpu, RunningParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("batch_norm_act_fwd",
         TORCH_BOX((&fwd<on_cuda_summing<launch_batch_norm_act_fwd, FwdParams>>)));
  m.impl("batch_norm_act_apply",
         TORCH_BOX((&apply<on_cuda<launch_batch_norm_act_apply, FwdParams>>)));
  m.impl("batch_norm_act_bwd",
         TORCH_BOX((&bwd<on_cuda_summing<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_update_running",
         TORCH_BOX((&update_running<on_cuda<launch_batch_norm_running, RunningParams>>)));
}
#endif

}  // namespace fastcnn
