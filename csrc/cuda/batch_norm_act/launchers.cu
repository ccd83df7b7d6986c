// batch_norm_act on CUDA: the launchers. Small layers take one launch over shared memory
// (cuda/batch_norm_act/one_pass.cuh), the others several over the whole GPU
// (cuda/batch_norm_act/multi_pass.cuh); cuda/batch_norm_act/plan.h chooses.
#include "batch_norm_act.h"
#include "cuda/batch_norm_act/multi_pass.cuh"
#include "cuda/batch_norm_act/one_pass.cuh"
#include "cuda/batch_norm_act/plan.h"
#include "cuda/launch.cuh"

namespace fastcnn {
namespace {

constexpr OnePassNeeds kFwdNeeds{1, sizeof(Sums)}, kBwdNeeds{2, sizeof(Sums)};

dim3 grid_of(const ColumnPlan& plan) {
  return dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
}

dim3 finalize_grid(int64_t c) {
  return dim3(static_cast<unsigned>((c + kFinalizeColumns - 1) / kFinalizeColumns));
}

// body(T{}, constant vector width, constant layout) for a plan.
template <class Params, class Body>
int dispatch_plan(const Params& p, const BatchNormPlan& plan, Body body) {
  return dispatch(p.dtype, plan.columns.vector, plan.walked.channels_last, body);
}

bool aligned_fwd(const BatchNormActFwdParams& p) { return aligned({p.x, p.residual, p.y}); }

int launch_apply(const BatchNormActFwdParams& p, const BatchNormPlan& plan,
                 const CudaDevice& device) {
  return dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
    return launch(device, grid_of(plan.columns), kThreads, 0,
                  batch_norm_act_apply_kernel<decltype(t), decltype(vector)::value, cl.value>, p,
                  plan.columns);
  });
}

int launch_dx(const BatchNormActBwdParams& p, const BatchNormPlan& plan, const CudaDevice& device) {
  return dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
    return launch(device, grid_of(plan.columns), kThreads, 0,
                  batch_norm_act_dx_kernel<decltype(t), decltype(vector)::value, cl.value>, p,
                  plan.columns);
  });
}

}  // namespace

int64_t batch_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device) {
  // Which of the two plans it will be, the addresses decide.
  int64_t partials = 0;
  for (const bool aligned : {false, true}) {
    // The forward's, whose blocks are the most.
    const BatchNormPlan plan =
        plan_multi_pass(shape, element_bytes(dtype), aligned, device, kSmallBlocksPerSm);
    const int64_t of_plan = plan.columns.splits * plan.walked.c;
    if (of_plan > partials) partials = of_plan;
  }
  return partials * static_cast<int64_t>(sizeof(Moments) / sizeof(float));
}

int launch_batch_norm_act_apply(const BatchNormActFwdParams& given, const CudaDevice& device) {
  BatchNormActFwdParams p = given;
  const BatchNormPlan plan =
      plan_multi_pass(p.shape, element_bytes(p.dtype), aligned_fwd(p), device);
  p.shape = plan.walked;
  return launch_apply(p, plan, device);
}

int launch_batch_norm_act_fwd(const BatchNormActFwdParams& given, float* workspace,
                              const CudaDevice& device) {
  BatchNormActFwdParams p = given;
  const BatchNormPlan plan =
      plan_batch_norm(p.shape, element_bytes(p.dtype), aligned_fwd(p), kFwdNeeds, device);
  const ColumnPlan& columns = plan.columns;
  const int64_t c = p.shape.c;
  p.shape = plan.walked;
  if (plan.one_pass) {
    return dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
      using T = decltype(t);
      constexpr int kVector = decltype(vector)::value;
      return launch(device, grid_of(columns), kThreads,
                    one_pass_bytes<T, kVector, cl.value, Sums>(columns, kFwdNeeds.tensors),
                    batch_norm_act_one_pass_fwd_kernel<T, kVector, cl.value>, p, columns);
    });
  }
  Moments* partial = reinterpret_cast<Moments*>(workspace);
  const ColumnPlan stats = plan_multi_pass(given.shape, element_bytes(p.dtype), aligned_fwd(p),
                                           device, kSmallBlocksPerSm)
                               .columns;
  int error = dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    return launch(device, grid_of(stats), kThreads,
                  kThreads * kSlots<kVector, cl.value> * sizeof(Moments),
                  batch_norm_act_stats_kernel<decltype(t), kVector, cl.value>, p, stats, partial);
  });
  if (error != cudaSuccess) return error;
  error = launch(device, finalize_grid(c), kThreads, kThreads * sizeof(Moments),
                 batch_norm_act_finalize_stats_kernel, p, stats, partial);
  return error != cudaSuccess || p.y == nullptr ? error : launch_apply(p, plan, device);
}

int launch_batch_norm_act_bwd(const BatchNormActBwdParams& given, float* workspace,
                              const CudaDevice& device) {
  BatchNormActBwdParams p = given;
  if (p.act == Act::kNone) p.saved = nullptr;
  const bool is_aligned = aligned({p.dy, p.x, p.saved, p.dx, p.dresidual});
  const int bytes = element_bytes(p.dtype);
  const bool sums_given = p.total != nullptr;
  const BatchNormPlan plan = sums_given
                                 ? plan_multi_pass(p.shape, bytes, is_aligned, device)
                                 : plan_batch_norm(p.shape, bytes, is_aligned, kBwdNeeds, device);
  const ColumnPlan& columns = plan.columns;
  const int64_t c = p.shape.c;
  p.shape = plan.walked;
  if (sums_given) return launch_dx(p, plan, device);
  if (plan.one_pass) {
    return dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
      using T = decltype(t);
      constexpr int kVector = decltype(vector)::value;
      return launch(device, grid_of(columns), kThreads,
                    one_pass_bytes<T, kVector, cl.value, Sums>(columns, kBwdNeeds.tensors),
                    batch_norm_act_one_pass_bwd_kernel<T, kVector, cl.value>, p, columns);
    });
  }
  Sums* partial = reinterpret_cast<Sums*>(workspace);
  int error = dispatch_plan(p, plan, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    return launch(
        device, grid_of(columns), kThreads, kThreads * kSlots<kVector, cl.value> * sizeof(Sums),
        batch_norm_act_reduce_kernel<decltype(t), kVector, cl.value>, p, columns, partial);
  });
  if (error != cudaSuccess) return error;
  error = launch(device, finalize_grid(c), kThreads, kThreads * sizeof(Sums),
                 batch_norm_act_finalize_reduce_kernel, p, columns, partial);
  if (error != cudaSuccess || p.dx == nullptr) return error;
  if (p.dresidual != nullptr) {  // dz lies there now
    p.dy = p.dresidual;
    p.saved = nullptr;
    p.act = Act::kNone;
  }
  return launch_dx(p, plan, device);
}

}  // namespace fastcnn
