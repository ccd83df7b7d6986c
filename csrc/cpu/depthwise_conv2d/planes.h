// depthwise_conv2d on the CPU in NCHW: vectors of neighbouring columns.
//
// A thread takes one plane after the other. A band of its rows is converted to float in the L2
// cache, with zeros on both sides and its columns sorted by their remainder modulo the stride: then
// each tap of the kernel reads one contiguous run of columns, and no load needs a mask. x is read
// once but for the kernel_h - 1 rows that two bands share; a multiply-add takes one operand from
// the L1 cache. Zeros around the image are multiplied: an infinite weight gives NaN at a border,
// where channels_last leaves those products out.
#pragma once

#include "cpu/depthwise_conv2d/window.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kBandElements = 1 << 14;  // of float rows: 64 KiB

template <class S>
inline int64_t whole_vectors(int64_t columns) {
  return ceil_div(columns, kLanes<S>) * kLanes<S>;
}

// The float rows of a band: each `phases` runs of columns, with zeros around what is filled.
template <class S>
class FloatRows {
 public:
  FloatRows(int64_t count, int64_t phases, int64_t length)
      : phases_(phases), length_(whole_vectors<S>(length)), values_(count * phases * length_) {}

  S* at(int64_t row, int64_t phase) const {
    return values_.get() + (row * phases_ + phase) * length_;
  }

  // Column j of a row goes to phase (j + shift) % phases, place (j + shift) / phases.
  template <class T>
  void fill(int64_t row, const T* from, int64_t width, int64_t shift) const {
    alignas(kVectorBytes) S piece[kLanes<S>];
    int64_t phase = shift % phases_, place = shift / phases_;
    for_each_vector<S>(
        width, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          if (phases_ == 1) return store(at(row, 0) + shift + i, load(from + i, lanes), lanes);
          store(piece, load(from + i, lanes));
          for (int64_t k = 0; k < lanes; ++k) {
            at(row, phase)[place] = piece[k];
            if (++phase == phases_) {
              phase = 0;
              ++place;
            }
          }
        });
  }

  // The way back.
  template <class T>
  void write(int64_t row, T* to, int64_t width, int64_t shift) const {
    alignas(kVectorBytes) S piece[kLanes<S>];
    int64_t phase = shift % phases_, place = shift / phases_;
    for_each_vector<S>(
        width, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          if (phases_ == 1) return store(to + i, load(at(row, 0) + shift + i, lanes), lanes);
          for (int64_t k = 0; k < lanes; ++k) {
            piece[k] = at(row, phase)[place];
            if (++phase == phases_) {
              phase = 0;
              ++place;
            }
          }
          store(to + i, load(piece), lanes);
        });
  }

 private:
  int64_t phases_, length_;
  Scratch<S> values_;
};

// Runs of columns that a row of the result is made of, each with its weight.
template <class S>
struct RunTaps {
  int64_t count = 0;
  Scratch<const S*> runs;
  Scratch<S> weights;

  explicit RunTaps(int64_t most) : runs(most), weights(most) {}
  void add(const S* run, S weight) {
    runs[count] = run;
    weights[count++] = weight;
  }
};

// to[i] = start + sum over taps of weight * run[i], in whole vectors.
template <class S>
void add_up_runs(const RunTaps<S>& taps, S start, S* to, int64_t columns) {
  const auto vectors = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Vec<S> sum[kCount];
    unrolled<0, kCount>([&](auto k)
                            __attribute__((always_inline)) { sum[k.value] = splat(start); });
    for (int64_t t = 0; t < taps.count; ++t) {
      const S* run = taps.runs[t] + i;
      const Vec<S> weight = splat(taps.weights[t]);
      unrolled<0, kCount>([&](auto k) __attribute__((always_inline)) {
        sum[k.value] += load(run + k.value * kLanes<S>) * weight;
      });
    }
    unrolled<0, kCount>([&](auto k) __attribute__((always_inline)) {
      store(to + i + k.value * kLanes<S>, sum[k.value]);
    });
  };
  constexpr int64_t kBlock = 4 * kLanes<S>;  // four sums hide a multiply-add's latency
  int64_t i = 0;
  for (; i + kBlock <= columns; i += kBlock) vectors(Index<4>{}, i);
  for (; i < columns; i += kLanes<S>) vectors(Index<1>{}, i);
}

// Columns of a float row, and rows of a band, that hold x for the windows of y.
struct InputBand {
  int64_t length, rows_of_y, rows;

  template <class S>
  InputBand(const DepthwiseShape& s, S) {
    const WindowAxis &r = s.rows, &q = s.columns;
    length = max(whole_vectors<S>(q.size_out) + (q.kernel - 1) * q.dilation / q.stride + 1,
                 (q.size - 1 + q.padding) / q.stride + 1);
    const int64_t halo = (r.kernel - 1) * r.dilation;
    const int64_t fit = kBandElements / (length * q.stride);  // rows of x
    rows_of_y = max(1, min(r.size_out, (fit - halo) / r.stride));
    rows = min(r.size, (rows_of_y - 1) * r.stride + halo + 1);
  }
};

// Fills the rows of x that rows [begin, end) of y are made of; returns the first of them.
template <class T, class S>
int64_t fill_input(const FloatRows<S>& rows, const DepthwiseShape& s, const T* x, int64_t begin,
                   int64_t end) {
  const WindowAxis& r = s.rows;
  const int64_t first = max(0, begin * r.stride - r.padding);
  const int64_t last =
      min(r.size, (end - 1) * r.stride + (r.kernel - 1) * r.dilation - r.padding + 1);
  for (int64_t row = first; row < last; ++row) {
    rows.fill(row - first, x + row * s.columns.size, s.columns.size, s.columns.padding);
  }
  return first;
}

// body(run of x, tap of the kernel) for a row of y; `first` is the band's first row of x.
template <class S, class Body>
void for_each_run(const FloatRows<S>& rows, const DepthwiseShape& s, const RowTap* taps,
                  int64_t count, int64_t first, const Body& body) {
  const WindowAxis& q = s.columns;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t b = 0; b < q.kernel; ++b) {
      const int64_t at = b * q.dilation;
      body(rows.at(taps[t].row - first, at % q.stride) + at / q.stride,
           taps[t].kernel_row * q.kernel + b);
    }
  }
}

template <class T, class S>
void planes_fwd(const DepthwiseShape& s, const T* x, const S* weight, const S* bias, const T* dy,
                T* y, Act act) {
  const WindowAxis &r = s.rows, &q = s.columns;
  const InputBand band(s, S{});
  const Finish<T> finish = choose_finish<T>(act, dy != nullptr);
  const int64_t planes = s.n * s.c, taps = r.kernel * q.kernel,
                columns = whole_vectors<S>(q.size_out);
  const auto run = [&](int64_t from, int64_t to) {
    const FloatRows<S> rows(band.rows, q.stride, band.length);
    const Scratch<S> sums(columns);
    const Scratch<RowTap> row_of(r.kernel);
    RunTaps<S> runs(taps);
    const auto* vectors = reinterpret_cast<const Vec<S>*>(sums.get());
    for (int64_t plane = from; plane < to; ++plane) {
      const S* w = weight + plane % s.c * taps;
      const S start = bias == nullptr ? S(0) : bias[plane % s.c];
      for (int64_t begin = 0; begin < r.size_out; begin += band.rows_of_y) {
        const int64_t end = min(r.size_out, begin + band.rows_of_y);
        const int64_t first = fill_input(rows, s, x + plane * r.size * q.size, begin, end);
        for (int64_t row = begin; row < end; ++row) {
          runs.count = 0;
          for_each_run(rows, s, row_of.get(), row_taps(r, row, row_of.get()), first,
                       [&](const S* of, int64_t tap) { runs.add(of, w[tap]); });
          add_up_runs(runs, start, sums.get(), columns);
          const int64_t at = (plane * r.size_out + row) * q.size_out;
          const int64_t full = q.size_out / kLanes<S>, done = full * kLanes<S>;
          const T* dz = dy == nullptr ? nullptr : dy + at;
          finish(vectors, act, dz, y + at, full, kLanes<S>, kLanes<S>);
          if (done < q.size_out) {
            finish(vectors + full, act, dz == nullptr ? nullptr : dz + done, y + at + done, 1,
                   kLanes<S>, q.size_out - done);
          }
        }
      }
    }
  };
  parallel_ranges(planes, task_grain(planes, planes * r.size_out * q.size_out), run);
}

// Columns of dx whose place plus the padding has one remainder modulo the stride meet the same
// columns of the kernel: runs of dy, shifted.
template <class T, class S>
void planes_bwd_data(const DepthwiseShape& s, const T* dy, const S* weight, T* dx) {
  const WindowAxis &r = s.rows, &q = s.columns;
  const int64_t planes = s.n * s.c, taps = r.kernel * q.kernel;
  const int64_t shift = (q.kernel - 1) * q.dilation / q.stride;  // zeros before dy
  const int64_t columns = whole_vectors<S>((q.size - 1 + q.padding) / q.stride + 1);
  const int64_t length = max(columns, q.size_out) + shift;
  const int64_t halo = (r.kernel - 1) * r.dilation / r.stride + 1;
  const int64_t band = max(1, min(r.size, (kBandElements / length - halo) * r.stride));
  const auto run = [&](int64_t from, int64_t to) {
    const FloatRows<S> rows(min(r.size_out, (band - 1) / r.stride + halo + 1), 1, length);
    const FloatRows<S> sums(1, q.stride, columns);
    const Scratch<RowTap> row_of(r.kernel);
    RunTaps<S> runs(taps);
    for (int64_t plane = from; plane < to; ++plane) {
      const S* w = weight + plane % s.c * taps;
      for (int64_t begin = 0; begin < r.size; begin += band) {
        const int64_t end = min(r.size, begin + band);
        const int64_t lowest = begin + r.padding - (r.kernel - 1) * r.dilation;
        const int64_t first = lowest <= 0 ? 0 : ceil_div(lowest, r.stride);
        const int64_t last = min(r.size_out, (end - 1 + r.padding) / r.stride + 1);
        for (int64_t row = first; row < last; ++row) {
          rows.fill(row - first, dy + (plane * r.size_out + row) * q.size_out, q.size_out, shift);
        }
        for (int64_t row = begin; row < end; ++row) {
          const int64_t count = row_taps_of_input(r, row, row_of.get());
          for (int64_t phase = 0; phase < q.stride; ++phase) {
            runs.count = 0;
            for (int64_t t = 0; t < count; ++t) {
              for (int64_t b = 0; b < q.kernel; ++b) {
                if (b * q.dilation % q.stride != phase) continue;
                runs.add(rows.at(row_of[t].row - first, 0) + shift - b * q.dilation / q.stride,
                         w[row_of[t].kernel_row * q.kernel + b]);
              }
            }
            add_up_runs(runs, S(0), sums.at(0, phase), columns);
          }
          sums.write(0, dx + (plane * r.size + row) * q.size, q.size, q.padding);
        }
      }
    }
  };
  parallel_ranges(planes, task_grain(planes, planes * r.size * q.size), run);
}

// sums[k][lanes] += dy[i] * run k [i]. The last vector's other lanes are left out: x may be
// infinite.
template <class S, int kRuns>
void add_products(const S* const* runs, const S* dy, int64_t columns, S* sums) {
  Vec<S> sum[kRuns];
  unrolled<0, kRuns>([&](auto k) __attribute__((always_inline)) {
    sum[k.value] = load(sums + k.value * kLanes<S>);
  });
  int64_t i = 0;
  for (; i + kLanes<S> <= columns; i += kLanes<S>) {
    const Vec<S> d = load(dy + i);
    unrolled<0, kRuns>([&](auto k) __attribute__((always_inline)) {
      sum[k.value] += load(runs[k.value] + i) * d;
    });
  }
  if (i < columns) {
    const Vec<S> d = load(dy + i);
    unrolled<0, kRuns>([&](auto k) __attribute__((always_inline)) {
      sum[k.value] += first_lanes<S>(load(runs[k.value] + i), columns - i) * d;
    });
  }
  unrolled<0, kRuns>([&](auto k) __attribute__((always_inline)) {
    store(sums + k.value * kLanes<S>, sum[k.value]);
  });
}

// A task is one channel of a part of the batch (Planes); parts are added up in their order.
template <class T, class S>
void planes_bwd_weight(const DepthwiseShape& s, const T* dy, const T* x, S* dweight, S* dbias) {
  const WindowAxis &r = s.rows, &q = s.columns;
  const InputBand band(s, S{});
  const Planes planes({s.n, s.c, r.size_out * q.size_out, false}, sizeof(T));
  const int64_t taps = r.kernel * q.kernel;
  const Scratch<S> parts(planes.tasks * (taps + 1), Fill::kNothing);
  const auto run = [&](int64_t from, int64_t to) {
    const FloatRows<S> rows(band.rows, q.stride, band.length), row_of_dy(1, 1, q.size_out);
    const Scratch<RowTap> row_of(r.kernel);
    RunTaps<S> runs(taps);
    const Scratch<S> sums((taps + 1) * kLanes<S>);
    S* dy_row = row_of_dy.at(0, 0);
    for (int64_t task = from; task < to; ++task) {
      std::memset(static_cast<void*>(sums.get()), 0,
                  static_cast<size_t>((taps + 1) * kLanes<S>) * sizeof(S));
      for (int64_t image = planes.first(task); image < planes.last(task); ++image) {
        const int64_t plane = image * s.c + planes.channel(task);
        for (int64_t begin = 0; begin < r.size_out; begin += band.rows_of_y) {
          const int64_t end = min(r.size_out, begin + band.rows_of_y);
          const int64_t first = fill_input(rows, s, x + plane * r.size * q.size, begin, end);
          for (int64_t row = begin; row < end; ++row) {
            row_of_dy.fill(0, dy + (plane * r.size_out + row) * q.size_out, q.size_out, 0);
            const int64_t count = row_taps(r, row, row_of.get());
            runs.count = 0;
            for_each_run(rows, s, row_of.get(), count, first,
                         [&](const S* of, int64_t) { runs.add(of, S(0)); });
            S* to_sums = sums.get() + (count > 0 ? row_of[0].kernel_row : 0) * q.kernel * kLanes<S>;
            int64_t k = 0;
            for (; k + 8 <= runs.count; k += 8) {
              add_products<S, 8>(runs.runs.get() + k, dy_row, q.size_out, to_sums + k * kLanes<S>);
            }
            for (; k < runs.count; ++k) {
              add_products<S, 1>(runs.runs.get() + k, dy_row, q.size_out, to_sums + k * kLanes<S>);
            }
            Vec<S> bias = load(sums.get() + taps * kLanes<S>);
            for (int64_t i = 0; i < q.size_out; i += kLanes<S>) bias += load(dy_row + i);
            store(sums.get() + taps * kLanes<S>, bias);
          }
        }
      }
      for (int64_t t = 0; t <= taps; ++t) {
        parts[task * (taps + 1) + t] = horizontal_sum<S>(load(sums.get() + t * kLanes<S>));
      }
    }
  };
  parallel_ranges(planes.tasks, planes.grain, run);
  for (int64_t j = 0; j < s.c; ++j) {
    for (int64_t t = 0; t <= taps; ++t) {
      S total = 0;
      for (int64_t part = 0; part < planes.parts; ++part) {
        total += parts[(j * planes.parts + part) * (taps + 1) + t];
      }
      (t < taps ? dweight[j * taps + t] : dbias[j]) = total;
    }
  }
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CPU_LEVEL
