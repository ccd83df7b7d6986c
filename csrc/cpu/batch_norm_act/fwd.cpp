// batch_norm_act on the CPU, forward.
//
// Data movement, T = one pass over the tensor: statistics read x (1T); the normalisation reads x
// and residual, writes y (2T or 3T). NCHW: a task is a channel, whose second read comes from the
// cache where it fits. How the variance is computed: cpu/moments.h. All sums have an order that
// depends on the shape alone. Of a concatenation x is read in its pieces, in no pass more.
#include "cpu/batch_norm_act/coefficients.h"
#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// `rows` spans of `length` neighbouring elements, `stride` apart, those of a piece of x `x_stride`;
// j is the first channel. Whole tensors have loops without it, whose reads and
// writes share an index.
template <class T, class A, bool kAdd, bool kArray, bool kPiece>
void normalize(const T* x, const T* residual, T* y, int64_t rows, int64_t stride, int64_t length,
               const BatchNormCoefficients<Acc<T>>& k, int64_t j, int64_t x_stride) {
  using S = Acc<T>;
  const A act(k.act);
  const int64_t apart = kPiece ? x_stride : stride;  // rows of x
  const bool past_caches = k.past_caches && can_store_past_caches(y, stride);
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), s = scale.at(i), b = bias.at(i);
        for_each_call<A>(
            block, [&](int first, auto calls) __attribute__((always_inline)) {
              Vec<S> z[calls.value];
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * stride + i;
                const T* x_at = x + (row + first + u) * apart + i;
                prefetch_row<kArray>(x_at, apart);
                z[u] = (load(x_at, count) - m) * s + b;
                if constexpr (kAdd) {
                  prefetch_row<kArray>(residual + o, stride);
                  z[u] += load(residual + o, count);
                }
              }
              act.fwd(z);
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * stride + i;
                if (past_caches && count == kLanes<S>) {
                  store_past_caches(y + o, z[u]);
                } else {
                  store(y + o, z[u], count);
                }
              }
            });
      });
  if (past_caches) fence_stores();
}

template <class T>
using NormalizeFn = void (*)(const T* x, const T* residual, T* y, int64_t rows, int64_t stride,
                             int64_t length, const BatchNormCoefficients<Acc<T>>& k, int64_t j,
                             int64_t x_stride);

template <class T, bool kArray, bool kPiece>
NormalizeFn<T> pick_normalize(const BatchNormActFwdParams& p) {
  return dispatch_act<Acc<T>>(p.act, [&](auto tag) {
    return dispatch_bool(p.residual != nullptr, [&](auto add) -> NormalizeFn<T> {
      return normalize<T, typename decltype(tag)::type, add.value, kArray, kPiece>;
    });
  });
}

// ---- the two layouts ---------------------------------------------------------------------------

template <class T>
void apply_channels_last(const BatchNormActFwdParams& p, const Pieces& pieces) {
  using S = Acc<T>;
  const NormalizeFn<T> normalize_span =
      p.pieces == nullptr ? pick_normalize<T, true, false>(p) : pick_normalize<T, true, true>(p);
  const WideRows w = pieces.rows(p.shape, sizeof(T), kLanes<S>);
  BatchNormCoefficients<S> k(w.c, w.repeat, p.act, p.shape.numel() * sizeof(T));
  const auto set = [&](int64_t j) { k.set(p, j); };
  parallel_for(w.c, kSetGrain, set);
  const auto span = [&](int64_t row, int64_t rows, int64_t length) {
    pieces.for_rows(row, rows, [&](const BatchNormPiece& piece, int64_t first, int64_t count) {
      const int64_t wide = piece.c * w.repeat, o = first * w.wide + piece.first;
      normalize_span(static_cast<const T*>(piece.x) + first * wide,
                     at(static_cast<const T*>(p.residual), o), static_cast<T*>(p.y) + o, count,
                     w.wide, min(wide, length), k, piece.first, wide);
    });
  };
  const auto rows = [&](int64_t task) {
    span(w.first(task), w.last(task) - w.first(task), w.wide);
  };
  span(w.rows, 1, w.rest);
  parallel_for_backwards(w.tasks, w.grain, rows);
}

template <class T>
void fwd_planes(const BatchNormActFwdParams& p, const Pieces& pieces, bool training) {
  using S = Acc<T>;
  const NormalizeFn<T> normalize_span = pick_normalize<T, false, false>(p);
  const Planes planes(p.shape, sizeof(T));
  BatchNormCoefficients<S> k(planes.c, 1, p.act, p.shape.numel() * sizeof(T));
  Scratch<Moments<S>> moments(planes.tasks);
  const auto plane = [&](const BatchNormPiece& piece, int64_t j) {
    return static_cast<const T*>(piece.x) + (j - piece.first) * planes.hw;
  };
  const auto stats = [&](int64_t task) {
    const int64_t j = planes.channel(task);
    const BatchNormPiece& piece = pieces.of_channel(j);
    moments[task] = plane_moments(plane(piece, j), piece.c * planes.hw, planes, task);
  };
  const auto merge = [&](int64_t j) {
    if (training) {
      Moments<S> total;
      for (int64_t task = j * planes.parts; task < (j + 1) * planes.parts; ++task) {
        total.merge(moments[task].count, moments[task].mean, moments[task].m2);
      }
      total.write(static_cast<S*>(p.mean) + j, static_cast<S*>(p.var) + j);
    }
    k.set(p, j);
  };
  const auto apply = [&](int64_t task) {
    if (p.y == nullptr) return;
    const int64_t j = planes.channel(task);
    const BatchNormPiece& piece = pieces.of_channel(j);
    pieces.for_images(planes.first(task), planes.last(task), [&](int64_t image, int64_t images) {
      const int64_t o = planes.offset(image, j);
      normalize_span(plane(piece, j) + image * piece.c * planes.hw,
                     at(static_cast<const T*>(p.residual), o), static_cast<T*>(p.y) + o, images,
                     planes.stride(), planes.hw, k, j, 0);
    });
  };
  if (planes.parts == 1) {  // the whole channel in one go: the second read finds it in the cache
    const auto all = [&](int64_t task) {
      if (training) stats(task);
      merge(task);
      apply(task);
    };
    return parallel_for(planes.tasks, planes.grain, all);
  }
  if (training) parallel_for(planes.tasks, planes.grain, stats);
  parallel_for(planes.c, 1, merge);
  parallel_for_backwards(planes.tasks, planes.grain, apply);
}

void fwd(const BatchNormActFwdParams& p, bool training) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const Pieces pieces(p);
    if (!p.shape.channels_last) return fwd_planes<T>(p, pieces, training);
    for (const BatchNormPiece& piece : pieces) {
      if (!training) break;
      const ImageShape shape{p.shape.n, piece.c, p.shape.hw, true};
      batch_moments(static_cast<const T*>(piece.x), WideRows(shape, sizeof(T), kLanes<Acc<T>>),
                    static_cast<Acc<T>*>(p.mean) + piece.first,
                    static_cast<Acc<T>*>(p.var) + piece.first);
    }
    if (p.y != nullptr) apply_channels_last<T>(p, pieces);
  });
}

}  // namespace

void batch_norm_act_fwd_cpu(const BatchNormActFwdParams& p) { fwd(p, true); }

void batch_norm_act_apply_cpu(const BatchNormActFwdParams& p) { fwd(p, false); }

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
