// squeeze_excite on the CPU: a number for each channel of each sample, and the scaling by one.
//
// Data movement, T = one pass over the tensor: mean 1T (reads x), scale 2T (reads x or dy, writes y
// or dx), bwd_gate 2T (reads dy and x). The scaling walks from the last sample to the first: what
// the reduction before it has read last is still in the caches.
//   channels_last  a task is a part of a sample, by wide rows (cpu/spans.h).
//   NCHW           a task is a plane.
// All sums have an order that depends on the shape alone: floats of at most kSumRows rows or
// kTerms elements, which are added up in double.
#include "squeeze_excite.h"

#include "cpu/dispatch.h"
#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

template <class T>
struct ReduceSpan {
  const T *x, *dy;

  ReduceSpan(const SqueezeExciteReduceParams& p, int64_t offset)
      : x(static_cast<const T*>(p.x) + offset), dy(at(static_cast<const T*>(p.dy), offset)) {}
  static const T* at(const T* p, int64_t offset) { return p == nullptr ? nullptr : p + offset; }

  template <bool kDy>
  inline __attribute__((always_inline)) Vec<Acc<T>> term(int64_t o, int64_t count) const {
    const Vec<Acc<T>> value = load(x + o, count);
    if constexpr (kDy) return value * load(dy + o, count);
    return value;
  }
};

// sums[i] += the terms of `rows` rows, for whole vectors: the lanes beyond a row's end add 0.
template <class T, bool kDy>
void sum_rows(ReduceSpan<T> s, int64_t rows, int64_t length, Acc<T>* sums) {
  using S = Acc<T>;
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec<S> sum = load(sums + i);
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const int64_t o = (row + u) * length + i;
          prefetch_row<true>(s.x + o, length);
          prefetch_row<kDy>(s.dy + o, length);
          sum += s.template term<kDy>(o, count);
        }
        store(sums + i, sum);
      });
}

template <class T, bool kDy>
void reduce_channels_last(const SqueezeExciteReduceParams& p) {
  using S = Acc<T>;
  const SampleRows<T> rows(p.shape);
  const double factor = kDy ? 1.0 : 1.0 / static_cast<double>(p.shape.hw);
  const int64_t per_sample = rows.parts * rows.wide;
  const Scratch<double> sums(rows.n * per_sample);
  const auto add = [&](int64_t sample, int64_t part) {
    const Scratch<S> block(rows.wide + kLanes<S>, Fill::kNothing);
    double* of_part = sums.get() + sample * per_sample + part * rows.wide;
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      for (int64_t row = 0; row < count; row += kSumRows) {
        for_each_vector<S>(rows.wide,
                           [&](int64_t i, int64_t) { store(block.get() + i, Vec<S>{}); });
        const ReduceSpan<T> span(p, sample * rows.size + o + row * length);
        sum_rows<T, kDy>(span, min(kSumRows, count - row), length, block.get());
        add_in_double(of_part, block.get(), rows.wide);
      }
    });
  };
  const auto merge = [&](int64_t sample) {
    double* total = sums.get() + sample * per_sample;
    for (int64_t column = rows.c; column < per_sample; column += rows.c) {
      for (int64_t j = 0; j < rows.c; ++j) total[j] += total[column + j];
    }
    S* out = static_cast<S*>(p.out) + sample * rows.c;
    for (int64_t j = 0; j < rows.c; ++j) out[j] = static_cast<S>(total[j] * factor);
  };
  const int64_t tasks = rows.n * rows.parts;
  parallel_for(tasks, task_grain(tasks, p.shape.numel()), [&](int64_t task) {
    add(task / rows.parts, task % rows.parts);
    if (rows.parts == 1) merge(task);
  });
  if (rows.parts > 1) parallel_for(rows.n, task_grain(rows.n, rows.n * per_sample), merge);
}

template <class T, bool kDy>
void reduce_planes(const SqueezeExciteReduceParams& p) {
  using S = Acc<T>;
  constexpr int64_t kTerms = 1 << 13, kStep = 4 * kLanes<S>;
  const int64_t hw = p.shape.hw, planes = p.shape.n * p.shape.c;
  const double factor = kDy ? 1.0 : 1.0 / static_cast<double>(hw);
  parallel_for(planes, task_grain(planes, p.shape.numel()), [&](int64_t plane) {
    double total = 0;
    for (int64_t begin = 0; begin < hw; begin += kTerms) {
      const ReduceSpan<T> span(p, plane * hw + begin);
      const int64_t length = min(kTerms, hw - begin), whole = length / kStep * kStep;
      Vec<S> sum[4] = {};  // one alone would wait for its own additions
      for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          sum[u] += span.template term<kDy>(i + u * kLanes<S>, kLanes<S>);
        }
      }
      for_each_vector<S>(
          length - whole, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            sum[0] += span.template term<kDy>(whole + i, count);
          });
      total += static_cast<double>(horizontal_sum<S>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    static_cast<S*>(p.out)[plane] = static_cast<S>(total * factor);
  });
}

// y = x * gate + dmean * inverse; without a dmean y = x * gate.
template <class T, bool kArray, bool kShift>
void scale_rows(const T* x, T* y, int64_t rows, int64_t length, const Acc<T>* gates,
                const Acc<T>* dmeans, Acc<T> inverse, bool past_caches) {
  using S = Acc<T>;
  const PerChannel<S, kArray> gate{gates}, dmean{dmeans};
  past_caches = past_caches && can_store_past_caches(y, length);
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> g = gate.at(i);
        Vec<S> shift{};
        if constexpr (kShift) shift = dmean.at(i) * inverse;
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const int64_t o = (row + u) * length + i;
          prefetch_row<kArray>(x + o, length);
          Vec<S> value = load(x + o, count) * g;
          if constexpr (kShift) value += shift;
          if (past_caches && count == kLanes<S>) {
            store_past_caches(y + o, value);
          } else {
            store(y + o, value, count);
          }
        }
      });
  if (past_caches) fence_stores();
}

template <class T, bool kShift>
void scale_channels_last(const SqueezeExciteScaleParams& p, bool past_caches) {
  using S = Acc<T>;
  const SampleRows<T> rows(p.shape);
  const S inverse = S(1) / static_cast<S>(p.shape.hw);
  const int64_t tasks = rows.n * rows.parts;
  const auto scale = [&](int64_t task) {
    const int64_t sample = task / rows.parts;
    const S* given[2] = {static_cast<const S*>(p.gate), static_cast<const S*>(p.dmean)};
    const Scratch<S> repeated(rows.repeat > 1 ? 2 * rows.wide : 0, Fill::kNothing);
    for (int i = 0; i <= kShift; ++i) {
      given[i] += sample * rows.c;
      if (rows.repeat == 1) continue;
      S* to = repeated.get() + i * rows.wide;
      for (int64_t j = 0; j < rows.wide; j += rows.c) {
        std::memcpy(to + j, given[i], rows.c * sizeof(S));
      }
      given[i] = to;
    }
    rows.for_each_span(task % rows.parts, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      const int64_t at = sample * rows.size + o;
      scale_rows<T, true, kShift>(static_cast<const T*>(p.x) + at, static_cast<T*>(p.y) + at, count,
                                  length, given[0], given[1], inverse, past_caches);
    });
  };
  parallel_for_backwards(tasks, task_grain(tasks, p.shape.numel()), scale);
}

template <class T, bool kShift>
void scale_planes(const SqueezeExciteScaleParams& p, bool past_caches) {
  using S = Acc<T>;
  const int64_t hw = p.shape.hw, planes = p.shape.n * p.shape.c;
  const S inverse = S(1) / static_cast<S>(hw);
  const auto scale = [&](int64_t plane) {
    const int64_t at = plane * hw;
    scale_rows<T, false, kShift>(static_cast<const T*>(p.x) + at, static_cast<T*>(p.y) + at, 1, hw,
                                 static_cast<const S*>(p.gate) + plane,
                                 kShift ? static_cast<const S*>(p.dmean) + plane : nullptr, inverse,
                                 past_caches);
  };
  parallel_for_backwards(planes, task_grain(planes, p.shape.numel()), scale);
}

}  // namespace

void squeeze_excite_reduce_cpu(const SqueezeExciteReduceParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_bool(p.dy != nullptr, [&](auto dy) {
      p.shape.channels_last ? reduce_channels_last<T, dy.value>(p) : reduce_planes<T, dy.value>(p);
    });
  });
}

void squeeze_excite_scale_cpu(const SqueezeExciteScaleParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool past_caches = p.shape.numel() * int64_t{sizeof(T)} >= kPastCachesBytes;
    dispatch_bool(p.dmean != nullptr, [&](auto shift) {
      p.shape.channels_last ? scale_channels_last<T, shift.value>(p, past_caches)
                            : scale_planes<T, shift.value>(p, past_caches);
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
