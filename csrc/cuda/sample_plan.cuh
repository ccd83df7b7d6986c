// How kernels that walk the channels of each sample cut a call over the GPU: the multi-pass ones of
// group_norm_act, and squeeze_excite.
#pragma once

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fastcnn {
namespace {

// The tiles of all samples side by side in the grid.
struct SamplePlan {
  ColumnPlan columns;
  ImageShape sample;  // n = 1
  int64_t samples, groups, per_group;

  __device__ int64_t index() const { return blockIdx.x / columns.tiles; }
  __device__ unsigned tile() const { return static_cast<unsigned>(blockIdx.x % columns.tiles); }
  FASTCNN_HOST_DEVICE int64_t statistics() const { return samples * groups; }
  __device__ int64_t offset() const { return index() * sample.numel(); }
  // Of the partial values [samples, splits, c].
  __device__ int64_t partial(int64_t channel) const {
    return (index() * columns.splits + blockIdx.y) * sample.c + channel;
  }
  __device__ bool first_lane() const { return threadIdx.x / columns.columns == 0; }
};

SamplePlan plan_samples(const ImageShape& shape, int64_t groups, int element_bytes, bool aligned,
                        const CudaDevice& device) {
  SamplePlan plan{};
  plan.sample = {1, shape.c, shape.hw, shape.channels_last};
  plan.samples = shape.n;
  plan.groups = groups;
  plan.per_group = shape.c / groups;
  // Each sample fills its share of the GPU.
  const int64_t share = (device.sm_count + shape.n - 1) / shape.n;
  plan.columns = plan_columns(plan.sample, element_bytes, aligned, static_cast<int>(share));
  // Small images: no more threads than there are loads in flight for, down to a warp.
  ColumnPlan& columns = plan.columns;
  while (columns.lanes > 1 && columns.lanes * columns.columns > 32 &&
         columns.lanes / 2 * kUnroll >= columns.length) {
    columns.lanes /= 2;
  }
  return plan;
}

dim3 grid_of(const SamplePlan& plan) {
  return dim3(static_cast<unsigned>(plan.samples * plan.columns.tiles),
              static_cast<unsigned>(plan.columns.splits));
}

// The kernels' grids, and those that finalize groups and channels, of which a block has one at
// least.
bool can_launch(const SamplePlan& plan) {
  return fits_a_grid(plan.samples * plan.columns.tiles, plan.columns.splits) &&
         fits_a_grid(plan.statistics()) && fits_a_grid(plan.sample.c);
}

int threads_of(const SamplePlan& plan) { return plan.columns.columns * plan.columns.lanes; }

// A finalizing block has `lanes` threads for each of its columns, a group or a channel each: so
// many that none merges more than a few partial values in a row.
struct FinalizePlan {
  int lanes;

  explicit FinalizePlan(int64_t partials) : lanes(8) {
    while (lanes < kThreads && lanes * kUnroll < partials) lanes *= 2;
  }
  FASTCNN_HOST_DEVICE int columns() const { return kThreads / lanes; }
  __device__ int64_t column() const {
    return blockIdx.x * static_cast<int64_t>(columns()) + threadIdx.x % columns();
  }
  __device__ int lane() const { return threadIdx.x / columns(); }
  dim3 grid(int64_t count) const {
    return dim3(static_cast<unsigned>((count + columns() - 1) / columns()));
  }
};

// body(partial value, channel) for this thread's share of a group's channels and splits.
template <class Value, class Body>
__device__ void for_each_partial(const SamplePlan& plan, const FinalizePlan& finalize,
                                 const Value* partial, Body body) {
  const int64_t statistic = finalize.column();
  if (statistic >= plan.statistics()) return;
  const int64_t sample = statistic / plan.groups, first = statistic % plan.groups * plan.per_group;
  const int64_t count = plan.columns.splits * plan.per_group;
  const Value* from = partial + sample * plan.columns.splits * plan.sample.c + first;
  for (int64_t i = finalize.lane(); i < count; i += finalize.lanes) {
    const int64_t split = i / plan.per_group, channel = i - split * plan.per_group;
    body(from[split * plan.sample.c + channel], first + channel);
  }
}

}  // namespace
}  // namespace fastcnn
