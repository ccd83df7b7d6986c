// group_norm_act on the CPU.
//
// Data movement, T = one pass over the tensor:
//   forward   statistics read x (1T); the normalisation reads x and writes y (2T).
//   backward  the reductions read dy and x (2T); dx reads both again and is written (3T).
// The unit of work is what one statistic or more can be computed from without its neighbours: NCHW
// a group of a sample, side by side in memory; channels_last a sample, whose groups are walked
// together, row by row. Where there are units enough a thread takes a unit through all its passes,
// so that the second reading comes from the cache where it fits: 2T and 3T. Few large units are cut
// into parts, which threads may share.
// How the variance is computed: cpu/moments.h.
// All sums have an order that depends on the shape alone.
#include <initializer_list>

#include "cpu/dispatch.h"
#include "cpu/group_norm_act/loops.h"
#include "cpu/moments.h"
#include "cpu/spans.h"
#include "group_norm_act.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// ---- NCHW: a unit is a group of a sample --------------------------------------------------------

struct Groups {
  int64_t per_group, hw, size, units, elements, parts, per_part, lanes;

  // A part is long enough to be worth a task; sums are merged in double after kPiece elements.
  static constexpr int64_t kPiece = 1 << 13;

  Groups(const ImageShape& shape, int64_t groups, int64_t lanes)
      : per_group(shape.c / groups),
        hw(shape.hw),
        size(per_group * hw),
        units(shape.n * groups),
        elements(shape.numel()),
        lanes(lanes) {
    per_part = ceil_div(ceil_div(size, ceil_div(kTasks / 4, units)), 2 * kPiece) * 2 * kPiece;
    parts = ceil_div(size, per_part);
  }

  // body(channel of the group, offset in the group, rows, length) for each piece of one channel's:
  // as rows of whole vectors, as many as the loops take at a time, and what is left.
  template <class Body>
  void for_each_piece(int64_t part, Body body) const {
    const int64_t end = min(size, (part + 1) * per_part);
    int64_t o = part * per_part;
    for (int64_t j = o / hw; o < end; ++j) {
      for (const int64_t stop = min(end, (j + 1) * hw); o < stop;) {
        const int64_t length = min(kPiece, stop - o), row = length / (4 * lanes) * lanes;
        if (row > 0) body(j, o, int64_t{4}, row);
        if (length > 4 * row) body(j, o + 4 * row, int64_t{1}, length - 4 * row);
        o += length;
      }
    }
  }
};

template <class T>
void fwd_nchw(const GroupNormActFwdParams& p) {
  using S = Acc<T>;
  const Loops<T, false> loops(p.act);
  const Norm<S> norm(p);
  const Groups groups(p.shape, p.groups, kLanes<S>);
  const T* x = static_cast<const T*>(p.x);
  // space: of each part the count, mean and centred squares
  const auto stats = [&](double* space, int64_t group, int64_t part) {
    const int64_t o = part * groups.per_part;
    const Moments<S> m =
        range_moments(x + group * groups.size + o, min(groups.per_part, groups.size - o));
    space[3 * part] = m.count, space[3 * part + 1] = m.mean, space[3 * part + 2] = m.m2;
  };
  const auto merge = [&](double* space, int64_t group) {
    Moments<S> total;
    for (int64_t part = 0; part < groups.parts; ++part) {
      total.merge(space[3 * part], space[3 * part + 1], space[3 * part + 2]);
    }
    total.write(norm.mean + group, norm.var + group);
  };
  const auto apply = [&](double*, int64_t group, int64_t part) {
    const S rstd = norm.rstd(group);
    const int64_t first = group % norm.groups * norm.per_group, base = group * groups.size;
    groups.for_each_piece(part, [&](int64_t j, int64_t o, int64_t rows, int64_t length) {
      S scale = norm.weight_of(first + j) * rstd, bias = norm.bias_of(first + j);
      const GroupNormCoefficients<S> k{p.act, norm.mean + group, &scale, &bias, nullptr, nullptr};
      loops.normalize(x + base + o, static_cast<T*>(p.y) + base + o, rows, length, k);
    });
  };
  run_units<double>(groups.units, groups.parts, 3 * groups.parts, groups.elements, kNothing, stats,
                    merge, apply);
}

template <class T>
void bwd_nchw(const GroupNormActBwdParams& p) {
  using S = Acc<T>;
  const Loops<T, false> loops(p.act);
  const Norm<S> norm(p);
  const Groups groups(p.shape, p.groups, kLanes<S>);
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  const ChannelSums sums(p.shape);
  // body(coefficients, channel of the group, offset, rows, length) for each piece of a part.
  const auto walk = [&](int64_t group, int64_t part, S shift, S slope, auto body) {
    const S rstd = norm.rstd(group);
    const int64_t first = group % norm.groups * norm.per_group, base = group * groups.size;
    groups.for_each_piece(part, [&](int64_t j, int64_t o, int64_t rows, int64_t length) {
      S scale = norm.weight_of(first + j) * rstd, bias = norm.bias_of(first + j);
      body(GroupNormCoefficients<S>{p.act, norm.mean + group, &scale, &bias, &shift, &slope}, j,
           base + o, rows, length);
    });
  };
  // space: of each part and channel of the group sum(dz) and sum(dz * (x - mean))
  const auto reduce = [&](double* space, int64_t group, int64_t part) {
    double* of_part = space + part * groups.per_group * 2;
    walk(group, part, S(0), S(0),
         [&](GroupNormCoefficients<S> k, int64_t j, int64_t o, int64_t rows, int64_t length) {
           Vec<S> total[2] = {};
           S lanes[2][kLanes<S>] = {};
           loops.reduce(dy + o, x + o, rows, length, k, lanes[0], lanes[1]);
           for (int i = 0; i < 2; ++i) {
             total[i] = load(lanes[i]);
             of_part[2 * j + i] += static_cast<double>(horizontal_sum<S>(total[i]));
           }
         });
  };
  const auto merge = [&](double* space, int64_t group) {
    for (int64_t part = 0; part < groups.parts; ++part) {
      for (int64_t j = 0; j < groups.per_group; ++j) {
        const double* from = space + (part * groups.per_group + j) * 2;
        sums.dz[group * groups.per_group + j] += from[0];
        sums.dzx[group * groups.per_group + j] += from[1];
      }
    }
  };
  const auto dx = [&](double*, int64_t group, int64_t part) {
    S shift, slope;
    sums.finalize(norm, group, &shift, &slope);
    walk(group, part, shift, slope,
         [&](GroupNormCoefficients<S> k, int64_t, int64_t o, int64_t rows, int64_t length) {
           loops.grad_x(dy + o, x + o, static_cast<T*>(p.dx) + o, rows, length, k);
         });
  };
  run_units<double>(groups.units, groups.parts, groups.parts * groups.per_group * 2,
                    groups.elements, kNothing, reduce, merge, dx);
  sums.write(norm, p);
}

// ---- channels_last: a unit is a sample ----------------------------------------------------------

// mean, scale and bias of a sample's channels, `repeat` times, into k's arrays.
template <class S>
void set_channels(const Norm<S>& norm, int64_t sample, int64_t repeat, GroupNormCoefficients<S> k) {
  for (int64_t g = 0; g < norm.groups; ++g) {
    const int64_t statistic = sample * norm.groups + g;
    const S mean = norm.mean[statistic], rstd = norm.rstd(statistic);
    for (int64_t j = g * norm.per_group; j < (g + 1) * norm.per_group; ++j) {
      k.mean[j] = mean;
      k.scale[j] = norm.weight_of(j) * rstd;
      k.bias[j] = norm.bias_of(j);
    }
  }
  for (S* values : {k.mean, k.scale, k.bias}) {
    for (int64_t i = norm.c; i < norm.c * repeat; ++i) values[i] = values[i - norm.c];
  }
}

// From the columns' origin + mean and m2 to the groups': the mean, then all squares around it.
template <class T, class S>
void merge_columns(const T* x, const SampleRows<T>& rows, const Norm<S>& norm, int64_t sample,
                   const S* origin, const S* mean, const S* m2) {
  for (int64_t g = 0; g < norm.groups; ++g) {
    const int64_t first = g * norm.per_group, last = first + norm.per_group;
    double total = 0, squares = 0;
    rows.for_each_pixel([&](int64_t, int64_t column, int64_t count) {
      double sum = 0;
      for (int64_t i = column + first; i < column + last; ++i) {
        sum += static_cast<double>(origin[i]) + static_cast<double>(mean[i]);
      }
      total += sum * static_cast<double>(count);
    });
    const double center = total / norm.count;
    rows.for_each_pixel([&](int64_t, int64_t column, int64_t count) {
      double within = 0, between = 0;
      for (int64_t i = column + first; i < column + last; ++i) {
        const double delta = static_cast<double>(origin[i]) + static_cast<double>(mean[i]) - center;
        within += static_cast<double>(m2[i]);
        between += delta * delta;
      }
      squares += within + between * static_cast<double>(count);
    });
    const int64_t statistic = sample * norm.groups + g;
    Moments<S> total_moments{norm.count, center, squares};
    if (kDoubleIsWider<S> && !total_moments.is_finite()) {
      total_moments = moments_in_double<T>(norm.count, [&](auto body) {
        for (int64_t i = first; i < rows.size; i += rows.c) body(x + i, norm.per_group);
      });
    }
    total_moments.write(norm.mean + statistic, norm.var + statistic);
  }
}

template <class T>
void fwd_channels_last(const GroupNormActFwdParams& p) {
  using S = Acc<T>;
  const Loops<T, true> loops(p.act);
  const Norm<S> norm(p);
  const SampleRows<T> rows(p.shape);
  const T* x = static_cast<const T*>(p.x);
  // space: three arrays of one number a column and slot, then the coefficients
  const int64_t array = rows.slots() * rows.wide, arrays = 3 * array;
  const auto stats = [&](S* space, int64_t sample, int64_t part) {
    const T* from = x + sample * rows.size;
    rows.for_each_span(part, [&](int64_t slot, int64_t o, int64_t, int64_t length) {
      S* at = space + slot * rows.wide;
      if (slot < rows.parts) {
        column_moments(from, rows.first(part), rows.last(part), rows, at, at + array,
                       at + 2 * array);
      } else {  // one value a column: its own mean
        for_each_vector<S>(length, [&](int64_t i, int64_t count) {
          store(at + i, load(from + o + i, count), count);
        });
      }
    });
  };
  const auto coefficients = [&](S* space) {
    S* k = space + arrays;
    return GroupNormCoefficients<S>{p.act, k, k + rows.wide, k + 2 * rows.wide, nullptr, nullptr};
  };
  const auto merge = [&](S* space, int64_t sample) {
    merge_columns(x + sample * rows.size, rows, norm, sample, space, space + array,
                  space + 2 * array);
    set_channels(norm, sample, rows.repeat, coefficients(space));
  };
  const auto apply = [&](S* space, int64_t sample, int64_t part) {
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      const int64_t at = sample * rows.size + o;
      loops.normalize(x + at, static_cast<T*>(p.y) + at, count, length, coefficients(space));
    });
  };
  run_units<S>(rows.n, rows.parts, arrays + 3 * rows.wide, p.shape.numel(), kNothing, stats, merge,
               apply);
}

template <class T>
void bwd_channels_last(const GroupNormActBwdParams& p) {
  using S = Acc<T>;
  const Loops<T, true> loops(p.act);
  const Norm<S> norm(p);
  const SampleRows<T> rows(p.shape);
  const T *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
  const ChannelSums sums(p.shape);
  // space: two sums a column and part, then the coefficients
  const int64_t array = rows.parts * rows.wide;
  const auto coefficients = [&](double* space) {
    S* k = reinterpret_cast<S*>(space + 2 * array);
    return GroupNormCoefficients<S>{
        p.act, k, k + rows.wide, k + 2 * rows.wide, k + 3 * rows.wide, k + 4 * rows.wide};
  };
  const auto prepare = [&](double* space, int64_t sample) {
    set_channels(norm, sample, rows.repeat, coefficients(space));
  };
  const auto reduce = [&](double* space, int64_t sample, int64_t part) {
    const Scratch<S> block(2 * rows.wide, Fill::kNothing);
    S *dz = block.get(), *dzx = dz + rows.wide;
    double* of_part = space + part * rows.wide;
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      for (int64_t row = 0; row < count; row += kSumRows) {
        const int64_t from = sample * rows.size + o + row * length;
        for_each_vector<S>(2 * rows.wide, [&](int64_t i, int64_t) { store(dz + i, Vec<S>{}); });
        loops.reduce(dy + from, x + from, min(kSumRows, count - row), length, coefficients(space),
                     dz, dzx);
        add_in_double(of_part, dz, rows.wide);
        add_in_double(of_part + array, dzx, rows.wide);
      }
    });
  };
  const auto merge = [&](double* space, int64_t sample) {
    double *dz = sums.dz.get() + sample * rows.c, *dzx = sums.dzx.get() + sample * rows.c;
    for (int64_t column = 0; column < array; column += rows.c) {
      for (int64_t j = 0; j < rows.c; ++j) {
        dz[j] += space[column + j];
        dzx[j] += space[array + column + j];
      }
    }
    const GroupNormCoefficients<S> k = coefficients(space);
    for (int64_t g = 0; g < norm.groups; ++g) {
      S shift, slope;
      sums.finalize(norm, sample * norm.groups + g, &shift, &slope);
      for (int64_t i = g * norm.per_group; i < rows.wide; i += rows.c) {
        for (int64_t j = i; j < i + norm.per_group; ++j) k.shift[j] = shift, k.slope[j] = slope;
      }
    }
  };
  const auto dx = [&](double* space, int64_t sample, int64_t part) {
    rows.for_each_span(part, [&](int64_t, int64_t o, int64_t count, int64_t length) {
      const int64_t at = sample * rows.size + o;
      loops.grad_x(dy + at, x + at, static_cast<T*>(p.dx) + at, count, length, coefficients(space));
    });
  };
  const int64_t numbers = ceil_div(5 * rows.wide * sizeof(S), sizeof(double));
  run_units<double>(rows.n, rows.parts, 2 * array + numbers, p.shape.numel(), prepare, reduce,
                    merge, dx);
  sums.write(norm, p);
}

}  // namespace

void group_norm_act_fwd_cpu(const GroupNormActFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? fwd_channels_last<T>(p) : fwd_nchw<T>(p);
  });
}

void group_norm_act_bwd_cpu(const GroupNormActBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.shape.channels_last ? bwd_channels_last<T>(p) : bwd_nchw<T>(p);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
