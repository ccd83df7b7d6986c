// The gradients of depthwise_conv2d's weight and bias on the CPU.
//   dweight[c, a, b] = sum over n, i, j of dy[n, c, i, j] * x[n, c, i * stride + a * dilation -
//                      padding, likewise j],   dbias[c] = sum of dy
//
// channels_last: a task owns some channels, whose sums stay in the L1 cache (kSumsBytes), over some
// rows of dy of the batch. dy's tile of columns stays in registers beside a row of the kernel's
// sums; a vector of x that is loaded serves kernel_w of them. Both are read from memory once.
// Splits are added up at the end in their order: the sums depend on the shape alone. Floor: x and
// dy are read once; kernel_h * kernel_w multiply-adds a value of dy.
#include "cpu/depthwise_conv2d/blocks.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kSumsBytes = 16 << 10;
constexpr int64_t kPixelsPerSum = 8;  // of dy, at least, in a split

// sums[a, b] += sum over q of dy[q] * x[row a, first + q * stride + b], for strides 1 and 2 without
// dilation.
template <class T, int kKernel, int kStride, int kColumns>
void window_products(const Tile<T>& tile, const T* dy, Acc<T>* sums, Acc<T>* bias) {
  using S = Acc<T>;
  Vec<S> d[kColumns];
  unrolled<0, kColumns>([&](auto q) __attribute__((always_inline)) {
    d[q.value] = load(dy + q.value * tile.pixel);
  });
  Vec<S> total[2] = {load(bias), Vec<S>{}};
  unrolled<0, kColumns>([&](auto q)
                            __attribute__((always_inline)) { total[q.value % 2] += d[q.value]; });
  store(bias, total[0] + total[1]);
  for (int64_t t = 0; t < tile.tap_count; ++t) {
    const T* x = tile.row(t) + tile.first * tile.pixel;
    S* row = sums + tile.taps[t].kernel_row * kKernel * kLanes<S>;
    Vec<S> sum[kKernel];
    unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
      sum[b.value] = load(row + b.value * kLanes<S>);
    });
    unrolled<0, (kColumns - 1) * kStride + kKernel>([&](auto j) __attribute__((always_inline)) {
      if (tile.holds(tile.first + j.value)) {
        const Vec<S> value = in_register(load(x + j.value * tile.pixel));
        unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
          constexpr int kAt = decltype(j)::value - decltype(b)::value;
          if constexpr (kAt >= 0 && kAt % kStride == 0 && kAt / kStride < kColumns) {
            sum[b.value] += value * d[kAt / kStride];
          }
        });
      }
    });
    unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
      store(row + b.value * kLanes<S>, sum[b.value]);
    });
  }
}

// The same for any stride, dilation and number of columns.
template <class T>
void any_window_products(const Tile<T>& tile, const T* dy, Acc<T>* sums, Acc<T>* bias,
                         int64_t count) {
  using S = Acc<T>;
  const WindowAxis& columns = *tile.columns;
  const int64_t step = columns.stride;
  Vec<S> total = load(bias);
  for (int64_t q = 0; q < count; ++q) total += load_channels(dy + q * tile.pixel, tile.lanes);
  store(bias, total);
  for (int64_t t = 0; t < tile.tap_count; ++t) {
    const T* row = tile.row(t);
    S* to = sums + tile.taps[t].kernel_row * columns.kernel * kLanes<S>;
    for (int64_t b = 0; b < columns.kernel; ++b, to += kLanes<S>) {
      const int64_t at = tile.first + b * columns.dilation;
      int64_t q = at >= 0 ? 0 : ceil_div(-at, step);
      const int64_t end = at >= tile.width ? 0 : min(count, ceil_div(tile.width - at, step));
      const auto product = [&](int64_t q) __attribute__((always_inline)) {
        const T *d = dy + q * tile.pixel, *x = row + (at + q * step) * tile.pixel;
        return load_channels(d, tile.lanes) * load_channels(x, tile.lanes);
      };
      Vec<S> sum[4] = {load(to)};
      for (; q + 4 <= end; q += 4) {
        unrolled<0, 4>([&](auto k) __attribute__((always_inline)) {
          sum[k.value] += product(q + k.value);
        });
      }
      for (; q < end; ++q) sum[0] += product(q);
      store(to, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
}

template <class T>
using TileProducts = void (*)(const Tile<T>&, const T*, Acc<T>*, Acc<T>*);

// What runs a window of given sizes on a tile of `width` columns, or null: any_window_products.
template <class T>
TileProducts<T> choose_products(const DepthwiseShape& s, int& width) {
  using S = Acc<T>;
  const WindowAxis& columns = s.columns;
  TileProducts<T> chosen = nullptr;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (columns.dilation > 1 || s.c < kLanes<S>) return nullptr;
    width = tile_width(columns.size_out, 4, 3);
    const auto of_width = [&](auto kernel, auto stride) {
      constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
      chosen = width == 8 ? window_products<T, kKernel, kStride, 8>
                          : window_products<T, kKernel, kStride, 7>;
      if constexpr (kManyRegisters) {
        if (width == 14) chosen = window_products<T, kKernel, kStride, 14>;
      }
    };
    const auto of_stride = [&](auto kernel) {
      if (columns.stride == 1) of_width(kernel, Index<1>{});
      if (columns.stride == 2) of_width(kernel, Index<2>{});
    };
    if (columns.kernel == 3) of_stride(Index<3>{});
    if (columns.kernel == 5) of_stride(Index<5>{});
    if (columns.kernel == 7) of_stride(Index<7>{});
  }
  return chosen;
}

// Adds what one row of dy gives to the sums [vectors, taps + 1, lanes] of vectors [first, last),
// the bias's behind those of the taps.
template <class T>
void add_row(const WindowAxis& columns, const RowTap* taps, int64_t tap_count, int64_t own,
             TileProducts<T> products, int64_t tile_columns, const ChannelVectors& vectors,
             int64_t first, int64_t last, const T* x, const T* dy, Acc<T>* sums) {
  constexpr int64_t kWide = kLanes<Acc<T>>;
  Tile<T> tile{};
  tile.taps = taps;
  tile.tap_count = tap_count;
  tile.width = columns.size;
  tile.pixel = vectors.c;
  tile.lanes = vectors.width();
  tile.columns = &columns;
  for (int64_t column = 0, count; column < columns.size_out; column += count) {
    const bool whole = products != nullptr && columns.size_out - column >= tile_columns;
    count = whole ? tile_columns : columns.size_out - column;
    tile.first = column * columns.stride - columns.padding;
    for (int64_t v = first; v < last; ++v) {
      const int64_t channel = vectors.channel(v);
      tile.x = x + channel;
      const T* d = dy + column * vectors.c + channel;
      Acc<T>*to = sums + v * own, *bias = to + own - kWide;
      if (whole) {
        products(tile, d, to, bias);
      } else {
        any_window_products(tile, d, to, bias, count);
      }
    }
  }
}

template <class T>
void pixels_bwd_weight(const DepthwiseShape& s, const T* dy, const T* x, Acc<T>* dweight,
                       Acc<T>* dbias) {
  using S = Acc<T>;
  constexpr int64_t kLanesOf = kLanes<S>;
  const WindowAxis &r = s.rows, &q = s.columns;
  const ChannelVectors vectors(s.c, kLanesOf);
  const int64_t taps = r.kernel * q.kernel, own = (taps + 1) * kLanesOf;  // of a vector
  // Vectors of a task: whole blocks of 64 channels, so that cache lines are not shared.
  const int64_t per_block = max(1, 64 / kLanesOf);
  const int64_t fit = kSumsBytes / (own * static_cast<int64_t>(sizeof(S)));
  const int64_t per_task = min(vectors.count, max(1, fit / per_block) * per_block);
  const int64_t chunks = ceil_div(vectors.count, per_task), all_rows = s.n * r.size_out;
  // Enough to do for each split beside clearing its sums and adding them up.
  const int64_t most = max(1, all_rows * q.size_out / (kPixelsPerSum * taps));
  const int64_t rows_per_split =
      ceil_div(all_rows, min(min(all_rows, most), ceil_div(kTasks, chunks)));
  const int64_t splits = ceil_div(all_rows, rows_per_split), tasks = splits * chunks;
  int tile_columns = 1;
  const TileProducts<T> products = choose_products<T>(s, tile_columns);
  const Scratch<S> partial(splits * vectors.count * own);
  const auto run = [&](int64_t from, int64_t to) {
    const Scratch<RowTap> row_of(2 * r.kernel);
    for (int64_t task = from; task < to; ++task) {
      const int64_t split = task / chunks, first = task % chunks * per_task;
      const int64_t last = min(vectors.count, first + per_task);
      S* sums = partial.get() + split * vectors.count * own;
      const int64_t end = min(all_rows, (split + 1) * rows_per_split);
      for (int64_t row = split * rows_per_split; row < end; ++row) {
        const int64_t count = row_taps(r, row % r.size_out, row_of.get());
        add_row(q, row_of.get(), count, own, products, tile_columns, vectors, first, last,
                x + row / r.size_out * r.size * q.size * s.c, dy + row * q.size_out * s.c, sums);
      }
    }
  };
  parallel_ranges(tasks, task_grain(tasks, all_rows * q.size_out * s.c), run);
  const auto merge = [&](int64_t v) {
    const int64_t channel = vectors.channel(v);
    for (int64_t t = 0; t <= taps; ++t) {
      Vec<S> total{};
      for (int64_t split = 0; split < splits; ++split) {
        total += load(partial.get() + (split * vectors.count + v) * own + t * kLanesOf);
      }
      for (int64_t lane = vectors.first_own(v); lane < vectors.width(); ++lane) {
        (t < taps ? dweight[(channel + lane) * taps + t] : dbias[channel + lane]) = total[lane];
      }
    }
  };
  parallel_for(vectors.count, task_grain(vectors.count, splits * s.c * taps), merge);
}

// NCHW: a task is a block of channels of a part of the batch (Planes), in bands as blocks.h has
// them; parts are added up in their order.
template <class T>
void blocks_bwd_weight(const DepthwiseShape& s, const T* dy, const T* x, Acc<T>* dweight,
                       Acc<T>* dbias) {
  using S = Acc<T>;
  constexpr int64_t kWide = kLanes<S>;
  const WindowAxis &r = s.rows, &q = s.columns;
  const int64_t taps = r.kernel * q.kernel, own = (taps + 1) * kWide;
  const Planes parts({s.n, ceil_div(s.c, kWide), r.size_out * q.size_out, false}, sizeof(T));
  const ChannelVectors vectors(kWide, kWide);
  int tile_columns = 1;
  const TileProducts<S> products = choose_products<S>({1, kWide, r, q, true}, tile_columns);
  const int64_t most = Band::height(r, false, q.size_out, q.size, kWide);
  const int64_t most_read = min(r.size, (most - 1) * r.stride + (r.kernel - 1) * r.dilation + 1);
  const Scratch<S> partial(parts.tasks * own);
  const auto run = [&](int64_t from, int64_t to) {
    const Scratch<S> read(most_read * q.size * kWide, Fill::kNothing);
    const Scratch<S> gradient(most * q.size_out * kWide, Fill::kNothing);
    const Scratch<RowTap> row_of(r.kernel);
    for (int64_t task = from; task < to; ++task) {
      const int64_t channel = parts.channel(task) * kWide, channels = min(kWide, s.c - channel);
      for (int64_t image = parts.first(task); image < parts.last(task); ++image) {
        const int64_t plane = image * s.c + channel;
        for (int64_t begin = 0; begin < r.size_out; begin += most) {
          const Band band(r, false, begin, min(r.size_out, begin + most));
          to_pixels(x + (plane * r.size + band.first) * q.size, r.size * q.size, channels,
                    (band.last - band.first) * q.size, read.get());
          to_pixels(dy + (plane * r.size_out + begin) * q.size_out, r.size_out * q.size_out,
                    channels, (band.end - begin) * q.size_out, gradient.get());
          for (int64_t row = 0; row < band.end - begin; ++row) {
            const int64_t count = row_taps(band.rows, row, row_of.get());
            add_row<S>(q, row_of.get(), count, own, products, tile_columns, vectors, 0, 1,
                       read.get(), gradient.get() + row * q.size_out * kWide,
                       partial.get() + task * own);
          }
        }
      }
    }
  };
  parallel_ranges(parts.tasks, parts.grain, run);
  for (int64_t j = 0; j < s.c; ++j) {
    for (int64_t t = 0; t <= taps; ++t) {
      S total = 0;
      for (int64_t part = 0; part < parts.parts; ++part) {
        total += partial[(j / kWide * parts.parts + part) * own + t * kWide + j % kWide];
      }
      (t < taps ? dweight[j * taps + t] : dbias[j]) = total;
    }
  }
}

}  // namespace

void depthwise_conv2d_bwd_weight_cpu(const DepthwiseConv2dBwdWeightParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Acc<T>;
    const auto *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x);
    auto *dweight = static_cast<S*>(p.dweight), *dbias = static_cast<S*>(p.dbias);
    (p.shape.channels_last ? pixels_bwd_weight<T> : blocks_bwd_weight<T>)(p.shape, dy, x, dweight,
                                                                          dbias);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
