// How forward and dx of depthwise_conv2d walk channels_last: both make each row of their result of
// rows of what they read.
//
// Data movement: a thread owns rows of the result, one after the other. A row of what is read comes
// from memory once, asked for one row ahead, and up to kernel_h - 1 times more from the L2 cache.
// Within a row a block of 64 channels goes through all tiles of columns: its weights, as float, and
// the columns that two tiles have in common stay in the L1 cache. A vector that is loaded serves
// the kernel_w columns of its tile that it is a part of: for 14 columns and a kernel of 7, 20 loads
// for 98 multiply-adds.
#pragma once

#include "cpu/depthwise_conv2d/window.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kBlockChannels = 64;
constexpr int kMostColumns = 14;  // of a tile

template <class T>
struct Sweep {
  using S = Acc<T>;
  int64_t n, c;
  WindowAxis rows, columns;  // of the convolution; with `of_input` the result is its input
  bool of_input, flipped;    // flipped: the kernel is read from its end
  const T* from;
  const S* weight;
  const S* bias;  // null: 0
  const T* dy;    // null, or of the result's sizes
  T* to;
  Act act;
  int tile = 0;
  TileSums<T> sums_of[2] = {};  // by the parity of a tile's first column, see Tile::first below
  Finish<T> finish = nullptr;

  int64_t height() const { return of_input ? rows.size : rows.size_out; }
  int64_t width() const { return of_input ? columns.size : columns.size_out; }
  int64_t read_height() const { return of_input ? rows.size_out : rows.size; }
  int64_t read_width() const { return of_input ? columns.size_out : columns.size; }
  int64_t taps_of(int64_t row, RowTap* taps) const {
    return (of_input ? row_taps_of_input : row_taps)(rows, row, taps);
  }

  void run() const {
    const ChannelVectors vectors(c, kLanes<S>);
    const int64_t taps = rows.kernel * columns.kernel;
    const Scratch<S> packed(vectors.count * taps * kLanes<S>);
    const auto pack = [&](int64_t v) {
      S* out = packed.get() + v * taps * kLanes<S>;
      const S* in = weight + vectors.channel(v) * taps;
      for (int64_t lane = 0; lane < vectors.width(); ++lane, in += taps) {
        for (int64_t t = 0; t < taps; ++t) {
          out[t * kLanes<S> + lane] = in[flipped ? taps - 1 - t : t];
        }
      }
    };
    parallel_for(vectors.count, task_grain(vectors.count, c * taps), pack);
    const int64_t all = n * height();
    parallel_ranges(all, task_grain(all, all * width() * c),
                    [&](int64_t begin, int64_t end) { sweep(vectors, packed.get(), begin, end); });
  }

  // Rows [begin, end) of the results of all images; packed: [vectors, kernel_h, kernel_w, lanes].
  void sweep(const ChannelVectors& vectors, const S* packed, int64_t begin, int64_t end) const {
    const Scratch<RowTap> taps(2 * rows.kernel);
    RowTap *now = taps.get(), *next = now + rows.kernel;
    int64_t coming = taps_of(begin % height(), next);
    for (int64_t row = begin; row < end; ++row) {
      RowTap* const other = now;
      now = next;
      next = other;
      const int64_t count = coming, image = row / height();
      const bool more = row + 1 < end && (row + 1) / height() == image;
      coming = row + 1 < end ? taps_of((row + 1) % height(), next) : 0;
      // Rows that the next row of the result reads first.
      const int64_t fetch = last(now, count) + 1, fetch_end = more ? last(next, coming) + 1 : 0;
      Tile<T> tile_of{};
      tile_of.taps = now;
      tile_of.tap_count = count;
      tile_of.width = read_width();
      tile_of.pixel = c;
      tile_of.lanes = vectors.width();
      tile_of.columns = &columns;
      const bool plain = act == Act::kNone && dy == nullptr && c >= kLanes<S>;
      const T* in = from + image * read_height() * read_width() * c;
      const int64_t out = row * width() * c;
      const int64_t row_elements = read_width() * c;
      const int64_t calls = ceil_div(width(), tile) * vectors.count;
      Prefetcher ahead(in + fetch * row_elements, (fetch_end - fetch) * row_elements, calls);
      const int64_t per_block = max(1, kBlockChannels / kLanes<S>);
      for (int64_t block = 0; block < vectors.count; block += per_block) {
        const int64_t block_end = min(vectors.count, block + per_block);
        for (int64_t q = 0; q < width(); q += tile) {
          // The last tile begins so that it ends with the row: those columns are computed twice.
          const int64_t column = max(0, min(q, width() - tile));
          const int64_t done = min(tile, width());
          tile_of.done = done;
          tile_of.first =
              of_input ? column + columns.padding : column * columns.stride - columns.padding;
          for (int64_t v = block; v < block_end; ++v) {
            const int64_t channel = vectors.channel(v);
            ahead.fetch();
            Vec<S> sums[kMostColumns];
            tile_of.x = in + channel;
            tile_of.start =
                bias == nullptr ? Vec<S>{} : load_channels(bias + channel, tile_of.lanes);
            tile_of.weight = packed + v * rows.kernel * columns.kernel * kLanes<S>;
            const int64_t at = out + column * c + channel;
            tile_of.y = plain ? to + at : nullptr;
            sums_of[tile_of.first & 1](tile_of, sums);
            if (plain) continue;
            finish(sums, act, dy == nullptr ? nullptr : dy + at, to + at, done, c, tile_of.lanes);
          }
        }
      }
    }
  }

 private:
  static int64_t last(const RowTap* taps, int64_t count) {
    int64_t row = -1;
    for (int64_t t = 0; t < count; ++t) row = max(row, taps[t].row);
    return row;
  }
};

// sums[q] += sum over a, b of x[row a, first + q * stride + b] * weight[a, b], for strides 1 and 2
// without dilation.
template <class T, int kKernel, int kStride, int kColumns>
void window_sums(const Tile<T>& tile, Vec<Acc<T>>* sums) {
  using S = Acc<T>;
  Vec<S> sum[kColumns];
  unrolled<0, kColumns>([&](auto q) __attribute__((always_inline)) { sum[q.value] = tile.start; });
  for (int64_t t = 0; t < tile.tap_count; ++t) {
    const T* x = tile.row(t) + tile.first * tile.pixel;
    const S* weight = tile.weight_row(t);
    Vec<S> w[kKernel];
    unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
      w[b.value] = load(weight + b.value * kLanes<S>);
    });
    unrolled<0, (kColumns - 1) * kStride + kKernel>([&](auto j) __attribute__((always_inline)) {
      if (tile.holds(tile.first + j.value)) {
        Vec<S> value = load(x + j.value * tile.pixel);
        keep_in_register(value);
        unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
          constexpr int kAt = decltype(j)::value - decltype(b)::value;
          if constexpr (kAt >= 0 && kAt % kStride == 0 && kAt / kStride < kColumns) {
            sum[kAt / kStride] += value * w[b.value];
          }
        });
      }
    });
  }
  put(tile, sum, sums);
}

constexpr int kAnyColumns = 8;  // of a tile of any window

// The same for any stride and dilation: each multiply-add loads its own vector.
template <class T, bool kMasked>
void any_window_sums(const Tile<T>& tile, Vec<Acc<T>>* sums) {
  using S = Acc<T>;
  const WindowAxis& columns = *tile.columns;
  const int64_t lanes = kMasked ? tile.lanes : kLanes<S>, step = columns.stride * tile.pixel;
  Vec<S> sum[kAnyColumns];
  unrolled<0, kAnyColumns>([&](auto q)
                               __attribute__((always_inline)) { sum[q.value] = tile.start; });
  for (int64_t t = 0; t < tile.tap_count; ++t) {
    const T* row = tile.row(t);
    const S* weight = tile.weight_row(t);
    for (int64_t b = 0; b < columns.kernel; ++b, weight += kLanes<S>) {
      const int64_t column = tile.first + b * columns.dilation;
      const T* x = row + column * tile.pixel;
      const Vec<S> w = load(weight);
      unrolled<0, kAnyColumns>([&](auto q) __attribute__((always_inline)) {
        if (tile.holds(column + q.value * columns.stride)) {
          const T* at = x + q.value * step;
          sum[q.value] += (kMasked ? load(at, lanes) : load(at)) * w;
        }
      });
    }
  }
  put(tile, sum, sums);
}

// Sets what runs a window of given sizes on its tiles: known sizes have loops of their own.
template <class T>
void choose_window_sums(Sweep<T>& sweep) {
  using S = Acc<T>;
  const WindowAxis& columns = sweep.columns;
  const auto set = [&](TileSums<T> sums, int tile) {
    sweep.sums_of[0] = sweep.sums_of[1] = sums;
    sweep.tile = tile;
  };
  if (sweep.c < kLanes<S>) return set(any_window_sums<T, true>, kAnyColumns);
  set(any_window_sums<T, false>, kAnyColumns);
  if constexpr (sizeof(S) == sizeof(float)) {
    if (columns.dilation > 1 && columns.kernel > 1) return;
    const int width = tile_width(sweep.width(), 2, 0);
    const auto of_width = [&](auto kernel, auto stride) {
      constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
      if constexpr (kManyRegisters) {
        if (width == 14) return set(window_sums<T, kKernel, kStride, 14>, 14);
      }
      if (width == 8) return set(window_sums<T, kKernel, kStride, 8>, 8);
      set(window_sums<T, kKernel, kStride, 7>, 7);
    };
    const auto of_stride = [&](auto kernel) {
      if (columns.stride == 1) of_width(kernel, Index<1>{});
      if (columns.stride == 2) of_width(kernel, Index<2>{});
    };
    if (columns.kernel == 3) of_stride(Index<3>{});
    if (columns.kernel == 5) of_stride(Index<5>{});
    if (columns.kernel == 7) of_stride(Index<7>{});
  }
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CPU_LEVEL
