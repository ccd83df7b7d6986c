// pixel_norm_act on the CPU: each pixel normalised over its channels.
//
// Data movement, T = one pass over the tensor: forward 2T (reads x, writes y), backward 3T (reads
// dy and x, writes dx), since what is normalised together fits into a cache.
//   channels_last  a pixel is a row of c neighbouring elements, read again from the L1 cache.
//   NCHW           a pixel is a column of the [c, hw] matrix of its sample. A tile of neighbouring
//                  columns is copied, as it is first read, into dense scratch memory: its rows lie
//                  hw elements apart, and with hw a power of two they would share a few cache sets.
// All sums have an order that depends on the shape alone.
#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"
#include "group_norm_act.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// weight or bias as whole vectors: `c` numbers, or `value` where there are none, then zeros.
template <class S>
struct Parameter : Scratch<S> {
  Parameter(const void* given, int64_t c, S value) : Scratch<S>(c + kLanes<S>) {
    for (int64_t j = 0; j < c; ++j) (*this)[j] = given ? static_cast<const S*>(given)[j] : value;
  }
};

// Work in kTasks blocks of units, each with sums of its own for dweight and dbias.
struct Blocks {
  int64_t units, per_task, tasks, grain;

  Blocks(int64_t units, int64_t elements)
      : units(units),
        per_task(ceil_div(units, kTasks)),
        tasks(ceil_div(units, per_task)),
        grain(task_grain(tasks, elements)) {}

  template <class Body>
  void run(Body body) const {
    const auto block = [&](int64_t task) {
      body(task, task * per_task, min(units, (task + 1) * per_task));
    };
    parallel_for(tasks, grain, block);
  }
};

// sums: [tasks, stride], of which the first c count.
template <class S>
void write_sums(const Scratch<double>& sums, int64_t tasks, int64_t stride, int64_t c, void* out) {
  for (int64_t j = 0; j < c; ++j) {
    double total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += sums[task * stride + j];
    static_cast<S*>(out)[j] = static_cast<S>(total);
  }
}

// ---- channels_last ------------------------------------------------------------------------------

template <class T, class A>
void fwd_rows(const GroupNormActFwdParams& p) {
  using S = Acc<T>;
  const A act(p.act);
  const int64_t c = p.shape.c;
  const Parameter<S> weight(p.weight, c, S(1)), bias(p.bias, c, S(0));
  const S inverse = S(1) / static_cast<S>(c);
  Blocks(p.shape.per_channel(), p.shape.numel()).run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * c;
      T* y = static_cast<T*>(p.y) + row * c;
      S *mean = static_cast<S*>(p.mean) + row, *var = static_cast<S*>(p.var) + row;
      if (c <= kChunkElements<T>) {  // no double and no division: a row is soon done
        const ChunkMoments<S> moments = chunk_moments(x, c);
        *mean = moments.center + moments.drift;
        *var = variance_of(*mean, moments.m2 * inverse);
      } else {
        range_moments(x, c).write(mean, var);
      }
      const Vec<S> center = splat(*mean), rstd = splat(rstd_of(*var, p.eps));
      for_each_vector<S>(
          c, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            prefetch_row<true>(x + i, c);
            const Vec<S> scale = rstd * load(weight.get() + i);
            const Vec<S> z = (load(x + i, count) - center) * scale + load(bias.get() + i);
            store(y + i, act_fwd_one(act, z), count);
          });
    }
  });
}

template <class T, class A>
void bwd_rows(const GroupNormActBwdParams& p) {
  using S = Acc<T>;
  const A act(p.act);
  const int64_t c = p.shape.c, stride = ceil_div(c, kLanes<S>) * kLanes<S>;
  const Parameter<S> weight(p.weight, c, S(1)), bias(p.bias, c, S(0));
  const Blocks blocks(p.shape.per_channel(), p.shape.numel());
  const Scratch<double> dweight(blocks.tasks * stride), dbias(blocks.tasks * stride);
  blocks.run([&](int64_t task, int64_t first, int64_t last) {
    const Scratch<S> sums(2 * stride);  // of at most kSumRows rows
    S *dw = sums.get(), *db = dw + stride;
    for (int64_t row = first; row < last; ++row) {
      const T *x = static_cast<const T*>(p.x) + row * c,
              *dy = static_cast<const T*>(p.dy) + row * c;
      T* dx = static_cast<T*>(p.dx) + row * c;
      const S rstd_value = rstd_of(static_cast<const S*>(p.var)[row], p.eps);
      const Vec<S> center = splat(static_cast<const S*>(p.mean)[row]), rstd = splat(rstd_value);
      // body(i, count, xhat, dz, weight) for each vector of the row
      const auto for_each_dz = [&](auto body) __attribute__((always_inline)) {
        for_each_vector<S>(
            c, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              prefetch_row<true>(x + i, c);
              prefetch_row<true>(dy + i, c);
              const Vec<S> centered = load(x + i, count) - center, w = load(weight.get() + i);
              const Vec<S> z = centered * (rstd * w) + load(bias.get() + i);
              body(i, count, centered * rstd, act_bwd_one(act, load(dy + i, count), z), w);
            });
      };
      Vec<S> sum{}, sum_x{};  // of weight * dz, and of that times xhat
      for_each_dz([&](int64_t i, int64_t, Vec<S> xhat, Vec<S> dz, Vec<S> w)
                      __attribute__((always_inline)) {
                        store(db + i, load(db + i) + dz);
                        store(dw + i, load(dw + i) + dz * xhat);
                        sum += w * dz;
                        sum_x += w * dz * xhat;
                      });
      const Vec<S> shift = splat(horizontal_sum<S>(sum) / static_cast<S>(c));
      const Vec<S> slope = splat(horizontal_sum<S>(sum_x) / static_cast<S>(c));
      for_each_dz([&](int64_t i, int64_t count, Vec<S> xhat, Vec<S> dz, Vec<S> w) __attribute__((
          always_inline)) { store(dx + i, rstd * (w * dz - shift - xhat * slope), count); });
      if (row + 1 == last || (row + 1 - first) % kSumRows == 0) {
        add_in_double(dweight.get() + task * stride, dw, stride);
        add_in_double(dbias.get() + task * stride, db, stride);
        for_each_vector<S>(2 * stride, [&](int64_t i, int64_t) { store(dw + i, Vec<S>{}); });
      }
    }
  });
  write_sums<S>(dweight, blocks.tasks, stride, c, p.dweight);
  write_sums<S>(dbias, blocks.tasks, stride, c, p.dbias);
}

// ---- NCHW ---------------------------------------------------------------------------------------

// A tile: `width` neighbouring pixels of a sample, all channels.
struct Tiles {
  static constexpr int64_t kBytes = 1 << 18;  // of the scratch copy: a part of the L2 cache

  int64_t c, hw, width, per_sample, units;

  Tiles(const ImageShape& shape, int64_t lanes, int64_t acc_bytes) : c(shape.c), hw(shape.hw) {
    width = max(1, min(kBytes / (c * acc_bytes), 256) / lanes) * lanes;
    width = min(width, ceil_div(hw, lanes) * lanes);
    per_sample = ceil_div(hw, width);
    units = shape.n * per_sample;
  }
  int64_t sample(int64_t unit) const { return unit / per_sample; }
  int64_t pixel(int64_t unit) const { return unit % per_sample * width; }
  int64_t pixels(int64_t unit) const { return min(width, hw - pixel(unit)); }
  // The tile's first element in a tensor, and its first number in the statistics.
  int64_t offset(int64_t unit) const { return sample(unit) * c * hw + pixel(unit); }
  int64_t statistic(int64_t unit) const { return sample(unit) * hw + pixel(unit); }
};

template <class T, class A>
void fwd_tiles(const GroupNormActFwdParams& p) {
  using S = Acc<T>;
  const A act(p.act);
  const int64_t c = p.shape.c, hw = p.shape.hw;
  const Parameter<S> weight(p.weight, c, S(1)), bias(p.bias, c, S(0));
  const Tiles tiles(p.shape, kLanes<S>, sizeof(S));
  const int64_t width = tiles.width;
  Blocks(tiles.units, p.shape.numel()).run([&](int64_t, int64_t first, int64_t last) {
    const Scratch<S> tile(c * width), numbers(4 * width);
    S *mean = numbers.get(), *dev = mean + width, *sq = dev + width, *rstd = sq + width;
    for (int64_t unit = first; unit < last; ++unit) {
      const T* x = static_cast<const T*>(p.x) + tiles.offset(unit);
      T* y = static_cast<T*>(p.y) + tiles.offset(unit);
      const int64_t pixels = tiles.pixels(unit);
      for_each_vector<S>(3 * width, [&](int64_t i, int64_t) { store(mean + i, Vec<S>{}); });
      for (int64_t j = 0; j < c; ++j) {
        for_each_vector<S>(
            pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              prefetch_row<true>(x + j * hw + i, hw);
              const Vec<S> value = load(x + j * hw + i, count);
              store(tile.get() + j * width + i, value);
              store(mean + i, load(mean + i) + value);
            });
      }
      const Vec<S> inverse = splat(S(1) / static_cast<S>(c));
      for_each_vector<S>(width,
                         [&](int64_t i, int64_t) { store(mean + i, load(mean + i) * inverse); });
      for_each_block<S>(
          c, width, [&](auto block, int64_t j, int64_t i, int64_t) __attribute__((always_inline)) {
            const Vec<S> center = load(mean + i);
            Vec<S> deviations = load(dev + i), squares = load(sq + i);
#pragma GCC unroll 4
            for (int u = 0; u < block.value; ++u) {
              const Vec<S> a = load(tile.get() + (j + u) * width + i) - center;
              deviations += a;
              squares += a * a;
            }
            store(dev + i, deviations);
            store(sq + i, squares);
          });
      S* mean_out = static_cast<S*>(p.mean) + tiles.statistic(unit);
      S* var_out = static_cast<S*>(p.var) + tiles.statistic(unit);
      for_each_vector<S>(pixels, [&](int64_t i, int64_t count) {
        const Vec<S> drift = load(dev + i) * inverse;
        store(mean + i, load(mean + i) + drift);
        const Vec<S> var = (load(sq + i) - load(dev + i) * drift) * inverse;
        store(mean_out + i, load(mean + i), count);
        store(var_out + i, variances_of<S>(load(mean + i), var), count);
      });
      for (int64_t i = 0; i < pixels; ++i) rstd[i] = rstd_of(var_out[i], p.eps);
      for (int64_t j = 0; j < c; ++j) {
        const Vec<S> w = splat(weight[j]), b = splat(bias[j]);
        for_each_vector<S>(
            pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              prefetch_row<true>(y + j * hw + i, hw);
              const Vec<S> centered = load(tile.get() + j * width + i) - load(mean + i);
              store(y + j * hw + i, act_fwd_one(act, centered * (load(rstd + i) * w) + b), count);
            });
      }
    }
  });
}

template <class T, class A>
void bwd_tiles(const GroupNormActBwdParams& p) {
  using S = Acc<T>;
  const A act(p.act);
  const int64_t c = p.shape.c, hw = p.shape.hw;
  const Parameter<S> weight(p.weight, c, S(1)), bias(p.bias, c, S(0));
  const Tiles tiles(p.shape, kLanes<S>, sizeof(S));
  const int64_t width = tiles.width;
  const Blocks blocks(tiles.units, p.shape.numel());
  const Scratch<double> dweight(blocks.tasks * c), dbias(blocks.tasks * c);
  blocks.run([&](int64_t task, int64_t first, int64_t last) {
    // Of the tile weight * dz and xhat; of each pixel mean, rstd, and the sums of dx.
    const Scratch<S> tile_dz(c * width), tile_x(c * width), numbers(4 * width);
    S *mean = numbers.get(), *rstd = mean + width, *sum = rstd + width, *sum_x = sum + width;
    double *dw = dweight.get() + task * c, *db = dbias.get() + task * c;
    for (int64_t unit = first; unit < last; ++unit) {
      const T* dy = static_cast<const T*>(p.dy) + tiles.offset(unit);
      const T* x = static_cast<const T*>(p.x) + tiles.offset(unit);
      T* dx = static_cast<T*>(p.dx) + tiles.offset(unit);
      const int64_t pixels = tiles.pixels(unit), statistic = tiles.statistic(unit);
      // All of them: what lies beyond the last pixel must not be an earlier tile's NaN.
      for_each_vector<S>(4 * width, [&](int64_t i, int64_t) { store(mean + i, Vec<S>{}); });
      for (int64_t i = 0; i < pixels; ++i) {
        mean[i] = static_cast<const S*>(p.mean)[statistic + i];
        rstd[i] = rstd_of(static_cast<const S*>(p.var)[statistic + i], p.eps);
      }
      for (int64_t j = 0; j < c; ++j) {
        const Vec<S> w = splat(weight[j]), b = splat(bias[j]);
        Vec<S> total{}, total_x{};
        for_each_vector<S>(
            pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              prefetch_row<true>(x + j * hw + i, hw);
              prefetch_row<true>(dy + j * hw + i, hw);
              const Vec<S> centered = load(x + j * hw + i, count) - load(mean + i);
              const Vec<S> r = load(rstd + i), xhat = centered * r;
              const Vec<S> dz =
                  act_bwd_one(act, load(dy + j * hw + i, count), centered * (r * w) + b);
              total += dz;
              total_x += dz * xhat;
              store(tile_dz.get() + j * width + i, w * dz);
              store(tile_x.get() + j * width + i, xhat);
              store(sum + i, load(sum + i) + w * dz);
              store(sum_x + i, load(sum_x + i) + w * dz * xhat);
            });
        db[j] += static_cast<double>(horizontal_sum<S>(total));
        dw[j] += static_cast<double>(horizontal_sum<S>(total_x));
      }
      const Vec<S> inverse = splat(S(1) / static_cast<S>(c));
      for_each_vector<S>(2 * width,
                         [&](int64_t i, int64_t) { store(sum + i, load(sum + i) * inverse); });
      for (int64_t j = 0; j < c; ++j) {
        for_each_vector<S>(
            pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              prefetch_row<true>(dx + j * hw + i, hw);
              const Vec<S> xhat = load(tile_x.get() + j * width + i);
              const Vec<S> grad = load(tile_dz.get() + j * width + i) - load(sum + i);
              store(dx + j * hw + i, load(rstd + i) * (grad - xhat * load(sum_x + i)), count);
            });
      }
    }
  });
  write_sums<S>(dweight, blocks.tasks, c, c, p.dweight);
  write_sums<S>(dbias, blocks.tasks, c, c, p.dbias);
}

}  // namespace

void pixel_norm_act_fwd_cpu(const GroupNormActFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_act<Acc<T>>(p.act, [&](auto act) {
      using A = typename decltype(act)::type;
      p.shape.channels_last ? fwd_rows<T, A>(p) : fwd_tiles<T, A>(p);
    });
  });
}

void pixel_norm_act_bwd_cpu(const GroupNormActBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_act<Acc<T>>(p.act, [&](auto act) {
      using A = typename decltype(act)::type;
      p.shape.channels_last ? bwd_rows<T, A>(p) : bwd_tiles<T, A>(p);
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
