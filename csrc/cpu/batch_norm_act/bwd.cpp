// batch_norm_act on the CPU, backward.
//
// Data movement, T = one pass over the tensor: the reductions read dy, x (and what was saved where
// a residual was added, then writing dresidual); dx reads dy (or dresidual) and x and writes dx:
// 5T, and 7T with a residual. NCHW: a task is a channel, whose second read comes from the cache
// where it fits. All sums have an order that depends on the shape alone.
// Of a concatenation x is read, and dx written, in its pieces: no pass more.
#include "cpu/batch_norm_act/coefficients.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// Everything the backward reads and writes, offset to one span.
template <class T>
struct BwdSpan {
  const T *dy, *x, *saved;
  T *dx, *dresidual;
  int64_t x_stride;  // from row to row of a piece; of the others: stride

  BwdSpan(const BatchNormActBwdParams& p, int64_t offset, const BatchNormPiece& piece,
          int64_t x_offset, int64_t x_stride)
      : dy(static_cast<const T*>(p.dy) + offset),
        x(static_cast<const T*>(piece.x) + x_offset),
        saved(at(static_cast<const T*>(p.saved), offset)),
        dx(at(static_cast<T*>(piece.dx), x_offset)),
        dresidual(at(static_cast<T*>(p.dresidual), offset)),
        x_stride(x_stride) {}
};

// dz = dy * act'(z): what it is made from. z is recomputed exactly as the forward made it; where a
// residual was added, with the saved residual, or y is read in place of z.
enum class Z { kUnused, kOfX, kWithSaved };  // what dz is made from, beside dy

template <class T, class A, Z kZ>
inline __attribute__((always_inline)) void read_z(const BwdSpan<T>& s, A act, int64_t o,
                                                  int64_t count, Vec<Acc<T>> z_of_x,
                                                  Vec<Acc<T>>& dy, Vec<Acc<T>>& z) {
  dy = load(s.dy + o, count);
  z = z_of_x;
  if constexpr (kZ == Z::kWithSaved) {
    const Vec<Acc<T>> saved = load(s.saved + o, count);
    z = act.derivative_needs_only_y() ? saved : z + saved;
  }
}

// reduce_rows, which also writes dz where the residual's gradient is wanted. For a plane the lanes
// are added up once a task and not once a plane.
template <class T, class A, Z kZ, bool kArray, bool kPiece>
void reduce_span(BwdSpan<T> s, int64_t rows, int64_t stride, int64_t length,
                 const BatchNormCoefficients<Acc<T>>& k, int64_t j, Acc<T>* sum_dz,
                 Acc<T>* sum_dzx) {
  using S = Acc<T>;
  const A act(k.act);
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j};
  reduce_rows<T, A, kArray, kPiece>(
      s.x, s.x_stride, rows, stride, length, mean, scale, bias, sum_dz, sum_dzx,
      [&](int64_t o, int64_t count, Vec<S> z_of_x, Vec<S> & dy, Vec<S> & z)
          __attribute__((always_inline)) {
            prefetch_row<kArray>(s.dy + o, stride);
            prefetch_row<kArray && kZ == Z::kWithSaved>(s.saved + o, stride);
            read_z<T, A, kZ>(s, act, o, count, z_of_x, dy, z);
          },
      [&]<int kRows>(int64_t o, int64_t count, Vec<S>(&dz)[kRows], const Vec<S>(&z)[kRows])
          __attribute__((always_inline)) {
            if constexpr (kZ != Z::kUnused) act.bwd(dz, z);
            if (s.dresidual == nullptr) return;
#pragma GCC unroll 4
            for (int u = 0; u < kRows; ++u) store(s.dresidual + o + u * stride, dz[u], count);
          });
}

// dx = scale * (dz - shift - (x - mean) * slope); with fixed statistics dx = scale * dz. of_dy: the
// activation, or kNone where dy is dz already.
template <class T, class A, Z kZ, bool kArray, bool kPiece>
void dx_span(BwdSpan<T> s, int64_t rows, int64_t stride, int64_t length,
             const BatchNormCoefficients<Acc<T>>& k, int64_t j, Act of_dy, bool training) {
  using S = Acc<T>;
  const int64_t apart = kPiece ? s.x_stride : stride;  // rows of x and dx
  const bool past_caches = k.past_caches && can_store_past_caches(s.dx, apart);
  const A act(of_dy);
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j}, shift{k.shift.get() + j}, slope{k.slope.get() + j};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), sc = scale.at(i), b = bias.at(i);
        const Vec<S> sh = shift.at(i), sl = slope.at(i);
        for_each_call<A>(
            block, [&](int first, auto calls) __attribute__((always_inline)) {
              Vec<S> centered[calls.value], dz[calls.value], z[calls.value];
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                const int64_t o = (row + first + u) * stride + i;
                const T* x_at = s.x + (row + first + u) * apart + i;
                prefetch_row<kArray>(x_at, apart);
                prefetch_row<kArray>(s.dy + o, stride);
                centered[u] = load(x_at, count) - m;
                read_z<T, A, kZ>(s, act, o, count, centered[u] * sc + b, dz[u], z[u]);
              }
              if constexpr (kZ != Z::kUnused) act.bwd(dz, z);
#pragma GCC unroll 4
              for (int u = 0; u < calls.value; ++u) {
                T* dx_at = s.dx + (row + first + u) * apart + i;
                if (training) dz[u] -= sh + centered[u] * sl;
                if (past_caches && count == kLanes<S>) {
                  store_past_caches(dx_at, dz[u] * sc);
                } else {
                  store(dx_at, dz[u] * sc, count);
                }
              }
            });
      });
  if (past_caches) fence_stores();
}

template <class T>
using ReduceFn = void (*)(BwdSpan<T> s, int64_t rows, int64_t stride, int64_t length,
                          const BatchNormCoefficients<Acc<T>>& k, int64_t j, Acc<T>* sum_dz,
                          Acc<T>* sum_dzx);
template <class T>
using DxFn = void (*)(BwdSpan<T> s, int64_t rows, int64_t stride, int64_t length,
                      const BatchNormCoefficients<Acc<T>>& k, int64_t j, Act of_dy, bool training);

// The two loops of one call, chosen once. Where the first one has written dz into dresidual, the
// second one reads it there instead of dy.
template <class T, bool kArray>
struct BwdLoops {
  ReduceFn<T> reduce;
  DxFn<T> dx;
  Act of_dy;
  bool training;

  explicit BwdLoops(const BatchNormActBwdParams& p)
      : of_dy(p.dresidual != nullptr ? Act::kNone : p.act), training(p.training) {
    dispatch_bool(kArray && p.pieces != nullptr, [&](auto piece) {
      constexpr bool kPiece = kArray && decltype(piece)::value;
      dispatch_z(p.act, p.saved != nullptr,
                 [&]<class A, Z kZ>() { reduce = reduce_span<T, A, kZ, kArray, kPiece>; });
      dispatch_z(of_dy, p.saved != nullptr,
                 [&]<class A, Z kZ>() { dx = dx_span<T, A, kZ, kArray, kPiece>; });
    });
  }

  // Calls body<A, kZ>(). Without an activation there is one loop, whatever was saved.
  template <class Body>
  static void dispatch_z(Act act, bool saved, Body body) {
    if (act == Act::kNone) return body.template operator()<InlineAct<Act::kNone>, Z::kUnused>();
    dispatch_act<Acc<T>>(act, [&](auto tag) {
      using A = typename decltype(tag)::type;
      saved ? body.template operator()<A, Z::kWithSaved>() : body.template operator()<A, Z::kOfX>();
    });
  }

  void run_dx(BwdSpan<T> s, int64_t rows, int64_t stride, int64_t length,
              const BatchNormCoefficients<Acc<T>>& k, int64_t j) const {
    if (s.dresidual != nullptr) s.dy = s.dresidual;
    dx(s, rows, stride, length, k, j, of_dy, training);
  }
};

// From the sums of channel j to its parameters' gradients and to dx's coefficients; or from the
// gradients of all ranks to the latter.
template <class S>
void finalize_channel(const BatchNormActBwdParams& p, BatchNormCoefficients<S>& k, int64_t j,
                      double sum_dz, double sum_dzx) {
  const double rstd = rstd_of(static_cast<const S*>(p.var)[j], p.eps);
  S *dweight = static_cast<S*>(p.dweight) + j, *dbias = static_cast<S*>(p.dbias) + j;
  double count = static_cast<double>(p.shape.per_channel()),
         sum_dzxhat = sum_of_dzxhat(sum_dz, sum_dzx, rstd);
  if (p.total == nullptr) {
    *dbias = static_cast<S>(sum_dz);
    *dweight = static_cast<S>(sum_dzxhat);
  } else {
    count = static_cast<double>(*static_cast<const S*>(p.total));
    sum_dz = static_cast<double>(*dbias);
    sum_dzxhat = static_cast<double>(*dweight);
  }
  for (int64_t i = j; i < k.c * k.repeat; i += k.c) {
    k.shift[i] = static_cast<S>(sum_dz / count);
    k.slope[i] = static_cast<S>(sum_dzxhat * rstd / count);
  }
}

// ---- the two layouts ---------------------------------------------------------------------------

template <class T>
void bwd_channels_last(const BatchNormActBwdParams& p) {
  using S = Acc<T>;
  const BwdLoops<T, true> loops(p);
  const Pieces pieces(p);
  const WideRows w = pieces.rows(p.shape, sizeof(T), kLanes<S>);
  BatchNormCoefficients<S> k(w.c, w.repeat, p.act, p.shape.numel() * sizeof(T));
  const auto set = [&](int64_t j) { k.set(p, j); };
  parallel_for(w.c, kSetGrain, set);
  const int64_t slots = w.tasks + 1;  // the last one for the rest
  // Whole vectors, and another one: a piece's last vector may end behind it, with zeros.
  const int64_t columns = (ceil_div(w.wide, kLanes<S>) + 1) * kLanes<S>;
  Scratch<double> sum_dz(slots * columns), sum_dzx(slots * columns);
  const auto span = [&](const BatchNormPiece& piece, int64_t row) {
    const int64_t wide = piece.c * w.repeat;
    return BwdSpan<T>(p, row * w.wide + piece.first, piece, row * wide, wide);
  };
  const auto reduce = [&](int64_t slot, int64_t first, int64_t last, int64_t length) {
    if (p.total != nullptr) return;
    Scratch<S> of_rows(2 * columns, Fill::kNothing);
    S *dz = of_rows.get(), *dzx = dz + columns;
    const auto add = [&](const BatchNormPiece& piece, int64_t row, int64_t rows) {
      const BwdSpan<T> s = span(piece, row);
      loops.reduce(s, rows, w.wide, min(s.x_stride, length), k, piece.first, dz + piece.first,
                   dzx + piece.first);
    };
    for (int64_t row = first; row < last; row += kSumRows) {
      for_each_vector<S>(2 * columns, [&](int64_t i, int64_t) { store(dz + i, Vec<S>{}); });
      pieces.for_rows(row, min(kSumRows, last - row), add);
      add_in_double(sum_dz.get() + slot * columns, dz, columns);
      add_in_double(sum_dzx.get() + slot * columns, dzx, columns);
    }
  };
  const auto reduce_rows = [&](int64_t task) { reduce(task, w.first(task), w.last(task), w.wide); };
  parallel_for(w.tasks, w.grain, reduce_rows);
  reduce(w.tasks, w.rows, w.rows + 1, w.rest);
  for_each_channels<S>(w.c, slots * w.wide, [&](int64_t j, int64_t count) {
    double dz[kLanes<S>] = {}, dzx[kLanes<S>] = {};
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t i = slot * columns + j; i < slot * columns + w.wide; i += w.c) {
        for (int64_t l = 0; l < count; ++l) {
          dz[l] += sum_dz[i + l];
          dzx[l] += sum_dzx[i + l];
        }
      }
    }
    for (int64_t l = 0; l < count; ++l) finalize_channel<S>(p, k, j + l, dz[l], dzx[l]);
  });
  const auto dx = [&](int64_t row, int64_t rows, int64_t length) {
    pieces.for_rows(row, rows, [&](const BatchNormPiece& piece, int64_t first, int64_t count) {
      const BwdSpan<T> s = span(piece, first);
      if (s.dx != nullptr) {
        loops.run_dx(s, count, w.wide, min(s.x_stride, length), k, piece.first);
      }
    });
  };
  const auto dx_rows = [&](int64_t task) {
    dx(w.first(task), w.last(task) - w.first(task), w.wide);
  };
  dx(w.rows, 1, w.rest);
  parallel_for_backwards(w.tasks, w.grain, dx_rows);
}

template <class T>
void bwd_planes(const BatchNormActBwdParams& p) {
  using S = Acc<T>;
  const BwdLoops<T, false> loops(p);
  const Pieces pieces(p);
  const Planes planes(p.shape, sizeof(T));
  BatchNormCoefficients<S> k(planes.c, 1, p.act, p.shape.numel() * sizeof(T));
  // Elements whose terms are added up in single precision, in a vector, before they go to doubles.
  constexpr int64_t kTerms = 1 << 13;
  const int64_t piece = min(planes.hw, kTerms), group = max(1, kTerms / planes.hw);
  Scratch<double> sum_dz(planes.tasks), sum_dzx(planes.tasks);
  const auto set = [&](int64_t j) { k.set(p, j); };
  const auto span = [&](int64_t image, int64_t j, int64_t begin) {
    const BatchNormPiece& piece = pieces.of_channel(j);
    const int64_t x_stride = piece.c * planes.hw;
    const int64_t x_offset = image * x_stride + (j - piece.first) * planes.hw + begin;
    return BwdSpan<T>(p, planes.offset(image, j) + begin, piece, x_offset, x_stride);
  };
  const auto reduce = [&](int64_t task) {
    if (p.total != nullptr) return;
    const int64_t j = planes.channel(task), last = planes.last(task);
    for (int64_t image = planes.first(task); image < last; image += group) {
      const int64_t images = min(group, last - image);
      for (int64_t begin = 0; begin < planes.hw; begin += piece) {
        S dz[kLanes<S>] = {}, dzx[kLanes<S>] = {};
        pieces.for_images(image, image + images, [&](int64_t first, int64_t count) {
          loops.reduce(span(first, j, begin), count, planes.stride(), min(piece, planes.hw - begin),
                       k, j, dz, dzx);
        });
        sum_dz[task] += static_cast<double>(horizontal_sum<S>(load(dz)));
        sum_dzx[task] += static_cast<double>(horizontal_sum<S>(load(dzx)));
      }
    }
  };
  const auto finalize = [&](int64_t j) {
    double total_dz = 0, total_dzx = 0;
    for (int64_t task = j * planes.parts; task < (j + 1) * planes.parts; ++task) {
      total_dz += sum_dz[task];
      total_dzx += sum_dzx[task];
    }
    finalize_channel<S>(p, k, j, total_dz, total_dzx);
  };
  const auto dx = [&](int64_t task) {
    const int64_t j = planes.channel(task);
    pieces.for_images(planes.first(task), planes.last(task), [&](int64_t image, int64_t images) {
      const BwdSpan<T> s = span(image, j, 0);
      if (s.dx != nullptr) loops.run_dx(s, images, planes.stride(), planes.hw, k, j);
    });
  };
  if (planes.parts == 1) {
    const auto all = [&](int64_t task) {
      set(task);
      reduce(task);
      finalize(task);
      dx(task);
    };
    return parallel_for(planes.tasks, planes.grain, all);
  }
  parallel_for(planes.c, 1, set);
  parallel_for(planes.tasks, planes.grain, reduce);
  parallel_for(planes.c, 1, finalize);
  parallel_for_backwards(planes.tasks, planes.grain, dx);
}

}  // namespace

void batch_norm_act_bwd_cpu(const BatchNormActBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? bwd_channels_last<T>(p) : bwd_planes<T>(p);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
