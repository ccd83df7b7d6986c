// batch_norm_act: y = act((x - mean) * rstd * weight + bias + residual), per channel.
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// One of the tensors of which x is the concatenation: channels [first, first + c) of it.
struct BatchNormPiece {
  int64_t first, c;
  const void* x;  // [n, c, h, w] dtype, in y's layout
  void* dx;       // likewise; of the backward alone
};

// acc is the accumulate type: float, and double where dtype is kFloat64.
struct BatchNormActFwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  double eps;
  const void* x;                 // [n, c, h, w] dtype
  const void* residual;          // [n, c, h, w] dtype, in x's layout; null: none
  const void* weight;            // [c] acc; null: 1
  const void* bias;              // [c] acc; null: 0
  void* mean;                    // [c] acc: written by fwd, read by apply
  void* var;                     // [c] acc: biased variance; likewise
  void* y;                       // [n, c, h, w] dtype, in x's layout; null: the statistics alone
  const BatchNormPiece* pieces;  // CPU: where x lies, none of them empty; null: it is whole
  int64_t piece_count;
};

struct BatchNormActBwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  double eps;
  bool training;   // mean and var came from x itself, so dx has their gradients too
  const void* dy;  // [n, c, h, w] dtype, in x's layout
  const void* x;   // [n, c, h, w] dtype
  // [n, c, h, w] dtype, where a residual was added before an activation: y if
  // derivative_needs_only_y(act), else the residual. null: z is recomputed from x alone.
  const void* saved;
  const void* mean;    // [c] acc
  const void* var;     // [c] acc
  const void* weight;  // [c] acc; null: 1
  const void* bias;    // [c] acc; null: 0
  const void* total;   // [1] acc: values a channel on all ranks, whose sums dweight and dbias then
                       // hold for dx to read; null: x is all there is
  void* dx;            // [n, c, h, w] dtype; null: the sums alone
  void* dresidual;     // [n, c, h, w] dtype; null: not wanted
  void* dweight;       // [c] acc: sum(dz * (x - mean)) * rstd
  void* dbias;         // [c] acc: sum(dz)
  const BatchNormPiece* pieces;  // CPU: where x and dx lie, none empty; null: they are whole
  int64_t piece_count;
};

// The statistics of several ranks' parts of a batch, merged in the order of the ranks.
struct BatchNormMergeParams {
  int64_t c, ranks;
  DType dtype;           // acc of them all
  const void* gathered;  // [ranks, 2 * c + 1]: mean, biased variance, count
  void* mean;            // [c]
  void* var;             // [c], biased
  void* total;           // [1]: the count of all
};

// running = (1 - momentum) * running + momentum * new, the variance made unbiased.
struct BatchNormRunningParams {
  int64_t c;
  DType dtype;        // of running_mean and running_var
  DType stats_dtype;  // of mean and var: kFloat32 or kFloat64
  double momentum;
  double unbias;       // count / (count - 1)
  const void* total;   // [1] stats_dtype: the count on all ranks; null: unbias says it
  const void* mean;    // [c]
  const void* var;     // [c], biased
  void* running_mean;  // [c]
  void* running_var;   // [c]
};

FASTCNN_CPU_KERNEL(batch_norm_act_fwd_cpu, BatchNormActFwdParams)
FASTCNN_CPU_KERNEL(batch_norm_act_apply_cpu, BatchNormActFwdParams)
FASTCNN_CPU_KERNEL(batch_norm_act_bwd_cpu, BatchNormActBwdParams)
FASTCNN_CPU_KERNEL(batch_norm_merge_cpu, BatchNormMergeParams)
FASTCNN_CPU_KERNEL(batch_norm_running_cpu, BatchNormRunningParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: batch_norm_act_workspace(...) floats, uninitialised.
int64_t batch_norm_act_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device);
int launch_batch_norm_act_fwd(const BatchNormActFwdParams& p, float* workspace,
                              const CudaDevice& device);
int launch_batch_norm_act_apply(const BatchNormActFwdParams& p, const CudaDevice& device);
int launch_batch_norm_act_bwd(const BatchNormActBwdParams& p, float* workspace,
                              const CudaDevice& device);
int launch_batch_norm_merge(const BatchNormMergeParams& p, const CudaDevice& device);
int launch_batch_norm_running(const BatchNormRunningParams& p, const CudaDevice& device);

}  // namespace fastcnn
