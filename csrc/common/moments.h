// Mean and centred squares of each channel, for the normalisations' CPU kernels.
//
// A chunk of 32 KiB is read twice, sum first and then squares around the chunk's own mean, the
// second time from the L1 cache; the sum of those deviations corrects the mean's rounding, and
// chunks are joined by Chan's formula. So there is never a difference of large squares, and memory
// is read once.
//
// A channel with an infinity or a NaN has PyTorch's statistics: as mean its sum over its count, and
// as variance NaN. inf - inf would make the mean NaN as well, so what comes out as NaN is made anew
// without a difference: once a chunk, outside the loops over elements.
#pragma once

#include "common/parallel.h"
#include "common/spans.h"
#include "common/vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

// Sum and squares around the mean of `count` values; joined by Chan's formula.
template <class S>
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void join(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    const double joined = mean + delta * other_count / total;
    mean = joined == joined ? joined : mean + other_mean;
    m2 += other_m2 + delta * delta * count * other_count / total;
    count = total;
  }
  void write(S* mean_out, S* var_out) const {
    *mean_out = static_cast<S>(mean);
    *var_out = static_cast<S>(m2 / count);
  }
};

// Rows [begin, end): of each of the `wide` columns m2[i] and the mean origin[i] + mean[i]. The
// origin is the first chunk's mean: what is left has the size of the deviations, and rounds like
// them. sum, dev and sq are scratch.
template <class T>
void column_moments(const T* x, int64_t begin, int64_t end, const WideRows& w, Acc<T>* origin,
                    Acc<T>* mean, Acc<T>* m2, Acc<T>* sum, Acc<T>* dev, Acc<T>* sq) {
  using S = Acc<T>;
  for (int64_t chunk = begin; chunk < end; chunk += w.chunk) {
    const int64_t rows = min(w.chunk, end - chunk);
    const T* first = x + chunk * w.wide;
    for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
      store(sum + i, Vec<S>{});
      store(dev + i, Vec<S>{});
      store(sq + i, Vec<S>{});
    });
    for_each_block<S>(rows, w.wide, [&](auto block, int64_t row, int64_t i, int64_t) {
      Vec<S> total = load(sum + i);
#pragma GCC unroll 4
      for (int u = 0; u < block.value; ++u) total += load(first + (row + u) * w.wide + i);
      store(sum + i, total);
    });
    const Vec<S> inverse = splat(S(1) / static_cast<S>(rows));
    for_each_vector<S>(w.wide,
                       [&](int64_t i, int64_t) { store(sum + i, load(sum + i) * inverse); });
    if (chunk == begin) {
      for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
        const Vec<S> center = load(sum + i);
        store(origin + i, center - center == Vec<S>{} ? center : Vec<S>{});
      });
    }
    for_each_block<S>(rows, w.wide, [&](auto block, int64_t row, int64_t i, int64_t) {
      const Vec<S> center = load(sum + i);
      Vec<S> deviations = load(dev + i), squares = load(sq + i);
#pragma GCC unroll 4
      for (int u = 0; u < block.value; ++u) {
        const Vec<S> a = load(first + (row + u) * w.wide + i) - center;
        deviations += a;
        squares += a * a;
      }
      store(dev + i, deviations);
      store(sq + i, squares);
    });
    const S seen = static_cast<S>(chunk - begin), total = seen + static_cast<S>(rows);
    const Vec<S> share = splat(static_cast<S>(rows) / total);
    const Vec<S> spread = splat(seen * static_cast<S>(rows) / total);
    for_each_vector<S>(w.wide, [&](int64_t i, int64_t) {
      const Vec<S> drift = load(dev + i) * inverse;
      const Vec<S> center = load(sum + i), before = load(mean + i);
      const Vec<S> delta = ((center - load(origin + i)) - before) + drift;
      const Vec<S> joined = before + delta * share;
      store(mean + i, joined == joined ? joined : before + center);
      store(m2 + i, load(m2 + i) + (load(sq + i) - load(dev + i) * drift) + delta * delta * spread);
    });
  }
}

// One channel of some planes.
template <class T>
Moments<Acc<T>> plane_moments(const T* x, const Planes& planes, int64_t task) {
  using S = Acc<T>;
  Moments<S> moments;
  const int64_t channel = planes.channel(task), last = planes.last(task);
  for (int64_t image = planes.first(task); image < last; image += planes.group) {
    const int64_t images = min(planes.group, last - image);
    for (int64_t begin = 0; begin < planes.hw; begin += planes.piece) {
      const int64_t length = min(planes.piece, planes.hw - begin);
      const S count = static_cast<S>(images * length);
      Vec<S> sum{}, dev{}, sq{};
      for (int64_t k = 0; k < images; ++k) {
        const T* span = x + planes.offset(image + k, channel) + begin;
        for_each_vector<S>(
            length, [&](int64_t i, int64_t lanes)
                        __attribute__((always_inline)) { sum += load(span + i, lanes); });
      }
      const S mean = horizontal_sum<S>(sum) / count;
      const Vec<S> center = splat(mean);
      for (int64_t k = 0; k < images; ++k) {
        const T* span = x + planes.offset(image + k, channel) + begin;
        for_each_vector<S>(
            length, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
              Vec<S> a = load(span + i, lanes) - center;
              if (lanes < kLanes<S>) a = first_lanes<S>(a, lanes);
              dev += a;
              sq += a * a;
            });
      }
      const double drift = static_cast<double>(horizontal_sum<S>(dev)) / count;
      moments.join(static_cast<double>(count), drift == drift ? mean + drift : mean,
                   horizontal_sum<S>(sq) - drift * drift * count);
    }
  }
  return moments;
}

// mean[c] and the biased var[c] of a channels_last batch.
template <class T>
void batch_moments(const T* x, const WideRows& w, Acc<T>* mean_out, Acc<T>* var_out) {
  using S = Acc<T>;
  Scratch<S> mean(w.tasks * w.wide), m2(w.tasks * w.wide), scratch(w.tasks * w.wide * 3);
  Scratch<S> origin(w.tasks * w.wide);
  const auto stats = [&](int64_t task) {
    const int64_t o = task * w.wide;
    S* sum = scratch.get() + 3 * o;
    column_moments(x, w.first(task), w.last(task), w, origin.get() + o, mean.get() + o,
                   m2.get() + o, sum, sum + w.wide, sum + 2 * w.wide);
  };
  parallel_for(w.tasks, w.grain, stats);
  // Tasks and repeats are joined in double, channels side by side: the mean, then all squares
  // around it.
  Scratch<double> total(w.c), squares(w.c);
  const auto for_each_part =
      [&](auto body) {  // body(count, i): the columns from i on of c channels
        for (int64_t task = 0; task < w.tasks; ++task) {
          const double count = static_cast<double>(w.last(task) - w.first(task));
          for (int64_t i = task * w.wide; i < (task + 1) * w.wide; i += w.c) {
            body(count, i);
          }
        }
      };
  const double count = static_cast<double>(w.pixels);
  const T* rest = x + w.rows * w.wide;
  const auto mean_of = [&](int64_t column) {
    return static_cast<double>(origin[column]) + static_cast<double>(mean[column]);
  };
  for_each_part([&](double part, int64_t i) {
    for (int64_t j = 0; j < w.c; ++j) total[j] += part * mean_of(i + j);
  });
  for (int64_t i = 0; i < w.rest; ++i) total[i % w.c] += static_cast<double>(load(rest + i, 1)[0]);
  for (int64_t j = 0; j < w.c; ++j) total[j] /= count;
  for_each_part([&](double part, int64_t i) {
    for (int64_t j = 0; j < w.c; ++j) {
      const double delta = mean_of(i + j) - total[j];
      squares[j] += static_cast<double>(m2[i + j]) + part * delta * delta;
    }
  });
  for (int64_t i = 0; i < w.rest; ++i) {
    const double delta = static_cast<double>(load(rest + i, 1)[0]) - total[i % w.c];
    squares[i % w.c] += delta * delta;
  }
  for (int64_t j = 0; j < w.c; ++j) {
    mean_out[j] = static_cast<S>(total[j]);
    var_out[j] = static_cast<S>(squares[j] / count);
  }
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
