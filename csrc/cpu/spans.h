// How CPU kernels walk a dense image batch channel by channel, in either layout.
//
// NCHW: a span is one plane; its channel's numbers are the same for every element.
// channels_last: a span is a "wide row" of k pixels, wide = k * c elements, with k the smallest
//   number that makes wide a whole number of vectors and long enough to be worth a loop. The
//   channels' numbers are repeated k times in an array in step with it. So C = 3 runs at full
//   vector width and no inner loop has a tail.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/types.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

constexpr int64_t kTasks = 64;  // a fixed cut, see parallel_for: 64 serves 1 to 64 threads
constexpr int64_t kChunkBytes =
    1 << 15;  // read twice in a row: from memory, then from the L1 cache

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Fill { kZero, kNothing };

// Scratch memory of one kernel call, aligned to cache lines: a vector that straddled two of
// them would cost twice as much.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count, Fill fill = Fill::kZero) {
    const size_t bytes = static_cast<size_t>(ceil_div(max(count, 1) * sizeof(S), 64) * 64);
    data_ = static_cast<S*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (fill == Fill::kZero) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  S* get() const { return data_; }
  S& operator[](int64_t i) const { return data_[i]; }

 private:
  S* data_;
};

// body(i, count) for each vector of a span: count is the full width, known to the compiler, except
// for a last shorter one.
template <class S, class Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + kLanes<S> <= length; i += kLanes<S>) body(i, static_cast<int64_t>(kLanes<S>));
  if (i < length) body(i, length - i);
}

template <int kCount>
struct RowCount {
  static constexpr int value = kCount;
};

// body(RowCount<k>{}, row, i, count) for k rows of a span at a time, at the same place i: four
// rows share what is loaded for their channels, which is more than their own data. The body is
// inlined three times, whatever of it is: a block's shorter last vector is taken row by row. And
// only twice for doubles, which are there for gradient checks: one row at a time.
template <class S, class Body>
inline __attribute__((always_inline)) void for_each_block(int64_t rows, int64_t length, Body body) {
  constexpr int kRows = sizeof(S) == sizeof(double) ? 1 : 4;
  for (int64_t row = 0, block; row < rows; row += block) {
    block = kRows <= rows - row ? kRows : 1;
    int64_t i = 0;
    if (kRows > 1 && block == kRows) {
      for (; i + kLanes<S> <= length; i += kLanes<S>) {
        body(RowCount<kRows>{}, row, i, static_cast<int64_t>(kLanes<S>));
      }
    }
    for (; i + kLanes<S> <= length; i += kLanes<S>) {
      body(RowCount<1>{}, row, i, static_cast<int64_t>(kLanes<S>));
    }
    for (int64_t u = 0; u < block && i < length; ++u) {
      body(RowCount<1>{}, row + u, i, length - i);
    }
  }
}

// body(first, RowCount<k>{}) for the k rows of a block at a time that an activation takes.
template <class A, class Block, class Body>
inline __attribute__((always_inline)) void for_each_call(Block block, Body body) {
  constexpr int kRows = A::kVectors < block.value ? A::kVectors : block.value;
#pragma GCC unroll 4
  for (int first = 0; first < block.value; first += kRows) body(first, RowCount<kRows>{});
}

// Prefetches the line at p's place in the row that is read when the four in hand are done. Each row
// of channels_last is a stream in pages of its own, which the processor's prefetchers find only
// after its first lines: on a 2-core AMD EPYC batch norm's backward went from 0.98 to 0.64 of
// PyTorch's time (16x256x56x56 float32). Planes are long enough for them.
template <bool kRows, class T>
inline __attribute__((always_inline)) void prefetch_row(const T* p, int64_t stride) {
  if constexpr (kRows) prefetch(p + 4 * stride);
}

// A number per channel as a span sees it: an array in step with the span, or one for all of it.
template <class S, bool kArray>
struct PerChannel {
  const S* values;

  Vec<S> at(int64_t i) const {
    if constexpr (kArray) {
      return load(values + i);
    } else {
      return splat(*values);
    }
  }
};

// Tasks handed to a thread at a time: at least 16K elements, so that the work outweighs waking it.
inline int64_t task_grain(int64_t tasks, int64_t elements) {
  return max(1, (1 << 14) * tasks / max(elements, 1));
}

// Channels side by side whose partial results one task adds up.
constexpr int64_t kMergeChannels = 64;

// body(j, count) for vectors of count channels from j on, in parallel; `elements` is the work.
template <class S, class Body>
void for_each_channels(int64_t c, int64_t elements, const Body& body) {
  const int64_t blocks = ceil_div(c, kMergeChannels);
  const auto merge = [&](int64_t block) {
    const int64_t first = block * kMergeChannels, last = min(c, first + kMergeChannels);
    for (int64_t j = first; j < last; j += kLanes<S>) body(j, min(kLanes<S>, last - j));
  };
  parallel_for(blocks, task_grain(blocks, elements), merge);
}

// channels_last: rows of `wide` elements, cut into tasks of whole chunks; `rest` elements (fewer
// than wide, whole pixels) follow the last row.
struct WideRows {
  int64_t c, pixels, repeat, wide, rows, rest, chunk, rows_per_task, tasks, grain;

  // repeats: whether a row may be several pixels; else it is one, and may end within a vector.
  WideRows(const ImageShape& shape, int64_t element_bytes, int64_t lanes,
           int64_t most_tasks = kTasks, bool repeats = true)
      : c(shape.c), pixels(shape.per_channel()) {
    int64_t step = lanes;  // pixels until the vectors come out even: lanes / gcd(lanes, c)
    while (step > 1 && (c * (step / 2)) % lanes == 0) step /= 2;
    repeat = step * max(1, ceil_div(8 * lanes, c * step));
    if (repeat > pixels) repeat = max(step, pixels / step * step);
    if (!repeats) repeat = 1;
    wide = c * repeat;
    rows = pixels / repeat;
    rest = pixels % repeat * c;
    chunk = max(kChunkBytes / (wide * element_bytes), 32);
    rows_per_task = ceil_div(ceil_div(max(rows, 1), most_tasks), chunk) * chunk;
    tasks = ceil_div(rows, rows_per_task);
    grain = task_grain(tasks, rows * wide);
  }
  int64_t first(int64_t task) const { return task * rows_per_task; }
  int64_t last(int64_t task) const { return min(rows, first(task) + rows_per_task); }
};

// NCHW: a task is one channel of a part of the batch; one part when there are channels enough.
struct Planes {
  int64_t n, c, hw, parts, images_per_part, tasks, grain;
  int64_t piece, group;  // elements of a plane, and planes, that make up a chunk

  Planes(const ImageShape& shape, int64_t element_bytes) : n(shape.n), c(shape.c), hw(shape.hw) {
    images_per_part = ceil_div(n, min(n, ceil_div(kTasks / 4, c)));
    parts = ceil_div(n, images_per_part);
    tasks = c * parts;
    grain = task_grain(tasks, shape.numel());
    const int64_t elements = kChunkBytes / element_bytes;
    piece = min(hw, elements);
    group = max(1, elements / hw);
  }
  int64_t channel(int64_t task) const { return task / parts; }
  int64_t first(int64_t task) const { return task % parts * images_per_part; }
  int64_t last(int64_t task) const { return min(n, first(task) + images_per_part); }
  int64_t stride() const { return c * hw; }  // from image to image
  int64_t offset(int64_t image, int64_t channel) const { return (image * c + channel) * hw; }
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
