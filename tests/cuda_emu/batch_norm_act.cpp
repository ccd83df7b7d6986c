// Runs the launchers of csrc/cuda/batch_norm_act/launchers.cu on cases from
// tests/ops/batch_norm_act/test_cuda.py.
#include "batch_norm_act.h"

#include "cuda/batch_norm_act/plan.h"
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "norm_params.h"

namespace fastcnn {
namespace {

BatchNormActFwdParams fwd_params(Case& c) {
  auto p = norm_params<BatchNormActFwdParams>(c);
  p.residual = c.tensor("residual");
  p.y = c.tensor("y");
  return p;
}

BatchNormActBwdParams bwd_params(Case& c) {
  auto p = norm_params<BatchNormActBwdParams>(c);
  p.training = c.integer("training") != 0;
  p.dy = c.tensor("dy");
  p.total = c.tensor("total");
  p.saved = c.tensor("saved");
  p.dx = c.tensor("dx");
  p.dresidual = c.tensor("dresidual");
  p.dweight = c.tensor("dweight");
  p.dbias = c.tensor("dbias");
  return p;
}

BatchNormRunningParams running_params(Case& c) {
  BatchNormRunningParams p{};
  p.c = c.integer("c");
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.stats_dtype = static_cast<DType>(c.integer("stats_dtype"));
  p.momentum = c.number("momentum");
  p.unbias = c.number("unbias");
  p.mean = c.tensor("mean");
  p.var = c.tensor("var");
  p.total = c.tensor("total");
  p.running_mean = c.tensor("running_mean");
  p.running_var = c.tensor("running_var");
  return p;
}

BatchNormMergeParams merge_params(Case& c) {
  BatchNormMergeParams p{};
  p.c = c.integer("c");
  p.ranks = c.integer("ranks");
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.gathered = c.tensor("gathered");
  p.mean = c.tensor("mean");
  p.var = c.tensor("var");
  p.total = c.tensor("total");
  return p;
}

// The first offsets of each thread's walk through a tensor that no test has memory for.
constexpr int kSteps = 4;

template <int kVector, bool kChannelsLast, bool kBackward>
__global__ void walk_kernel(ImageShape shape, ColumnPlan plan, int64_t* offsets) {
  Walk<kVector, kChannelsLast, kBackward> walk(shape, plan);
  for (int i = 0; i < kSteps; ++i) {
    offsets[(blockIdx.y * kThreads + threadIdx.x) * kSteps + i] = walk.next();
  }
}

void run_walk(Case& c, const CudaDevice& device) {
  const ImageShape shape{c.integer("n"), c.integer("c"), c.integer("hw"),
                         c.integer("channels_last") != 0};
  ColumnPlan plan{};
  plan.vector = 8;
  plan.columns = static_cast<int>(c.integer("columns"));
  plan.lanes = kThreads / plan.columns;
  plan.splits = static_cast<int>(c.integer("splits"));
  plan.length = shape.per_channel() / (shape.channels_last ? 1 : plan.vector);
  auto* offsets = static_cast<int64_t*>(c.tensor("offsets"));
  const bool backward = c.integer("backward") != 0;
  const auto kernel = shape.channels_last
                          ? (backward ? walk_kernel<8, true, true> : walk_kernel<8, true, false>)
                          : (backward ? walk_kernel<8, false, true> : walk_kernel<8, false, false>);
  c.run([&] {
    return launch(device, dim3(1, plan.splits), kThreads, 0, kernel, shape, plan, offsets);
  });
}

// What cuda/batch_norm_act/plan.h chooses: one_pass, tiles, splits, vector, columns, repeat.
void run_plan(Case& c, const CudaDevice& device) {
  const ImageShape shape{c.integer("n"), c.integer("c"), c.integer("hw"),
                         c.integer("channels_last") != 0};
  const OnePassNeeds needs{static_cast<int>(c.integer("tensors")), 8};
  const BatchNormPlan plan =
      plan_batch_norm(shape, static_cast<int>(c.integer("bytes")), true, needs, device);
  const ColumnPlan& columns = plan.columns;
  const int64_t numbers[] = {plan.one_pass,  columns.tiles,   columns.splits,
                             columns.vector, columns.columns, columns.repeat};
  auto* chosen = static_cast<int64_t*>(c.tensor("chosen"));
  c.run([&] {
    std::copy(std::begin(numbers), std::end(numbers), chosen);
    return cudaSuccess;
  });
}

void run_op(Case& c) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr,
                          static_cast<int>(c.integer("shared_bytes"))};
  if (c.op() == "fwd") {
    run_with_workspace(c, fwd_params(c), device, batch_norm_act_workspace,
                       launch_batch_norm_act_fwd);
  } else if (c.op() == "apply") {
    const BatchNormActFwdParams p = fwd_params(c);
    c.run([&] { return launch_batch_norm_act_apply(p, device); });
  } else if (c.op() == "bwd") {
    run_with_workspace(c, bwd_params(c), device, batch_norm_act_workspace,
                       launch_batch_norm_act_bwd);
  } else if (c.op() == "plan") {
    run_plan(c, device);
  } else if (c.op() == "walk") {
    run_walk(c, device);
  } else if (c.op() == "merge") {
    const BatchNormMergeParams p = merge_params(c);
    c.run([&] { return launch_batch_norm_merge(p, device); });
  } else if (c.op() == "running") {
    const BatchNormRunningParams p = running_params(c);
    c.run([&] { return launch_batch_norm_running(p, device); });
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
