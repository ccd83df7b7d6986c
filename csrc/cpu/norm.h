// What the normalisations' CPU kernels share.
#pragma once

#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

template <class S>
inline S rstd_of(S var, double eps) {
  return S(1) / static_cast<S>(__builtin_sqrt(static_cast<double>(var) + eps));
}

// sum_dzx * rstd: of values beyond the type the sum may be infinite, and rstd is 0.
inline double sum_of_dzxhat(double sum_dz, double sum_dzx, double rstd) {
  return rstd == 0 ? sum_dz * 0 : sum_dzx * rstd;
}

// Rows of channels_last whose terms are added up one behind the other in the accumulate type. The
// sums of longer columns are merged in double: each of n terms could cost n / 2 roundings.
constexpr int64_t kSumRows = 256;

// to[i] += from[i] for whole vectors.
template <class S>
inline void add_in_double(double* to, const S* from, int64_t length) {
  for_each_vector<S>(length, [&](int64_t i, int64_t) {
    Wide<S> total;
    std::memcpy(&total, to + i, sizeof total);
    total += widen<S>(load(from + i));
    std::memcpy(to + i, &total, sizeof total);
  });
}

// Adds sum(dz) and sum(dz * (x - mean)) to the columns' accumulators, or for a plane to one vector
// each. read(offset, count, (x - mean) * scale + bias, dz, z) sets dy and z of one row, for which
// finish(offset, count, dz, z) makes dz of all rows of a block, `stride` apart, those of a
// piece of x `x_stride`. The lanes beyond a span's end must have dz = 0 and add nothing.
template <class T, class A, bool kArray, bool kPiece, class Read, class Finish>
inline __attribute__((always_inline)) void reduce_rows(
    const T* x, int64_t x_stride, int64_t rows, int64_t stride, int64_t length,
    PerChannel<Acc<T>, kArray> mean, PerChannel<Acc<T>, kArray> scale,
    PerChannel<Acc<T>, kArray> bias, Acc<T>* sum_dz, Acc<T>* sum_dzx, Read read, Finish finish) {
  using S = Acc<T>;
  const int64_t apart = kPiece ? x_stride : stride;  // rows of x
  Vec<S> total_dz = load(sum_dz), total_dzx = load(sum_dzx);
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), s = scale.at(i), b = bias.at(i);
        if constexpr (kArray) {
          total_dz = load(sum_dz + i);
          total_dzx = load(sum_dzx + i);
        }
        for_each_call<A>(
            block, [&](int first, auto calls) __attribute__((always_inline)) {
              Vec<S> centered[calls.value], dz[calls.value], z[calls.value];
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * stride + i;
                const T* x_at = x + (row + first + u) * apart + i;
                prefetch_row<kArray>(x_at, apart);
                centered[u] = load(x_at, count) - m;
                read(o, count, centered[u] * s + b, dz[u], z[u]);
              }
              finish((row + first) * stride + i, count, dz, z);
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                total_dz += dz[u];
                total_dzx += dz[u] * centered[u];
              }
            });
        if constexpr (kArray) {
          store(sum_dz + i, total_dz);
          store(sum_dzx + i, total_dzx);
        }
      });
  if constexpr (!kArray) {
    store(sum_dz, total_dz);
    store(sum_dzx, total_dzx);
  }
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
