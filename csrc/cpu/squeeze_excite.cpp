// squeeze_excite on the CPU.
//
// Data movement, T = one pass over the tensor: forward reads x for the means (1T), reads it again
// and writes y (2T); backward reads dy and x for the gates' gradients (2T), reads dy again and
// writes dx (2T). A thread takes a sample through both passes where there are samples enough
// (cpu/units.h): the second reading then comes from the cache where a sample fits, 2T and 3T.
//   channels_last  a part of a sample are wide rows (cpu/spans.h).
//   NCHW           a part are neighbouring planes.
// The products between the passes are a sample's own, too. Weights that would not stay in a cache
// from one sample to the next are read once for all samples, between passes over the whole batch.
// All sums have an order that depends on the shape alone: floats of at most kSumRows rows or
// kTerms elements of a plane, added up in double; a product's in floats.
#include "squeeze_excite.h"

#include "cpu/dispatch.h"
#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "cpu/units.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// ---- an image's passes --------------------------------------------------------------------------

// The term of a sum: x, or with a dy dy * x.
template <class T, bool kDy>
inline __attribute__((always_inline)) Vec<Acc<T>> term(const T* x, const T* dy, int64_t o,
                                                       int64_t count) {
  const Vec<Acc<T>> value = load(x + o, count);
  if constexpr (kDy) return value * load(dy + o, count);
  return value;
}

// sums[i] += the terms of `rows` rows, for whole vectors: the lanes beyond a row's end add 0.
template <class T, bool kDy>
void sum_rows(const T* x, const T* dy, int64_t rows, int64_t length, Acc<T>* sums) {
  using S = Acc<T>;
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec<S> sum = load(sums + i);
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const int64_t o = (row + u) * length + i;
          prefetch_row<true>(x + o, length);
          prefetch_row<kDy>(dy + o, length);
          sum += term<T, kDy>(x, dy, o, count);
        }
        store(sums + i, sum);
      });
}

// The sum of a plane's terms.
template <class T, bool kDy>
double sum_plane(const T* x, const T* dy, int64_t hw) {
  using S = Acc<T>;
  constexpr int64_t kTerms = 1 << 13, kStep = 4 * kLanes<S>;
  double total = 0;
  for (int64_t begin = 0; begin < hw; begin += kTerms) {
    const int64_t length = min(kTerms, hw - begin), whole = length / kStep * kStep;
    Vec<S> sum[4] = {};  // one alone would wait for its own additions
    for (int64_t i = begin; i < begin + whole; i += kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] += term<T, kDy>(x, dy, i + u * kLanes<S>, kLanes<S>);
    }
    for_each_vector<S>(
        length - whole, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
          sum[0] += term<T, kDy>(x, dy, begin + whole + i, count);
        });
    total += static_cast<double>(horizontal_sum<S>((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  return total;
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

// What a sample's numbers are summed in and spread by: `space` doubles, in `parts` parts.
template <class T>
struct RowImages {
  using S = Acc<T>;
  SampleRows<T> rows;
  S inverse;
  int64_t parts, space;
  bool past_caches;

  explicit RowImages(const ImageShape& shape)
      : rows(shape),
        inverse(S(1) / static_cast<S>(shape.hw)),
        parts(rows.parts),
        space(parts * rows.wide),
        past_caches(shape.numel() * int64_t{sizeof(T)} >= kPastCachesBytes) {}

  template <bool kDy>
  void sum(const T* x, const T* dy, double* sums, int64_t sample, int64_t part) const {
    const Scratch<S> block(rows.wide, Fill::kNothing);
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      for (int64_t row = 0; row < count; row += kSumRows) {
        for_each_vector<S>(rows.wide,
                           [&](int64_t i, int64_t) { store(block.get() + i, Vec<S>{}); });
        const int64_t from = sample * rows.size + o + row * length;
        sum_rows<T, kDy>(x + from, kDy ? dy + from : nullptr, min(kSumRows, count - row), length,
                         block.get());
        add_in_double(sums + part * rows.wide, block.get(), rows.wide);
      }
    });
  }

  // The sums of a sample's channels, into the first of them.
  void merge(double* sums) const {
    for (int64_t column = rows.c; column < space; column += rows.c) {
      for (int64_t j = 0; j < rows.c; ++j) sums[j] += sums[column + j];
    }
  }

  template <bool kShift>
  void scale(const T* x, T* y, const S* gate, const S* dmean, int64_t sample, int64_t part) const {
    const S* given[] = {gate, dmean};
    const Scratch<S> repeated(rows.repeat > 1 ? 2 * rows.wide : 0, Fill::kNothing);
    for (int i = 0; i <= kShift && rows.repeat > 1; ++i) {
      S* to = repeated.get() + i * rows.wide;
      for (int64_t j = 0; j < rows.wide; j += rows.c) {
        std::memcpy(to + j, given[i], static_cast<size_t>(rows.c) * sizeof(S));
      }
      given[i] = to;
    }
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      const int64_t at = sample * rows.size + o;
      scale_rows<T, true, kShift>(x + at, y + at, count, length, given[0], given[1], inverse,
                                  past_caches);
    });
  }
};

template <class T>
struct PlaneImages {
  using S = Acc<T>;
  int64_t c, hw;
  S inverse;
  int64_t parts, space;
  bool past_caches;

  explicit PlaneImages(const ImageShape& shape)
      : c(shape.c),
        hw(shape.hw),
        inverse(S(1) / static_cast<S>(hw)),
        parts(min(c, ceil_div(kTasks / 4, shape.n))),
        space(c),
        past_caches(shape.numel() * int64_t{sizeof(T)} >= kPastCachesBytes) {}

  template <class Body>
  void for_each_plane(int64_t part, Body body) const {
    for (int64_t j = c * part / parts; j < c * (part + 1) / parts; ++j) body(j);
  }

  template <bool kDy>
  void sum(const T* x, const T* dy, double* sums, int64_t sample, int64_t part) const {
    for_each_plane(part, [&](int64_t j) {
      const int64_t at = (sample * c + j) * hw;
      sums[j] = sum_plane<T, kDy>(x + at, kDy ? dy + at : nullptr, hw);
    });
  }

  void merge(double*) const {}

  template <bool kShift>
  void scale(const T* x, T* y, const S* gate, const S* dmean, int64_t sample, int64_t part) const {
    for_each_plane(part, [&](int64_t j) {
      const int64_t at = (sample * c + j) * hw;
      scale_rows<T, false, kShift>(x + at, y + at, 1, hw, gate + j, kShift ? dmean + j : nullptr,
                                   inverse, past_caches);
    });
  }
};

// ---- the products -------------------------------------------------------------------------------

template <class S>
S dot(const S* a, const S* b, int64_t count) {
  constexpr int64_t kStep = 4 * kLanes<S>;
  const int64_t whole = count / kStep * kStep;
  Vec<S> sum[4] = {};
  for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      sum[u] += load(a + i + u * kLanes<S>) * load(b + i + u * kLanes<S>);
    }
  }
  for_each_vector<S>(
      count - whole, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
        sum[0] += load(a + whole + i, lanes) * load(b + whole + i, lanes);
      });
  return horizontal_sum<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Products with matrices [rows, columns] of the samples [first, last), whose rows are read once for
// all of them; in threads of their own or, within a task, in none.
template <class S>
struct Products {
  int64_t first, last;
  bool in_threads;

  template <class Body>
  void blocks(int64_t count, int64_t block, int64_t work, Body body) const {
    if (!in_threads) return body(0, count);
    const int64_t tasks = ceil_div(count, block);
    parallel_for(tasks, task_grain(tasks, work * (last - first)),
                 [&](int64_t task) { body(task * block, min(count, (task + 1) * block)); });
  }

  // out [n, rows] = t [n, columns] @ matrix.T + bias
  void by_rows(const S* matrix, const S* bias, const S* t, S* out, int64_t rows,
               int64_t columns) const {
    blocks(rows, 16, rows * columns, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t i = first; i < last; ++i) {
          const S sum = dot(matrix + j * columns, t + i * columns, columns);
          out[i * rows + j] = bias == nullptr ? sum : sum + bias[j];
        }
      }
    });
  }

  // out [n, columns] = d [n, rows] @ matrix
  void by_columns(const S* matrix, const S* d, S* out, int64_t rows, int64_t columns) const {
    constexpr int64_t kBlock = 4 * kLanes<S>;
    blocks(columns, kBlock, rows * columns, [&](int64_t begin, int64_t end) {
      int64_t k = begin;
      for (; k + kBlock <= end; k += kBlock) {
        for (int64_t i = first; i < last; ++i) {
          Vec<S> sum[4] = {};
          for (int64_t j = 0; j < rows; ++j) {
            const S factor = d[i * rows + j];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
              sum[u] += load(matrix + j * columns + k + u * kLanes<S>) * factor;
            }
          }
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) store(out + i * columns + k + u * kLanes<S>, sum[u]);
        }
      }
      for_each_vector<S>(
          end - k, [&](int64_t o, int64_t count) __attribute__((always_inline)) {
            for (int64_t i = first; i < last; ++i) {
              Vec<S> sum{};
              for (int64_t j = 0; j < rows; ++j) {
                sum += load(matrix + j * columns + k + o, count) * d[i * rows + j];
              }
              store(out + i * columns + k + o, sum, count);
            }
          });
    });
  }

  // body(i, count) for vectors of the samples' `numbers` each.
  template <class Body>
  void each(int64_t numbers, Body body) const {
    for_each_vector<S>((last - first) * numbers,
                       [&](int64_t i, int64_t count) { body(first * numbers + i, count); });
  }
};

// Runs first(sums, sample, part) for each part, merge(sums, sample), products, and
// second(sums, sample, part) for each part. weights: how many numbers the products read.
template <class S, class Images, class First, class Merge, class Multiply, class Second>
void run(const ImageShape& shape, const Images& images, int64_t weights, First sum, Merge merge,
         Multiply products, Second scale) {
  constexpr int64_t kManyWeights =
      (1 << 19) / sizeof(S);  // what stays in an L2 cache beside images
  const int64_t n = shape.n, parts = images.parts;
  if (weights <= kManyWeights) {
    const auto between = [&](double* sums, int64_t sample) {
      merge(sums, sample);
      products(Products<S>{sample, sample + 1, false});
    };
    return run_units<double>(n, parts, images.space, shape.numel(), kNothing, sum, between, scale);
  }
  const Scratch<double> sums(n * images.space);
  const auto of_sample = [&](int64_t sample) { return sums.get() + sample * images.space; };
  const int64_t grain = task_grain(n * parts, shape.numel());
  parallel_for(n * parts, grain,
               [&](int64_t task) { sum(of_sample(task / parts), task / parts, task % parts); });
  parallel_for(n, 1, [&](int64_t sample) { merge(of_sample(sample), sample); });
  products(Products<S>{0, n, true});
  parallel_for_backwards(n * parts, grain, [&](int64_t task) {
    scale(of_sample(task / parts), task / parts, task % parts);
  });
}

template <class T, class Images>
void fwd(const SqueezeExciteFwdParams& p) {
  using S = Acc<T>;
  const Images images(p.shape);
  const int64_t n = p.shape.n, c = p.shape.c, m = p.m;
  const T* x = static_cast<const T*>(p.x);
  const S *fc1 = static_cast<const S*>(p.fc1), *fc2 = static_cast<const S*>(p.fc2);
  const S *bias1 = static_cast<const S*>(p.bias1), *bias2 = static_cast<const S*>(p.bias2);
  S *mean = static_cast<S*>(p.mean), *z1 = static_cast<S*>(p.z1), *z2 = static_cast<S*>(p.z2);
  const Scratch<S> gate(n * c, Fill::kNothing), hidden(n * m, Fill::kNothing);
  const double share = 1.0 / static_cast<double>(p.shape.hw);
  run<S>(
      p.shape, images, fc1 == nullptr ? c * c : 2 * c * m,
      [&](double* sums, int64_t sample, int64_t part) {
        images.template sum<false>(x, nullptr, sums, sample, part);
      },
      [&](double* sums, int64_t sample) {
        images.merge(sums);
        for (int64_t j = 0; j < c; ++j) mean[sample * c + j] = static_cast<S>(sums[j] * share);
      },
      [&](const Products<S>& products) {
        if (fc1 == nullptr) {
          products.by_rows(fc2, bias2, mean, z2, c, c);
        } else {
          products.by_rows(fc1, bias1, mean, z1, m, c);
          products.each(m, [&](int64_t i, int64_t count) {
            Vec<S> values[] = {load(z1 + i, count)};
            called_act_fwd(p.act, values);
            store(hidden.get() + i, values[0], count);
          });
          products.by_rows(fc2, bias2, hidden.get(), z2, c, m);
        }
        products.each(c, [&](int64_t i, int64_t count) {
          Vec<S> values[] = {load(z2 + i, count)};
          gate_fwd(p.gate, values);
          store(gate.get() + i, values[0], count);
        });
      },
      [&](double*, int64_t sample, int64_t part) {
        images.template scale<false>(x, static_cast<T*>(p.y), gate.get() + sample * c, nullptr,
                                     sample, part);
      });
}

template <class T, class Images>
void bwd(const SqueezeExciteBwdParams& p) {
  using S = Acc<T>;
  const Images images(p.shape);
  const int64_t n = p.shape.n, c = p.shape.c, m = p.m;
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  const S *fc1 = static_cast<const S*>(p.fc1), *fc2 = static_cast<const S*>(p.fc2);
  const S *z1 = static_cast<const S*>(p.z1), *z2 = static_cast<const S*>(p.z2);
  S *dz1 = static_cast<S*>(p.dz1), *dz2 = static_cast<S*>(p.dz2);
  const Scratch<S> gate(n * c, Fill::kNothing), dmean(n * c, Fill::kNothing);
  run<S>(
      p.shape, images, fc1 == nullptr ? c * c : 2 * c * m,
      [&](double* sums, int64_t sample, int64_t part) {
        images.template sum<true>(x, dy, sums, sample, part);
      },
      [&](double* sums, int64_t sample) {
        images.merge(sums);
        for (int64_t j = 0; j < c; ++j) dz2[sample * c + j] = static_cast<S>(sums[j]);
      },
      [&](const Products<S>& products) {
        products.each(c, [&](int64_t i, int64_t count) {
          const Vec<S> z = load(z2 + i, count);
          Vec<S> values[] = {z};
          gate_fwd(p.gate, values);
          store(gate.get() + i, values[0], count);
          store(dz2 + i, gate_bwd(p.gate, load(dz2 + i, count), z), count);
        });
        if (fc1 == nullptr) return products.by_columns(fc2, dz2, dmean.get(), c, c);
        products.by_columns(fc2, dz2, dz1, c, m);
        products.each(m, [&](int64_t i, int64_t count) {
          Vec<S> values[] = {load(dz1 + i, count)};
          const Vec<S> at[] = {load(z1 + i, count)};
          called_act_bwd(p.act, values, at);
          store(dz1 + i, values[0], count);
        });
        products.by_columns(fc1, dz1, dmean.get(), m, c);
      },
      [&](double*, int64_t sample, int64_t part) {
        images.template scale<true>(dy, static_cast<T*>(p.dx), gate.get() + sample * c,
                                    dmean.get() + sample * c, sample, part);
      });
}

}  // namespace

void squeeze_excite_fwd_cpu(const SqueezeExciteFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? fwd<T, RowImages<T>>(p) : fwd<T, PlaneImages<T>>(p);
  });
}

void squeeze_excite_bwd_cpu(const SqueezeExciteBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? bwd<T, RowImages<T>>(p) : bwd<T, PlaneImages<T>>(p);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
