#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fastcnn {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_for_raw(int64_t tasks, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                      const void* context) {
  torch::stable::parallel_for(0, tasks, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace fastcnn
