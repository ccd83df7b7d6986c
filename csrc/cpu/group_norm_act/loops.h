// The loops of group_norm_act's CPU kernels, and the numbers they read.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"
#include "cpu/units.h"
#include "group_norm_act.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// What the loops know of the channels: arrays in step with a span (channels_last), or a number each
// (a part of a plane).
template <class S>
struct GroupNormCoefficients {
  Act act;
  S *mean, *scale, *bias;  // z = (x - mean) * scale + bias
  S *shift, *slope;        // dx = scale * dz - (shift + (x - mean) * slope)
};

// `rows` spans of `length` neighbouring elements, one behind the other.
template <class T, class A, bool kArray>
void normalize(const T* x, T* y, int64_t rows, int64_t length, GroupNormCoefficients<Acc<T>> k) {
  using S = Acc<T>;
  const A act(k.act);
  const PerChannel<S, kArray> mean{k.mean}, scale{k.scale}, bias{k.bias};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), s = scale.at(i), b = bias.at(i);
        for_each_call<A>(
            block, [&](int first, auto calls) __attribute__((always_inline)) {
              Vec<S> z[calls.value];
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * length + i;
                prefetch_row<kArray>(x + o, length);
                z[u] = (load(x + o, count) - m) * s + b;
              }
              act.fwd(z);
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u)
                store(y + (row + first + u) * length + i, z[u], count);
            });
      });
}

// reduce_rows; dz comes from z, recomputed exactly as the forward made it.
template <class T, class A, bool kArray>
void reduce(const T* dy, const T* x, int64_t rows, int64_t length, GroupNormCoefficients<Acc<T>> k,
            Acc<T>* sum_dz, Acc<T>* sum_dzx) {
  using S = Acc<T>;
  const A act(k.act);
  reduce_rows<T, A, kArray, false>(
      x, length, rows, length, length, PerChannel<S, kArray>{k.mean},
      PerChannel<S, kArray>{k.scale}, PerChannel<S, kArray>{k.bias}, sum_dz, sum_dzx,
      [&](int64_t o, int64_t count, Vec<S> z_of_x, Vec<S> & dy_of_o, Vec<S> & z)
          __attribute__((always_inline)) {
            prefetch_row<kArray>(dy + o, length);
            dy_of_o = load(dy + o, count);
            z = z_of_x;
          },
      [&](int64_t, int64_t, auto& dz, const auto& z)
          __attribute__((always_inline)) { act.bwd(dz, z); });
}

template <class T, class A, bool kArray>
void grad_x(const T* dy, const T* x, T* dx, int64_t rows, int64_t length,
            GroupNormCoefficients<Acc<T>> k) {
  using S = Acc<T>;
  const A act(k.act);
  const PerChannel<S, kArray> mean{k.mean}, scale{k.scale}, bias{k.bias};
  const PerChannel<S, kArray> shift{k.shift}, slope{k.slope};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), s = scale.at(i), b = bias.at(i);
        const Vec<S> sh = shift.at(i), sl = slope.at(i);
        for_each_call<A>(
            block, [&](int first, auto calls) __attribute__((always_inline)) {
              Vec<S> centered[calls.value], dz[calls.value], z[calls.value];
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * length + i;
                prefetch_row<kArray>(x + o, length);
                prefetch_row<kArray>(dy + o, length);
                centered[u] = load(x + o, count) - m;
                dz[u] = load(dy + o, count);
                z[u] = centered[u] * s + b;
              }
              act.bwd(dz, z);
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * length + i;
                store(dx + o, dz[u] * s - (sh + centered[u] * sl), count);
              }
            });
      });
}

// The loops of one call, chosen once.
template <class T, bool kArray>
struct Loops {
  void (*normalize)(const T*, T*, int64_t, int64_t, GroupNormCoefficients<Acc<T>>);
  void (*reduce)(const T*, const T*, int64_t, int64_t, GroupNormCoefficients<Acc<T>>, Acc<T>*,
                 Acc<T>*);
  void (*grad_x)(const T*, const T*, T*, int64_t, int64_t, GroupNormCoefficients<Acc<T>>);

  explicit Loops(Act act) {
    dispatch_act<Acc<T>>(act, [&](auto tag) {
      using A = typename decltype(tag)::type;
      normalize = FASTCNN_CPU_LEVEL::normalize<T, A, kArray>;
      reduce = FASTCNN_CPU_LEVEL::reduce<T, A, kArray>;
      grad_x = FASTCNN_CPU_LEVEL::grad_x<T, A, kArray>;
    });
  }
};

// The numbers of a call's groups and channels.
template <class S>
struct Norm {
  int64_t c, groups, per_group;  // channels
  double count, eps;             // values a group
  const S *weight, *bias;
  S *mean, *var;

  template <class Params>
  explicit Norm(const Params& p)
      : c(p.shape.c),
        groups(p.groups),
        per_group(c / groups),
        count(static_cast<double>(per_group * p.shape.hw)),
        eps(p.eps),
        weight(static_cast<const S*>(p.weight)),
        bias(static_cast<const S*>(p.bias)),
        mean(static_cast<S*>(const_cast<void*>(p.mean))),
        var(static_cast<S*>(const_cast<void*>(p.var))) {}

  S weight_of(int64_t channel) const { return weight ? weight[channel] : S(1); }
  S bias_of(int64_t channel) const { return bias ? bias[channel] : S(0); }
  S rstd(int64_t statistic) const { return rstd_of(var[statistic], eps); }
};

// The sums of each sample's channels, and what becomes of them.
struct ChannelSums {
  Scratch<double> dz, dzx;  // [n, c]

  explicit ChannelSums(const ImageShape& shape) : dz(shape.n * shape.c), dzx(shape.n * shape.c) {}

  // The shift and slope of a group, whose statistic is n * groups + g.
  template <class S>
  void finalize(const Norm<S>& norm, int64_t statistic, S* shift, S* slope) const {
    const int64_t sample = statistic / norm.groups,
                  first = statistic % norm.groups * norm.per_group;
    double total_dz = 0, total_dzx = 0;
    for (int64_t j = first; j < first + norm.per_group; ++j) {
      total_dz += dz[sample * norm.c + j] * norm.weight_of(j);
      total_dzx += dzx[sample * norm.c + j] * norm.weight_of(j);
    }
    const double rstd = norm.rstd(statistic);
    *shift = static_cast<S>(total_dz * rstd / norm.count);
    *slope = static_cast<S>(sum_of_dzxhat(total_dz, total_dzx, rstd) * rstd * rstd / norm.count);
  }

  template <class S>
  void write(const Norm<S>& norm, const GroupNormActBwdParams& p) const {
    for (int64_t j = 0; j < norm.c; ++j) {
      double dweight = 0, dbias = 0;
      for (int64_t sample = 0; sample < p.shape.n; ++sample) {
        const double sum_dz = dz[sample * norm.c + j];
        dbias += sum_dz;
        dweight += sum_of_dzxhat(sum_dz, dzx[sample * norm.c + j],
                                 norm.rstd(sample * norm.groups + j / norm.per_group));
      }
      static_cast<S*>(p.dweight)[j] = static_cast<S>(dweight);
      static_cast<S*>(p.dbias)[j] = static_cast<S>(dbias);
    }
  }
};

}  // namespace
}  // namespace fastcnn::FASTCNN_CPU_LEVEL
