// Mean and centred squares of each channel, for the normalisations' CPU kernels.
//
// Memory is read once. Values are taken relative to a center, a mean of values before them (at the
// start of a task, of its first few), and sums and squares are added up over a chunk; then the
// center moves to the mean so far, and chunks are merged by Chan's formula. What cancels in a chunk
// is d^2 for each of its n values, d its mean's distance from the center. Where that is more than
// three quarters of the squares (an outlier made the center, or the data has moved), the chunk,
// which is in the L1 cache still, is taken again around its own mean. So at most two bits cancel.
//
// A channel with an infinity or a NaN has PyTorch's statistics: as mean its sum over its count, and
// as variance NaN. inf - inf would make the mean NaN as well: so centers are finite, and a merged
// mean that comes out as NaN is made anew without a difference. Where sums or squares are beyond
// float32, statistics are made anew in double, as PyTorch's of NCHW are; a variance that is beyond
// it is infinite: common/variance.h.
#pragma once

#include "common/variance.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

// variance_of for whole vectors.
template <class S>
inline Vec<S> variances_of(Vec<S> mean, Vec<S> var) {
  const Vec<S> infinite = splat(static_cast<S>(__builtin_inff()));
  return var == var ? var : mean - mean == Vec<S>{} ? infinite : var;
}

// Sum and squares around the mean of `count` values; merged by Chan's formula.
template <class S>
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    const double merged = mean + delta * other_count / total;
    mean = merged == merged ? merged : mean + other_mean;
    m2 += other_m2 + delta * delta * count * other_count / total;
    count = total;
  }
  bool is_finite() const { return mean - mean == 0 && m2 - m2 == 0; }
  void write(S* mean_out, S* var_out) const {
    *mean_out = static_cast<S>(mean);
    *var_out = variance_of(*mean_out, static_cast<S>(m2 / count));
  }
};

// Of `count` values, in double: for those alone whose sums or squares are beyond S, for which two
// more passes are made, value by value, but up to a NaN. for_each_span(body) calls body(first
// value, length).
template <class T, class ForEachSpan>
Moments<Acc<T>> moments_in_double(double count, ForEachSpan for_each_span) {
  const auto sum_of = [&](auto term) {
    double total = 0;
    for_each_span([&](const T* x, int64_t length) {
      for (int64_t i = 0; i < length && total == total; ++i) {
        total += term(static_cast<double>(load(x + i, 1)[0]));
      }
    });
    return total;
  };
  const double mean = sum_of([](double value) { return value; }) / count;
  if (mean - mean != 0) return {count, mean, mean - mean};
  return {count, mean, sum_of([&](double value) { return (value - mean) * (value - mean); })};
}

template <class S>
constexpr bool kDoubleIsWider = sizeof(S) < sizeof(double);

constexpr int64_t kCenterRows = 8;  // that make the first center
constexpr int kCancelled = 4;       // squares over m2: beyond it a chunk is taken again

// Rows [begin, end), not none: of each of the `wide` columns m2[i] and the mean origin[i] +
// mean[i]. The origin is the first center: what is left has the size of the deviations, and rounds
// like them.
template <class T>
void column_moments(const T* x, int64_t begin, int64_t end, const WideRows& w, Acc<T>* origin,
                    Acc<T>* mean, Acc<T>* m2) {
  using S = Acc<T>;
  Scratch<S> center(w.wide, Fill::kNothing), sum(w.wide, Fill::kNothing);
  Scratch<S> sq(w.wide, Fill::kNothing);
  const int64_t first_rows = min(kCenterRows, end - begin);
  for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
    Vec<S> total{};
    for (int64_t row = begin; row < begin + first_rows; ++row) total += load(x + row * w.wide + i);
    const Vec<S> center = total * (S(1) / static_cast<S>(first_rows));
    store(origin + i, center - center == Vec<S>{} ? center : Vec<S>{});
    store(mean + i, Vec<S>{});
    store(m2 + i, Vec<S>{});
  });
  for (int64_t chunk = begin; chunk < end; chunk += w.chunk) {
    const int64_t rows = min(w.chunk, end - chunk);
    const T* first = x + chunk * w.wide;
    const S count = static_cast<S>(rows), inverse = S(1) / count;
    for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
      const Vec<S> moved = load(origin + i) + load(mean + i);
      store(center.get() + i, moved - moved == Vec<S>{} ? moved : load(origin + i));
    });
    for (int round = 0; round < 2; ++round) {
      for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
        store(sum.get() + i, Vec<S>{});
        store(sq.get() + i, Vec<S>{});
      });
      for_each_block<S>(rows, w.wide, [&](auto block, int64_t row, int64_t i, int64_t) {
        const Vec<S> from = load(center.get() + i);
        Vec<S> total = load(sum.get() + i), squares = load(sq.get() + i);
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const T* at = first + (row + u) * w.wide + i;
          prefetch_row<true>(at, w.wide);
          const Vec<S> a = load(at) - from;
          total += a;
          squares += a * a;
        }
        store(sum.get() + i, total);
        store(sq.get() + i, squares);
      });
      if (round == 1) break;
      Vec<S> cancelled{};  // how many columns, lane by lane
      for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
        const Vec<S> total = load(sum.get() + i), squares = load(sq.get() + i);
        const Vec<S> m2 = squares - total * total * inverse, one = splat(S(1));
        cancelled += squares > m2 * S(kCancelled) ? one : Vec<S>{};
      });
      if (horizontal_sum<S>(cancelled) == 0) break;
      for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
        const Vec<S> from = load(center.get() + i), moved = from + load(sum.get() + i) * inverse;
        store(center.get() + i, moved - moved == Vec<S>{} ? moved : from);
      });
    }
    const S seen = static_cast<S>(chunk - begin);
    const S share = count / (seen + count), spread = seen * share;
    for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
      const Vec<S> total = load(sum.get() + i), drift = total * inverse;
      const Vec<S> delta = ((load(center.get() + i) - load(origin + i)) - load(mean + i)) + drift;
      const Vec<S> before = load(mean + i), merged = before + delta * share;
      store(mean + i, merged == merged ? merged : before + drift);
      store(m2 + i, load(m2 + i) + (load(sq.get() + i) - total * drift) + delta * delta * spread);
    });
  }
}

// One channel of some planes, `stride` apart from image to image; x is its plane of the first one.
template <class T>
Moments<Acc<T>> plane_moments(const T* x, int64_t stride, const Planes& planes, int64_t task) {
  using S = Acc<T>;
  Moments<S> moments;
  S center = 0;
  const int64_t last = planes.last(task);
  for (int64_t image = planes.first(task); image < last; image += planes.group) {
    const int64_t images = min(planes.group, last - image);
    for (int64_t begin = 0; begin < planes.hw; begin += planes.piece) {
      const int64_t length = min(planes.piece, planes.hw - begin);
      const double count = static_cast<double>(images * length);
      if (moments.count == 0) {
        const int64_t few = min(length, 4 * kLanes<S>);
        for_each_vector<S>(few, [&](int64_t i, int64_t lanes) {
          center += horizontal_sum<S>(load(x + image * stride + i, lanes));
        });
        center /= static_cast<S>(few);
        if (center - center != 0) center = 0;
      }
      double drift = 0, squares = 0, m2 = 0;
      for (int round = 0; round < 2; ++round) {
        const Vec<S> from = splat(center);
        Vec<S> sum{}, sq{};
        for_each_block<S>(
            images, length,
            [&](auto block, int64_t row, int64_t i, int64_t lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
              for (int u = 0; u < block.value; ++u) {
                const T* span = x + (image + row + u) * stride + begin;
                Vec<S> a = load(span + i, lanes) - from;
                if (lanes < kLanes<S>) a = first_lanes<S>(a, lanes);
                sum += a;
                sq += a * a;
              }
            });
        drift = static_cast<double>(horizontal_sum<S>(sum)) / count;
        squares = static_cast<double>(horizontal_sum<S>(sq));
        m2 = squares - drift * drift * count;
        if (round == 1 || !(squares > kCancelled * m2)) break;
        center += static_cast<S>(drift);
      }
      moments.merge(count, static_cast<double>(center) + drift, m2);
      center = static_cast<S>(moments.mean);
      if (center - center != 0) center = 0;
    }
  }
  if (!kDoubleIsWider<S> || moments.is_finite()) return moments;
  return moments_in_double<T>(moments.count, [&](auto body) {
    for (int64_t image = planes.first(task); image < last; ++image) {
      body(x + image * stride, planes.hw);
    }
  });
}

// Of a chunk, read twice: its mean is center + drift, its squares around that are m2.
template <class S>
struct ChunkMoments {
  S center, drift, m2;
};

template <class T>
constexpr int64_t kChunkElements = kChunkBytes / static_cast<int64_t>(sizeof(T));

// Elements side by side, at most kChunkElements.
template <class T>
inline __attribute__((always_inline)) ChunkMoments<Acc<T>> chunk_moments(const T* x,
                                                                         int64_t count) {
  using S = Acc<T>;
  constexpr int64_t kLane = kLanes<S>;
  const int64_t whole = count / (4 * kLane) * 4 * kLane;
  // Four accumulators: one alone would wait for its own additions.
  Vec<S> sum[4] = {}, dev[4] = {}, sq[4] = {};
  for (int64_t i = 0; i < whole; i += 4 * kLane) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] += load(x + i + u * kLane);
  }
  for_each_vector<S>(
      count - whole, [&](int64_t i, int64_t lanes)
                         __attribute__((always_inline)) { sum[0] += load(x + whole + i, lanes); });
  const S inverse = S(1) / static_cast<S>(count);
  S center = horizontal_sum<S>((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;
  if (center - center != 0) center = 0;
  const Vec<S> centers = splat(center);
  for (int64_t i = 0; i < whole; i += 4 * kLane) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const Vec<S> a = load(x + i + u * kLane) - centers;
      dev[u] += a;
      sq[u] += a * a;
    }
  }
  for_each_vector<S>(
      count - whole, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
        Vec<S> a = load(x + whole + i, lanes) - centers;
        if (lanes < kLane) a = first_lanes<S>(a, lanes);
        dev[0] += a;
        sq[0] += a * a;
      });
  const S deviations = horizontal_sum<S>((dev[0] + dev[1]) + (dev[2] + dev[3]));
  const S squares = horizontal_sum<S>((sq[0] + sq[1]) + (sq[2] + sq[3]));
  const S drift = deviations * inverse;
  return {center, drift, squares - deviations * drift};
}

// Any number of elements side by side.
template <class T>
Moments<Acc<T>> range_moments(const T* x, int64_t length) {
  Moments<Acc<T>> moments;
  for (int64_t begin = 0; begin < length; begin += kChunkElements<T>) {
    const int64_t count = min(kChunkElements<T>, length - begin);
    const ChunkMoments<Acc<T>> chunk = chunk_moments(x + begin, count);
    moments.merge(static_cast<double>(count), static_cast<double>(chunk.center) + chunk.drift,
                  static_cast<double>(chunk.m2));
  }
  if (!kDoubleIsWider<Acc<T>> || moments.is_finite()) return moments;
  return moments_in_double<T>(moments.count, [&](auto body) { body(x, length); });
}

// mean[c] and the biased var[c] of a channels_last batch.
template <class T>
void batch_moments(const T* x, const WideRows& w, Acc<T>* mean_out, Acc<T>* var_out) {
  using S = Acc<T>;
  const int64_t columns = w.tasks * w.wide;
  const Scratch<S> origin(columns, Fill::kNothing), mean(columns, Fill::kNothing);
  const Scratch<S> m2(columns, Fill::kNothing);
  const auto stats = [&](int64_t task) {
    const int64_t at = task * w.wide;
    column_moments(x, w.first(task), w.last(task), w, origin.get() + at, mean.get() + at,
                   m2.get() + at);
  };
  parallel_for(w.tasks, w.grain, stats);
  // Tasks and repeats are merged in double: the mean, then all squares around it.
  const T* rest = x + w.rows * w.wide;
  const double inverse = 1.0 / static_cast<double>(w.pixels);
  for_each_channels<S>(w.c, w.tasks * w.wide, [&](int64_t j, int64_t count) {
    const auto mean_of = [&](int64_t i) {
      return widen<S>(load(origin.get() + i, count)) + widen<S>(load(mean.get() + i, count));
    };
    Wide<S> center{}, squares{};
    for (int64_t task = 0; task < w.tasks; ++task) {
      const double part = static_cast<double>(w.last(task) - w.first(task));
      for (int64_t i = task * w.wide + j; i < (task + 1) * w.wide; i += w.c) {
        center += mean_of(i) * part;
      }
    }
    for (int64_t i = j; i < w.rest; i += w.c) center += widen<S>(load(rest + i, count));
    center *= inverse;
    for (int64_t task = 0; task < w.tasks; ++task) {
      const double part = static_cast<double>(w.last(task) - w.first(task));
      for (int64_t i = task * w.wide + j; i < (task + 1) * w.wide; i += w.c) {
        const Wide<S> delta = mean_of(i) - center;
        squares += widen<S>(load(m2.get() + i, count)) + delta * delta * part;
      }
    }
    for (int64_t i = j; i < w.rest; i += w.c) {
      const Wide<S> delta = widen<S>(load(rest + i, count)) - center;
      squares += delta * delta;
    }
    const Vec<S> mean = __builtin_convertvector(center, Vec<S>);
    const Vec<S> var = __builtin_convertvector(squares * inverse, Vec<S>);
    store(mean_out + j, mean, count);
    store(var_out + j, variances_of<S>(mean, var), count);
    for (int64_t i = j; kDoubleIsWider<S> && i < j + count; ++i) {
      if (mean_out[i] - mean_out[i] == 0 && var_out[i] - var_out[i] == 0) continue;
      const auto column = [&](auto body) {
        for (int64_t pixel = 0; pixel < w.pixels; ++pixel) body(x + pixel * w.c + i, 1);
      };
      moments_in_double<T>(static_cast<double>(w.pixels), column).write(mean_out + i, var_out + i);
    }
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
