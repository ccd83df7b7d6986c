// batch_norm_act on the CPU.
//
// Data movement, T = one pass over the tensor:
//   forward   statistics read x (1T); the normalisation reads x and residual, writes y (2T or 3T).
//             NCHW: a task is a channel, whose second read comes from the cache where it fits.
//   backward  the reductions read dy, x (and y, then writing dresidual); dx reads dy (or dresidual)
//             and x: 5T, and 7T with a residual.
// How the variance is computed: common/moments.h.
// All sums have an order that depends on the shape alone.
#include "batch_norm_act.h"

#include "common/dispatch.h"
#include "common/moments.h"
#include "common/parallel.h"
#include "common/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

template <class S>
S rstd_of(S var, double eps) {
  return S(1) / static_cast<S>(__builtin_sqrt(static_cast<double>(var) + eps));
}

// The per-channel numbers of one call, repeated `repeat` times: value[r * c + j] belongs to channel
// j.
template <class S>
struct Coefficients {
  Scratch<S> mean, scale, bias;  // z = (x - mean) * scale + bias
  Scratch<S> shift, slope;       // dx = scale * (dz - shift - (x - mean) * slope)
  int64_t c, repeat;

  Coefficients(int64_t c, int64_t repeat)
      : mean(c * repeat),
        scale(c * repeat),
        bias(c * repeat),
        shift(c * repeat),
        slope(c * repeat),
        c(c),
        repeat(repeat) {}

  template <class Params>
  void set(const Params& p, int64_t j) {
    const S* weight = static_cast<const S*>(p.weight);
    const S* beta = static_cast<const S*>(p.bias);
    const S rstd = rstd_of(static_cast<const S*>(p.var)[j], p.eps);
    for (int64_t i = j; i < c * repeat; i += c) {
      mean[i] = static_cast<const S*>(p.mean)[j];
      scale[i] = weight ? weight[j] * rstd : rstd;
      bias[i] = beta ? beta[j] : S(0);
    }
  }
};

// `rows` spans of `length` neighbouring elements, one behind the other; j is the first channel.
template <class T, Act act, bool kArray>
void normalize(const T* x, const T* residual, T* y, int64_t rows, int64_t length,
               const Coefficients<Acc<T>>& k, int64_t j) {
  using S = Acc<T>;
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j};
  const auto run = [&](auto add) __attribute__((always_inline)) {
    for_each_block<S>(
        rows, length,
        [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
          const Vec<S> m = mean.at(i), s = scale.at(i), b = bias.at(i);
#pragma GCC unroll 4
          for (int u = 0; u < block.value; ++u) {
            const int64_t o = (row + u) * length + i;
            Vec<S> z = (load(x + o, count) - m) * s + b;
            if constexpr (add.value) z += load(residual + o, count);
            store(y + o, act_fwd<act>(z), count);
          }
        });
  };
  residual != nullptr ? run(BoolTag<true>{}) : run(BoolTag<false>{});
}

template <class T>
using NormalizeFn = void (*)(const T* x, const T* residual, T* y, int64_t rows, int64_t length,
                             const Coefficients<Acc<T>>& k, int64_t j);

template <class T, bool kArray>
NormalizeFn<T> pick_normalize(Act act) {
  return dispatch_act(
      act, [](auto tag) -> NormalizeFn<T> { return normalize<T, decltype(tag)::value, kArray>; });
}

// Pointers that may be null stay null.
template <class T>
T* at(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

// ---- backward ----------------------------------------------------------------------------------

// Everything the backward reads and writes, offset to one span.
template <class T>
struct BwdSpan {
  const T *dy, *x, *y;
  T *dx, *dresidual;

  BwdSpan(const BatchNormActBwdParams& p, int64_t offset)
      : dy(static_cast<const T*>(p.dy) + offset),
        x(static_cast<const T*>(p.x) + offset),
        y(at(static_cast<const T*>(p.y), offset)),
        dx(static_cast<T*>(p.dx) + offset),
        dresidual(at(static_cast<T*>(p.dresidual), offset)) {}
};

// dz = dy * act'(z), with z read off y or rebuilt exactly as the forward made it.
template <class T, Act act, bool kFromY>
inline __attribute__((always_inline)) Vec<Acc<T>> grad_z(const BwdSpan<T>& s, int64_t o,
                                                         int64_t count, Vec<Acc<T>> centered,
                                                         Vec<Acc<T>> scale, Vec<Acc<T>> bias) {
  const Vec<Acc<T>> dy = load(s.dy + o, count);
  if constexpr (act == Act::kNone) {
    return dy;
  } else if constexpr (kFromY) {
    return act_bwd<act>(dy, load(s.y + o, count));
  } else {
    return act_bwd<act>(dy, centered * scale + bias);
  }
}

// Adds sum(dz) and sum(dz * (x - mean)) to the columns' accumulators, or for a plane to one vector
// each, whose lanes are added up once a task and not once a plane. Writes dz where the residual's
// gradient is wanted. The lanes beyond a span's end have dy = 0 and add nothing.
template <class T, Act act, bool kFromY, bool kArray>
void reduce_span(BwdSpan<T> s, int64_t rows, int64_t length, const Coefficients<Acc<T>>& k,
                 int64_t j, Acc<T>* sum_dz, Acc<T>* sum_dzx) {
  using S = Acc<T>;
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j};
  Vec<S> total_dz = load(sum_dz), total_dzx = load(sum_dzx);
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), sc = scale.at(i), b = bias.at(i);
        if constexpr (kArray) {
          total_dz = load(sum_dz + i);
          total_dzx = load(sum_dzx + i);
        }
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const int64_t o = (row + u) * length + i;
          const Vec<S> centered = load(s.x + o, count) - m;
          const Vec<S> dz = grad_z<T, act, kFromY>(s, o, count, centered, sc, b);
          if (s.dresidual != nullptr) store(s.dresidual + o, dz, count);
          total_dz += dz;
          total_dzx += dz * centered;
        }
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

// dx = scale * (dz - shift - (x - mean) * slope); with fixed statistics dx = scale * dz.
template <class T, Act act, bool kFromY, bool kArray, bool kTraining>
void dx_span(BwdSpan<T> s, int64_t rows, int64_t length, const Coefficients<Acc<T>>& k, int64_t j) {
  using S = Acc<T>;
  const PerChannel<S, kArray> mean{k.mean.get() + j}, scale{k.scale.get() + j},
      bias{k.bias.get() + j}, shift{k.shift.get() + j}, slope{k.slope.get() + j};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> m = mean.at(i), sc = scale.at(i), b = bias.at(i);
        const Vec<S> sh = shift.at(i), sl = slope.at(i);
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          const int64_t o = (row + u) * length + i;
          const Vec<S> centered = load(s.x + o, count) - m;
          Vec<S> dz = grad_z<T, act, kFromY>(s, o, count, centered, sc, b);
          if constexpr (kTraining) dz -= sh + centered * sl;
          store(s.dx + o, dz * sc, count);
        }
      });
}

template <class T>
using ReduceFn = void (*)(BwdSpan<T> s, int64_t rows, int64_t length, const Coefficients<Acc<T>>& k,
                          int64_t j, Acc<T>* sum_dz, Acc<T>* sum_dzx);
template <class T>
using DxFn = void (*)(BwdSpan<T> s, int64_t rows, int64_t length, const Coefficients<Acc<T>>& k,
                      int64_t j);

// The two loops of one call, chosen once. Where the first one has written dz into dresidual, the
// second one reads it there instead of dy.
template <class T, bool kArray>
struct BwdLoops {
  ReduceFn<T> reduce;
  DxFn<T> dx;

  explicit BwdLoops(const BatchNormActBwdParams& p) {
    const bool from_y = p.y != nullptr && p.act != Act::kNone;
    reduce = dispatch_act(p.act, [&](auto act) {
      return dispatch_bool(from_y, [&](auto y) -> ReduceFn<T> {
        return reduce_span<T, decltype(act)::value, decltype(y)::value, kArray>;
      });
    });
    const bool has_dz = p.dresidual != nullptr;
    dx = dispatch_act(has_dz ? Act::kNone : p.act, [&](auto act) {
      return dispatch_bool(from_y && !has_dz, [&](auto y) {
        return dispatch_bool(p.training, [&](auto training) -> DxFn<T> {
          return dx_span<T, decltype(act)::value, decltype(y)::value, kArray,
                         decltype(training)::value>;
        });
      });
    });
  }

  void run_dx(BwdSpan<T> s, int64_t rows, int64_t length, const Coefficients<Acc<T>>& k,
              int64_t j) const {
    if (s.dresidual != nullptr) s.dy = s.dresidual;
    dx(s, rows, length, k, j);
  }
};

// From the sums of channel j to its parameters' gradients and to dx's coefficients.
template <class S>
void finish_channel(const BatchNormActBwdParams& p, Coefficients<S>& k, int64_t j, double sum_dz,
                    double sum_dzx) {
  const double rstd = rstd_of(static_cast<const S*>(p.var)[j], p.eps);
  const double count = static_cast<double>(p.shape.per_channel());
  static_cast<S*>(p.dbias)[j] = static_cast<S>(sum_dz);
  static_cast<S*>(p.dweight)[j] = static_cast<S>(sum_dzx * rstd);
  for (int64_t i = j; i < k.c * k.repeat; i += k.c) {
    k.shift[i] = static_cast<S>(sum_dz / count);
    k.slope[i] = static_cast<S>(sum_dzx * rstd * rstd / count);
  }
}

// ---- the two layouts ---------------------------------------------------------------------------

template <class T>
void apply_channels_last(const BatchNormActFwdParams& p, const WideRows& w) {
  using S = Acc<T>;
  const NormalizeFn<T> normalize_span = pick_normalize<T, true>(p.act);
  Coefficients<S> k(w.c, w.repeat);
  for (int64_t j = 0; j < w.c; ++j) k.set(p, j);
  const auto span = [&](int64_t row, int64_t rows, int64_t length) {
    const int64_t o = row * w.wide;
    normalize_span(static_cast<const T*>(p.x) + o, at(static_cast<const T*>(p.residual), o),
                   static_cast<T*>(p.y) + o, rows, length, k, 0);
  };
  const auto rows = [&](int64_t task) {
    span(w.first(task), w.last(task) - w.first(task), w.wide);
  };
  parallel_for(w.tasks, w.grain, rows);
  span(w.rows, 1, w.rest);
}

template <class T>
void fwd_planes(const BatchNormActFwdParams& p, const Planes& planes, bool training) {
  using S = Acc<T>;
  const NormalizeFn<T> normalize_span = pick_normalize<T, false>(p.act);
  const T* x = static_cast<const T*>(p.x);
  Coefficients<S> k(planes.c, 1);
  Scratch<Moments<S>> moments(planes.tasks);
  const auto stats = [&](int64_t task) { moments[task] = plane_moments(x, planes, task); };
  const auto join = [&](int64_t j) {
    if (training) {
      Moments<S> total;
      for (int64_t task = j * planes.parts; task < (j + 1) * planes.parts; ++task) {
        total.join(moments[task].count, moments[task].mean, moments[task].m2);
      }
      total.write(static_cast<S*>(p.mean) + j, static_cast<S*>(p.var) + j);
    }
    k.set(p, j);
  };
  const auto apply = [&](int64_t task) {
    const int64_t j = planes.channel(task);
    for (int64_t image = planes.first(task); image < planes.last(task); ++image) {
      const int64_t o = planes.offset(image, j);
      normalize_span(x + o, at(static_cast<const T*>(p.residual), o), static_cast<T*>(p.y) + o, 1,
                     planes.hw, k, j);
    }
  };
  if (planes.parts == 1) {  // the whole channel in one go: the second read finds it in the cache
    const auto all = [&](int64_t task) {
      if (training) stats(task);
      join(task);
      apply(task);
    };
    return parallel_for(planes.tasks, planes.grain, all);
  }
  if (training) parallel_for(planes.tasks, planes.grain, stats);
  parallel_for(planes.c, 1, join);
  parallel_for(planes.tasks, planes.grain, apply);
}

template <class T>
void bwd_channels_last(const BatchNormActBwdParams& p) {
  using S = Acc<T>;
  const BwdLoops<T, true> loops(p);
  const WideRows w(p.shape, sizeof(T), kLanes<S>);
  Coefficients<S> k(w.c, w.repeat);
  for (int64_t j = 0; j < w.c; ++j) k.set(p, j);
  const int64_t slots = w.tasks + 1;  // the last one for the rest
  Scratch<S> sum_dz(slots * w.wide), sum_dzx(slots * w.wide);
  const auto reduce = [&](int64_t slot, int64_t row, int64_t rows, int64_t length) {
    loops.reduce(BwdSpan<T>(p, row * w.wide), rows, length, k, 0, sum_dz.get() + slot * w.wide,
                 sum_dzx.get() + slot * w.wide);
  };
  const auto reduce_rows = [&](int64_t task) {
    reduce(task, w.first(task), w.last(task) - w.first(task), w.wide);
  };
  parallel_for(w.tasks, w.grain, reduce_rows);
  reduce(w.tasks, w.rows, 1, w.rest);
  Scratch<double> total_dz(w.c), total_dzx(w.c);
  for (int64_t i = 0; i < slots * w.wide; i += w.c) {
    for (int64_t j = 0; j < w.c; ++j) {
      total_dz[j] += static_cast<double>(sum_dz[i + j]);
      total_dzx[j] += static_cast<double>(sum_dzx[i + j]);
    }
  }
  for (int64_t j = 0; j < w.c; ++j) finish_channel<S>(p, k, j, total_dz[j], total_dzx[j]);
  const auto dx = [&](int64_t row, int64_t rows, int64_t length) {
    loops.run_dx(BwdSpan<T>(p, row * w.wide), rows, length, k, 0);
  };
  const auto dx_rows = [&](int64_t task) {
    dx(w.first(task), w.last(task) - w.first(task), w.wide);
  };
  parallel_for(w.tasks, w.grain, dx_rows);
  dx(w.rows, 1, w.rest);
}

template <class T>
void bwd_planes(const BatchNormActBwdParams& p) {
  using S = Acc<T>;
  const BwdLoops<T, false> loops(p);
  const Planes planes(p.shape, sizeof(T));
  Coefficients<S> k(planes.c, 1);
  constexpr int64_t kLane = kLanes<S>;
  Scratch<S> sum_dz(planes.tasks * kLane), sum_dzx(planes.tasks * kLane);
  const auto set = [&](int64_t j) { k.set(p, j); };
  const auto reduce = [&](int64_t task) {
    const int64_t j = planes.channel(task);
    for (int64_t image = planes.first(task); image < planes.last(task); ++image) {
      loops.reduce(BwdSpan<T>(p, planes.offset(image, j)), 1, planes.hw, k, j,
                   sum_dz.get() + task * kLane, sum_dzx.get() + task * kLane);
    }
  };
  const auto finish = [&](int64_t j) {
    double total_dz = 0, total_dzx = 0;
    const int64_t lanes = planes.parts * kLane;  // of the channel's tasks, side by side
    for (int64_t i = j * lanes; i < (j + 1) * lanes; ++i) {
      total_dz += static_cast<double>(sum_dz[i]);
      total_dzx += static_cast<double>(sum_dzx[i]);
    }
    finish_channel<S>(p, k, j, total_dz, total_dzx);
  };
  const auto dx = [&](int64_t task) {
    const int64_t j = planes.channel(task);
    for (int64_t image = planes.first(task); image < planes.last(task); ++image) {
      loops.run_dx(BwdSpan<T>(p, planes.offset(image, j)), 1, planes.hw, k, j);
    }
  };
  if (planes.parts == 1) {
    const auto all = [&](int64_t task) {
      set(task);
      reduce(task);
      finish(task);
      dx(task);
    };
    return parallel_for(planes.tasks, planes.grain, all);
  }
  parallel_for(planes.c, 1, set);
  parallel_for(planes.tasks, planes.grain, reduce);
  parallel_for(planes.c, 1, finish);
  parallel_for(planes.tasks, planes.grain, dx);
}

void fwd(const BatchNormActFwdParams& p, bool training) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (!p.shape.channels_last) return fwd_planes<T>(p, Planes(p.shape, sizeof(T)), training);
    const WideRows w(p.shape, sizeof(T), kLanes<Acc<T>>);
    if (training) {
      batch_moments(static_cast<const T*>(p.x), w, static_cast<Acc<T>*>(p.mean),
                    static_cast<Acc<T>*>(p.var));
    }
    apply_channels_last<T>(p, w);
  });
}

}  // namespace

void batch_norm_act_fwd_cpu(const BatchNormActFwdParams& p) { fwd(p, true); }

void batch_norm_act_apply_cpu(const BatchNormActFwdParams& p) { fwd(p, false); }

void batch_norm_act_bwd_cpu(const BatchNormActBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? bwd_channels_last<T>(p) : bwd_planes<T>(p);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
