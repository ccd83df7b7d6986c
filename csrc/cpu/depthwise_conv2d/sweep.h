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

constexpr int64_t kBlockChannels = 64;
constexpr int kMostColumns = 14;  // of a tile
constexpr int64_t kNoRing = INT64_MAX;

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
  // What is read lies in a ring of so many rows: row r of it at (first_row + r) % ring.
  int64_t first_row = 0, ring = kNoRing;

  int64_t height() const { return of_input ? rows.size : rows.size_out; }
  int64_t width() const { return of_input ? columns.size : columns.size_out; }
  int64_t read_height() const { return of_input ? rows.size_out : rows.size; }
  int64_t read_width() const { return of_input ? columns.size_out : columns.size; }
  int64_t taps_of(int64_t row, RowTap* taps) const {
    const int64_t count = (of_input ? row_taps_of_input : row_taps)(rows, row, taps);
    for (int64_t t = 0; t < count && ring != kNoRing; ++t) {
      taps[t].row = (first_row + taps[t].row) % ring;
    }
    return count;
  }

  // Weights as a sweep reads them: [vectors, kernel_h, kernel_w, lanes].
  int64_t packed_size(const ChannelVectors& vectors) const {
    return vectors.count * rows.kernel * columns.kernel * kLanes<S>;
  }
  void pack(const ChannelVectors& vectors, S* packed) const {
    const int64_t taps = rows.kernel * columns.kernel;
    parallel_for(vectors.count, task_grain(vectors.count, c * taps), [&](int64_t v) {
      S* out = packed + v * taps * kLanes<S>;
      const S* in = weight + vectors.channel(v) * taps;
      for (int64_t lane = 0; lane < vectors.width(); ++lane, in += taps) {
        for (int64_t t = 0; t < taps; ++t) {
          out[t * kLanes<S> + lane] = in[flipped ? taps - 1 - t : t];
        }
      }
    });
  }

  void run() const {
    const ChannelVectors vectors(c, kLanes<S>);
    const Scratch<S> packed(packed_size(vectors));
    pack(vectors, packed.get());
    const int64_t all = n * height();
    parallel_ranges(all, task_grain(all, all * width() * c),
                    [&](int64_t begin, int64_t end) { sweep(vectors, packed.get(), begin, end); });
  }

  // Rows [begin, end) of the results of all images.
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
      const int64_t fetch = last(now, count) + 1,
                    fetch_end = more && ring == kNoRing ? last(next, coming) + 1 : 0;
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

constexpr int kAnyColumns = 8;  // of a tile of any window

// Sets what runs a window of given sizes on its tiles: known sizes have loops of their own. They
// are most of what there is to compile, once: in fwd.cpp.
template <class T>
void choose_window_sums(Sweep<T>& sweep);

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
