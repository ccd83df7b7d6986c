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

// -> stats [2 * c + 1]: mean, biased variance, count: what one rank sends to the others
template <auto launch>
Tensor stats(const Tensor& x) {
  constexpr const char* kOp = "batch_norm_act_stats";
  const Check check(kOp, x);
  const ImageShape shape = check.shape();
  Tensor stats = torch::stable::new_empty(x, {2 * shape.c + 1}, check.acc());
  if (shape.numel() == 0) return torch::stable::zero_(stats);
  Tensor mean = torch::stable::narrow(stats, 0, 0, shape.c);
  Tensor var = torch::stable::narrow(stats, 0, shape.c, shape.c);
  Tensor count = torch::stable::narrow(stats, 0, 2 * shape.c, 1);
  torch::stable::fill_(count, static_cast<double>(shape.per_channel()));
  BatchNormActFwdParams p{};
  p.shape = shape;
  p.dtype = check.dtype();
  p.x = x.const_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  launch(kOp, p, x);
  return stats;
}

// -> mean, var, total
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> join_stats(const Tensor& gathered) {
  constexpr const char* kOp = "batch_norm_join_stats";
  check_storage(kOp, "gathered", gathered);
  BatchNormJoinParams p{};
  p.dtype = dtype_of(kOp, "gathered", gathered);
  const bool acc = p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64;
  if (!acc || gathered.dim() != 2 || gathered.size(1) % 2 != 1 || !gathered.is_contiguous()) {
    fail(kOp, "gathered: expected a dense [ranks, 2 * c + 1] of float32 or float64, got sizes ",
         sizes_of(gathered), " of ", torch::headeronly::toString(gathered.scalar_type()));
  }
  p.ranks = gathered.size(0);
  p.c = gathered.size(1) / 2;
  Tensor mean = torch::stable::new_empty(gathered, {p.c});
  Tensor var = torch::stable::new_empty(gathered, {p.c});
  Tensor total = torch::stable::new_empty(gathered, {1});
  p.gathered = gathered.const_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  p.total = total.mutable_data_ptr();
  launch(kOp, p, gathered);
  return {mean, var, total};
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

// What all stages of the backward read; dx, dresidual, dweight and dbias are not there yet.
BatchNormActBwdParams bwd_params(const Check& check, const Tensor& dy, const Tensor& x,
                                 const OptionalTensor& saved, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                 double eps, int64_t act) {
  BatchNormActBwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.eps = eps;
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

// The first half of bwd, over this rank's part of the batch. -> dresidual (empty if not wanted),
// dweight, dbias
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> reduce(const Tensor& dy, const Tensor& x,
                                          const OptionalTensor& saved, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const Tensor& mean,
                                          const Tensor& var, double eps, int64_t act,
                                          bool want_dresidual) {
  constexpr const char* kOp = "batch_norm_act_reduce";
  const Check check(kOp, x);
  return sum_up<launch>(kOp, check, x,
                        bwd_params(check, dy, x, saved, weight, bias, mean, var, eps, act),
                        want_dresidual);
}

// The second half, from the sums of all ranks; with fixed statistics (not training) none count.
template <auto launch>
Tensor dx(const Tensor& dy, const Tensor& x, const OptionalTensor& saved,
          const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
          const Tensor& var, const Tensor& dweight, const Tensor& dbias, const Tensor& total,
          double eps, int64_t act, bool training) {
  constexpr const char* kOp = "batch_norm_act_dx";
  const Check check(kOp, x);
  BatchNormActBwdParams p = bwd_params(check, dy, x, saved, weight, bias, mean, var, eps, act);
  Tensor dx = torch::stable::empty_like(x);
  p.training = training;
  p.total = check.numbers("total", total, 1);
  p.dx = dx.mutable_data_ptr();
  p.dweight = const_cast<void*>(check.channels("dweight", dweight));
  p.dbias = const_cast<void*>(check.channels("dbias", dbias));
  if (p.shape.numel() > 0) launch(kOp, p, x);
  return dx;
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
using JoinParams = BatchNormJoinParams;
using RunningParams = BatchNormRunningParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX((&fwd<on_cpu<batch_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("batch_norm_act_apply", TORCH_BOX((&apply<on_cpu<batch_norm_act_apply_cpu, FwdParams>>)));
  m.impl("batch_norm_act_bwd", TORCH_BOX((&bwd<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_act_stats", TORCH_BOX((&stats<on_cpu<batch_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("batch_norm_act_reduce", TORCH_BOX((&reduce<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_act_dx", TORCH_BOX((&dx<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_join_stats",
         TORCH_BOX((&join_stats<on_cpu<batch_norm_join_cpu, JoinParams>>)));
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
  m.impl("batch_norm_act_stats",
         TORCH_BOX((&stats<on_cuda_with_workspace<launch_batch_norm_act_fwd, FwdParams>>)));
  m.impl("batch_norm_act_reduce",
         TORCH_BOX((&reduce<on_cuda_with_workspace<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_act_dx",
         TORCH_BOX((&dx<on_cuda_with_workspace<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_join_stats",
         TORCH_BOX((&join_stats<on_cuda<launch_batch_norm_join, JoinParams>>)));
  m.impl("batch_norm_update_running",
         TORCH_BOX((&update_running<on_cuda<launch_batch_norm_running, RunningParams>>)));
}
#endif

}  // namespace fastcnn
