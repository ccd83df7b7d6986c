// Batch statistics over several processes, between torch and the kernels: what
// fastcnn/ops/batch_norm_act/sync.py declares, here checked, allocated and launched.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm_act.h"
#include "bindings/batch_norm_glue.h"

namespace fastcnn {
namespace {

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
std::tuple<Tensor, Tensor, Tensor> merge_stats(const Tensor& gathered) {
  constexpr const char* kOp = "batch_norm_join_stats";
  check_storage(kOp, "gathered", gathered);
  BatchNormMergeParams p{};
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

}  // namespace

using FwdParams = BatchNormActFwdParams;
using BwdParams = BatchNormActBwdParams;
using MergeParams = BatchNormMergeParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("batch_norm_act_stats", TORCH_BOX((&stats<on_cpu<batch_norm_act_fwd_cpu, FwdParams>>)));
  m.impl("batch_norm_act_reduce", TORCH_BOX((&reduce<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_act_dx", TORCH_BOX((&dx<on_cpu<batch_norm_act_bwd_cpu, BwdParams>>)));
  m.impl("batch_norm_join_stats",
         TORCH_BOX((&merge_stats<on_cpu<batch_norm_merge_cpu, MergeParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("batch_norm_act_stats",
         TORCH_BOX((&stats<on_cuda_summing<launch_batch_norm_act_fwd, FwdParams>>)));
  m.impl("batch_norm_act_reduce",
         TORCH_BOX((&reduce<on_cuda_summing<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_act_dx",
         TORCH_BOX((&dx<on_cuda_summing<launch_batch_norm_act_bwd, BwdParams>>)));
  m.impl("batch_norm_join_stats",
         TORCH_BOX((&merge_stats<on_cuda<launch_batch_norm_merge, MergeParams>>)));
}
#endif

}  // namespace fastcnn
