// Threads for CPU kernels: PyTorch's own, reached without a torch header.
#pragma once

#include <cstdint>

namespace fastcnn {

// Defined in csrc/bindings/parallel.cpp on torch's stable ABI. Calls body(context, begin, end) on
// disjoint ranges that cover [0, tasks); ranges are at least `grain` long.
void parallel_for_raw(int64_t tasks, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                      const void* context);

// How many threads work on a call: what may decide on the order of work, and never on a result.
int64_t thread_count();

// Runs body(begin, end) for ranges of tasks, one a thread at a time: what a thread allocates for
// its tasks it allocates once. See parallel_for.
template <class Body>
inline void parallel_ranges(int64_t tasks, int64_t grain, const Body& body) {
  parallel_for_raw(
      tasks, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

// Runs body(task) for each task. How tasks are spread over threads never changes a result: kernels
// cut their work into tasks by shape alone, so sums have one order on any number of threads.
template <class Body>
inline void parallel_for(int64_t tasks, int64_t grain, const Body& body) {
  parallel_for_raw(
      tasks, grain,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) (*static_cast<const Body*>(context))(task);
      },
      &body);
}

// The same, each thread walking its tasks from the last to the first: a second pass over a tensor
// then begins with what the first one has left in the caches.
template <class Body>
inline void parallel_for_backwards(int64_t tasks, int64_t grain, const Body& body) {
  parallel_for_raw(
      tasks, grain,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t task = end - 1; task >= begin; --task) {
          (*static_cast<const Body*>(context))(task);
        }
      },
      &body);
}

}  // namespace fastcnn
