// batch_norm_act between torch and the kernels: what fastcnn/ops/batch_norm_act.py declares, here
// checked, allocated and launched.
#include "batch_norm_act.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#ifdef FASTCNN_WITH_CUDA
#include "common/cuda_call.h"
#endif

namespace fastcnn {
namespace {

BatchNormActFwdParams fwd_params(const Check& check, const Tensor& x,
                                 const OptionalTensor& residual, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                 double eps, int64_t act, const Tensor& y) {
  BatchNormActFwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.eps = eps;
  p.x = x.const_data_ptr();
  p.residual = check.image("residual", residual);
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  p.mean = const_cast<void*>(check.channels("mean", mean));
  p.var = const_cast<void*>(check.channels("var", var));
  p.y = y.mutable_data_ptr();
  return p;
}

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
  Tensor dx = torch::stable::empty_like(x);
  Tensor dresidual =
      want_dresidual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dweight = check.new_channels(), dbias = check.new_channels();
  BatchNormActBwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.eps = eps;
  p.training = training;
  p.dy = check.image("dy", dy);
  p.x = x.const_data_ptr();
  p.saved = check.image("saved", saved);
  p.mean = check.channels("mean", mean);
  p.var = check.channels("var", var);
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  p.dx = dx.mutable_data_ptr();
  p.dresidual = want_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  if (p.shape.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    launch(kOp, p, x);
  }
  return {dx, dresidual, dweight, dbias};
}

template <auto launch>
void update_running(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var,
                    double momentum, int64_t count) {
  constexpr const char* kOp = "batch_norm_update_running";
  const auto dense = [&](const char* name, const Tensor& t, const Tensor& like) {
    check_storage(kOp, name, t);
    if (t.dim() != 1 || t.size(0) != running_mean.size(0) ||
        t.scalar_type() != like.scalar_type() || t.device() != running_mean.device() ||
        (t.size(0) > 1 && t.stride(0) != 1)) {
      fail(kOp, name, ": expected a dense vector with running_mean's size and device, got sizes ",
           sizes_of(t), " of ", torch::headeronly::toString(t.scalar_type()));
    }
  };
  if (running_mean.dim() != 1) {
    fail(kOp, "running_mean: expected a vector, got sizes ", sizes_of(running_mean));
  }
  dense("running_mean", running_mean, running_mean);
  dense("running_var", running_var, running_mean);
  dense("mean", mean, mean);
  dense("var", var, mean);
  if (count < 2) fail(kOp, "count: expected at least 2 values a channel, got ", count);
  BatchNormRunningParams p{};
  p.c = running_mean.size(0);
  p.dtype = dtype_of(kOp, "running_mean", running_mean);
  p.stats_dtype = dtype_of(kOp, "mean", mean);
  if (p.stats_dtype != DType::kFloat32 && p.stats_dtype != DType::kFloat64) {
    fail(kOp, "mean: expected float32 or float64, got ",
         torch::headeronly::toString(mean.scalar_type()));
  }
  p.momentum = momentum;
  p.unbias = static_cast<double>(count) / static_cast<double>(count - 1);
  p.mean = mean.const_data_ptr();
  p.var = var.const_data_ptr();
  p.running_mean = running_mean.mutable_data_ptr();
  p.running_var = running_var.mutable_data_ptr();
  if (p.c > 0) launch(kOp, p, running_mean);
}

// Where a call runs. `template <auto kernel>` above takes one of these functions.
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

// For the kernels that sum over the batch in two stages.
template <auto launch>
void on_cuda_with_workspace(const char* op, const auto& p, const Tensor& x) {
  const CudaCall call(op, x);
  Tensor workspace = call.workspace(batch_norm_act_workspace(p.shape, p.dtype, call.device()));
  call.check(launch(p, static_cast<float*>(workspace.mutable_data_ptr()), call.device()));
}
#endif

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
         TORCH_BOX((&fwd<on_cuda_with_workspace<launch_batch_norm_act_fwd, FwdParams>>)));
  m.impl("batch_norm_act_apply",
         TORCH_BOX((&apply<on_cuda<launch_batch_norm_act_apply, FwdParams>>)));
  m.impl("batch_norm_act_bwd",
         TORCH_BOX((&bwd<on_cuda_with_workspace<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_update_running",
         TORCH_BOX((&update_running<on_cuda<launch_batch_norm_running, RunningParams>>)));
}
#endif

}  // namespace fastcnn
