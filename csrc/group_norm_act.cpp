// group_norm_act and pixel_norm_act between torch and the kernels: what
// fastcnn/ops/group_norm_act.py declares, here checked, allocated and launched.
#include "group_norm_act.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

int64_t check_groups(const char* op, const char* name, int64_t groups, const ImageShape& shape) {
  if (groups < 1 || shape.c % groups != 0) {
    fail(op, name, ": expected a divisor of ", shape.c, " channels, got ", groups);
  }
  return groups;
}

// -> y, mean, var. per_pixel: a statistic for each pixel, and no groups.
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> run_fwd(const char* op, const Tensor& x,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           bool per_pixel, int64_t groups, double eps,
                                           int64_t act) {
  const Check check(op, x);
  GroupNormActFwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  p.groups = per_pixel ? 1 : check_groups(op, "groups", groups, p.shape);
  p.eps = check.eps(eps);
  const int64_t statistics = per_pixel ? p.shape.hw : groups;
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = check.new_matrix(p.shape.n, statistics);
  Tensor var = check.new_matrix(p.shape.n, statistics);
  p.x = x.const_data_ptr();
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  if (p.shape.numel() == 0) {  // no values, no statistics: those of a standard normal
    torch::stable::zero_(mean);
    torch::stable::fill_(var, 1.0);
  } else {
    launch(op, p, x);
  }
  return {y, mean, var};
}

// -> dx, dweight, dbias
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> run_bwd(const char* op, const Tensor& dy, const Tensor& x,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& mean, const Tensor& var, bool per_pixel,
                                           double eps, int64_t act) {
  const Check check(op, x);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = check.new_channels(), dbias = check.new_channels();
  GroupNormActBwdParams p{};
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  if (!per_pixel && mean.dim() != 2) {
    fail(op, "mean: expected a matrix [", p.shape.n, ", groups], got sizes ", sizes_of(mean));
  }
  p.groups = per_pixel ? 1 : check_groups(op, "mean: size 1", mean.size(1), p.shape);
  p.eps = check.eps(eps);
  const int64_t statistics = per_pixel ? p.shape.hw : p.groups;
  p.dy = check.image("dy", dy);
  p.x = x.const_data_ptr();
  p.mean = check.matrix("mean", mean, p.shape.n, statistics);
  p.var = check.matrix("var", var, p.shape.n, statistics);
  p.weight = check.channels("weight", weight);
  p.bias = check.channels("bias", bias);
  p.dx = dx.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  if (p.shape.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    launch(op, p, x);
  }
  return {dx, dweight, dbias};
}

template <auto launch>
std::tuple<Tensor, Tensor, Tensor> group_fwd(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& bias, int64_t groups, double eps,
                                             int64_t act) {
  return run_fwd<launch>("group_norm_act_fwd", x, weight, bias, false, groups, eps, act);
}

template <auto launch>
std::tuple<Tensor, Tensor, Tensor> group_bwd(const Tensor& dy, const Tensor& x,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& mean,
                                             const Tensor& var, double eps, int64_t act) {
  return run_bwd<launch>("group_norm_act_bwd", dy, x, weight, bias, mean, var, false, eps, act);
}

template <auto launch>
std::tuple<Tensor, Tensor, Tensor> pixel_fwd(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps, int64_t act) {
  return run_fwd<launch>("pixel_norm_act_fwd", x, weight, bias, true, 1, eps, act);
}

template <auto launch>
std::tuple<Tensor, Tensor, Tensor> pixel_bwd(const Tensor& dy, const Tensor& x,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor& mean,
                                             const Tensor& var, double eps, int64_t act) {
  return run_bwd<launch>("pixel_norm_act_bwd", dy, x, weight, bias, mean, var, true, eps, act);
}

}  // namespace

using FwdParams = GroupNormActFwdParams;
using BwdParams = GroupNormActBwdParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("group_norm_act_fwd", TORCH_BOX((&group_fwd<on_cpu<group_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("group_norm_act_bwd", TORCH_BOX((&group_bwd<on_cpu<group_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("pixel_norm_act_fwd", TORCH_BOX((&pixel_fwd<on_cpu<pixel_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("pixel_norm_act_bwd", TORCH_BOX((&pixel_bwd<on_cpu<pixel_norm_act_bwd_cpu, BwdParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("group_norm_act_fwd",
         TORCH_BOX((&group_fwd<on_cuda_with_workspace<launch_group_norm_act_fwd,
                                                      group_norm_act_workspace, FwdParams>>)));
  m.impl("group_norm_act_bwd",
         TORCH_BOX((&group_bwd<on_cuda_with_workspace<launch_group_norm_act_bwd,
                                                      group_norm_act_workspace, BwdParams>>)));
  m.impl("pixel_norm_act_fwd",
         TORCH_BOX((&pixel_fwd<on_cuda_with_workspace<launch_pixel_norm_act_fwd,
                                                      pixel_norm_act_workspace, FwdParams>>)));
  m.impl("pixel_norm_act_bwd",
         TORCH_BOX((&pixel_bwd<on_cuda_with_workspace<launch_pixel_norm_act_bwd,
                                                      pixel_norm_act_workspace, BwdParams>>)));
}
#endif

}  // namespace fastcnn
