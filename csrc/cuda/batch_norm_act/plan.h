// How a call of batch_norm_act is cut over the GPU: forward and backward ask here.
#pragma once

#include "common/cuda_device.h"
#include "cuda/columns.cuh"

namespace fastcnn {

struct BatchNormPlan {
  ColumnPlan columns;
  ImageShape walked;  // the shape, or of a flat walk [n, c * hw, 1]
  bool one_pass;      // one launch over shared memory, else several over the whole GPU
};

// What a one-pass kernel keeps on chip.
struct OnePassNeeds {
  int tensors;      // as they lie in memory
  int value_bytes;  // of what it merges for each slot of a thread
};

// A thread's words of a tile. It waits for memory once for kUnroll of them, 8 times in all: above
// that the latencies outweigh the launches that several passes cost, unless more SMs take part.
constexpr int64_t kOnePassSteps = 8 * kUnroll;

// Rows of a flat walk. Each column has a partial value of 12 bytes beside 2 to 4 bytes a row.
constexpr int64_t kFlatRows = 16;

inline BatchNormPlan plan_multi_pass(const ImageShape& shape, int element_bytes, bool aligned,
                                     const CudaDevice& device, int blocks_per_sm = kBlocksPerSm) {
  const int wide = 16 / element_bytes;
  BatchNormPlan plan{{}, shape, false};
  const bool flat = aligned && !shape.channels_last && shape.hw % wide != 0 &&
                    shape.c * shape.hw % wide == 0 && shape.n >= kFlatRows;
  if (flat) plan.walked = {shape.n, shape.c * shape.hw, 1, true};
  plan.columns = plan_columns(plan.walked, element_bytes, aligned, device.sm_count, blocks_per_sm);
  if (flat) plan.columns.repeat = shape.hw;
  return plan;
}

// Blocks of whole channels, whose rows of neighbouring elements are `row_bytes` long or a little
// more: channels_last as many vectors of channels, NCHW one plane, or flat as many planes as make
// up whole vectors.
inline BatchNormPlan plan_one_pass(const ImageShape& shape, int element_bytes, bool aligned,
                                   int row_bytes) {
  const int wide = 16 / element_bytes;
  BatchNormPlan plan{{}, shape, true};
  ColumnPlan& columns = plan.columns;
  columns.splits = 1;
  columns.repeat = 1;
  columns.columns = 1;
  if (shape.channels_last) {
    columns.vector = aligned && shape.c % wide == 0 ? wide : 1;
    const int64_t vectors = shape.c / columns.vector;
    // All that there are, or whole rows: even shares would cut memory's 32 bytes.
    const int64_t most = row_bytes / (columns.vector * element_bytes);
    columns.columns = static_cast<int>(vectors < most ? vectors : most);
    columns.tiles = (vectors + columns.columns - 1) / columns.columns;
    columns.length = shape.per_channel();
  } else {
    int64_t together = 1;  // planes of whole vectors
    while (together * shape.hw % wide != 0) together *= 2;
    const int64_t vectors = together * shape.hw / wide;
    const bool flat = aligned && together > 1 && shape.c % together == 0 && vectors <= kThreads;
    columns.vector = flat || (aligned && together == 1) ? wide : 1;
    columns.tiles = flat ? shape.c / together : shape.c;
    columns.length = flat ? shape.n : shape.per_channel() / columns.vector;
    if (flat) {
      columns.columns = static_cast<int>(vectors);
      columns.repeat = shape.hw;
      plan.walked = {shape.n, shape.c * shape.hw, 1, true};
    }
  }
  columns.lanes = kThreads / columns.columns;
  return plan;
}

// The choice. The one-pass kernel reads memory once less (twice in backward) and saves two
// launches; it has only as many blocks as there are channels to share out.
inline BatchNormPlan plan_batch_norm(const ImageShape& shape, int element_bytes, bool aligned,
                                     const OnePassNeeds& needs, const CudaDevice& device) {
  enum class Then { kNext, kOnePass };
  // Rows of 64 bytes are what memory gives at a time, 32 the least that it moves.
  for (const int row_bytes : {64, 32}) {
    const BatchNormPlan plan = plan_one_pass(shape, element_bytes, aligned, row_bytes);
    const ColumnPlan& columns = plan.columns;
    const int64_t steps = (columns.length + columns.lanes - 1) / columns.lanes;
    const int64_t slots = plan.walked.channels_last ? columns.vector : 1;
    const int64_t bytes = kThreads * (steps * needs.tensors * columns.vector * element_bytes +
                                      slots * needs.value_bytes);
    const int64_t shared = device.shared_bytes;
    const bool idle = columns.tiles < device.sm_count;  // there are SMs without a block
    const struct {
      bool holds;
      Then then;
    } table[] = {
        // Narrower rows are shared out to more SMs.
        {row_bytes == 64 && shape.channels_last && idle, Then::kNext},
        // A long walk of one block: the whole GPU is faster.
        {steps > kOnePassSteps || bytes > shared, Then::kNext},
        // Two blocks are resident, and one loads while the other calculates. (1 KiB of an SM's
        // shared memory belongs to the driver, for each block.)
        {bytes <= (shared + 1024) / kBlocksPerSm - 1024, Then::kOnePass},
        // No SM gets a second block anyway.
        {columns.tiles <= device.sm_count, Then::kOnePass},
    };
    for (const auto& row : table) {
      if (!row.holds) continue;
      if (row.then == Then::kOnePass) return plan;
      break;
    }
  }
  return plan_multi_pass(shape, element_bytes, aligned, device);
}

}  // namespace fastcnn
