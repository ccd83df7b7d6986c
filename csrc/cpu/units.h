// Units of work that go through two passes, as samples and their groups do, and how they are cut.
#pragma once

#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// channels_last, sample by sample: the rows of each; `rest` elements, fewer than a row, follow the
// last one as a part of its own.
template <class T>
struct SampleRows : WideRows {
  int64_t n, size, parts;

  explicit SampleRows(const ImageShape& shape)
      : WideRows({1, shape.c, shape.hw, true}, sizeof(T), kLanes<Acc<T>>,
                 ceil_div(kTasks / 4, shape.n)),
        n(shape.n),
        size(shape.c * shape.hw),
        parts(max(1, tasks)) {}

  // body(slot, first element, rows, length) for what belongs to a part.
  template <class Body>
  void for_each_span(int64_t part, Body body) const {
    if (first(part) < rows) body(part, first(part) * wide, last(part) - first(part), wide);
    if (part == parts - 1 && rest > 0) body(parts, rows * wide, int64_t{1}, rest);
  }
  int64_t slots() const { return parts + 1; }

  // body(slot, first column, elements a column) for each slot and pixel of a wide row.
  template <class Body>
  void for_each_pixel(Body body) const {
    for (int64_t slot = 0; slot < slots(); ++slot) {
      const bool is_rest = slot == parts;
      const int64_t count = is_rest ? 1 : max(0, last(slot) - first(slot));
      if (count == 0) continue;
      for (int64_t i = 0; i < (is_rest ? rest : wide); i += c) body(slot, slot * wide + i, count);
    }
  }
};

// Runs prepare(space, unit), first(space, unit, part) for each part, merge(space, unit) and
// second(space, unit, part) for each part. `space` numbers, zeroed, belong to a unit meanwhile.
//
// Where units come out even over the threads, one takes a unit through all of it, the second pass
// from its end: what the first one has read is then in the cache, as far as it has room. Otherwise
// threads share units part by part, and each pass goes over all of memory. Sums are the same.
template <class S, class Prepare, class First, class Merge, class Second>
void run_units(int64_t units, int64_t parts, int64_t space, int64_t elements, Prepare prepare,
               First first, Merge merge, Second second) {
  const int64_t threads = thread_count();
  if (parts == 1 || units % threads == 0 || units >= 4 * threads) {
    const int64_t per_task = ceil_div(units, 2 * kTasks), tasks = ceil_div(units, per_task);
    const auto all = [&](int64_t task) {
      const Scratch<S> own(space);
      const int64_t last = min(units, (task + 1) * per_task);
      for (int64_t unit = task * per_task; unit < last; ++unit) {
        std::memset(static_cast<void*>(own.get()), 0, static_cast<size_t>(space) * sizeof(S));
        prepare(own.get(), unit);
        for (int64_t part = 0; part < parts; ++part) first(own.get(), unit, part);
        merge(own.get(), unit);
        for (int64_t part = parts - 1; part >= 0; --part) second(own.get(), unit, part);
      }
    };
    return parallel_for(tasks, task_grain(tasks, elements), all);
  }
  const Scratch<S> spaces(units * space);
  const auto of_unit = [&](auto body) {
    const auto run = [&](int64_t unit) { body(spaces.get() + unit * space, unit); };
    parallel_for(units, 1, run);
  };
  const auto of_part = [&](auto body) {
    const auto run = [&](int64_t task) {
      body(spaces.get() + task / parts * space, task / parts, task % parts);
    };
    parallel_for(units * parts, task_grain(units * parts, elements), run);
  };
  of_unit(prepare);
  of_part(first);
  of_unit(merge);
  of_part(second);
}

const auto kNothing = [](auto*, int64_t) {};

}  // namespace
}  // namespace fastcnn::FASTCNN_CPU_LEVEL
