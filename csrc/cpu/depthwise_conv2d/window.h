// What the passes of depthwise_conv2d on the CPU share in channels_last: vectors of channels, tiles
// of columns, and the rows that a row is made of.
//
// A vector holds neighbouring channels of a pixel. The last one of a pixel begins at c - lanes and
// overlaps the one before: those channels are computed twice, and no load needs a mask. Only where
// c is below the number of lanes all loads have one.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd/unrolled.h"
#include "cpu/spans.h"
#include "depthwise_conv2d.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

// Columns of a tile, whose sums (or dy) stay in registers beside a row of the kernel: the width
// with the least work for `columns` of them. Networks on images of 224^2 have multiples of 7.
// extra: the work of a tile beside its columns; each column of a rest takes `rest`.
inline int tile_width(int64_t columns, int64_t extra, int64_t rest) {
  int best = 0;
  int64_t least = INT64_MAX;
  constexpr int kWidths[] = {14, 8, 7};
  for (const int width : kWidths) {
    if (width == 14 && !kManyRegisters) continue;
    const int64_t tiles = rest > 0 ? columns / width : ceil_div(columns, width);
    const int64_t work = tiles * (width + extra) + (rest > 0 ? columns % width * rest : 0);
    if (work < least) {
      least = work;
      best = width;
    }
  }
  return best;
}

// The channels of vector v.
struct ChannelVectors {
  int64_t c, lanes, count;

  ChannelVectors(int64_t c, int64_t lanes) : c(c), lanes(lanes), count(ceil_div(c, lanes)) {}
  int64_t channel(int64_t v) const { return max(0, min(v * lanes, c - lanes)); }
  // The first of its lanes that no vector before it has.
  int64_t first_own(int64_t v) const { return v * lanes - channel(v); }
  int64_t width() const { return min(lanes, c); }
};

// The channels of a vector: all lanes, but where c is below that.
template <class T>
inline __attribute__((always_inline)) Vec<Acc<T>> load_channels(const T* p, int64_t lanes) {
  return lanes == kLanes<Acc<T>> ? load(p) : load(p, lanes);
}

// A row that a row of the result is made of, and the row of the kernel that it meets.
struct RowTap {
  int64_t row, kernel_row;
};

// Rows of x that row `out` of y is made of: in the order of the kernel's rows, those in the image.
inline int64_t row_taps(const WindowAxis& rows, int64_t out, RowTap* taps) {
  int64_t count = 0;
  for (int64_t a = 0; a < rows.kernel; ++a) {
    const int64_t row = out * rows.stride + a * rows.dilation - rows.padding;
    if (row >= 0 && row < rows.size) taps[count++] = {row, a};
  }
  return count;
}

// Rows of dy that row `row` of x has a part in.
inline int64_t row_taps_of_input(const WindowAxis& rows, int64_t row, RowTap* taps) {
  int64_t count = 0;
  for (int64_t a = 0; a < rows.kernel; ++a) {
    const int64_t at = row + rows.padding - a * rows.dilation;
    if (at >= 0 && at % rows.stride == 0 && at / rows.stride < rows.size_out) {
      taps[count++] = {at / rows.stride, a};
    }
  }
  return count;
}

// Memory that is read for the next row, fetched a few lines at a time while this row is worked on,
// in the order of addresses: the processor's own prefetcher then follows. Asked for tile by tile,
// in lines that lie a pixel apart, 7x7 forward over 8x384x14x14 float32 ran at 76 GFLOP/s, in this
// order at 90 (a core of an Intel Xeon with AVX-512). Fetching what is written made no difference.
class Prefetcher {
 public:
  // `count` elements, over so many calls of fetch().
  template <class T>
  Prefetcher(const T* from, int64_t count, int64_t calls)
      : at_(reinterpret_cast<const char*>(from)),
        lines_(ceil_div(max(0, count) * static_cast<int64_t>(sizeof(T)), kLine)),
        per_call_(ceil_div(lines_, max(1, calls))) {}

  inline __attribute__((always_inline)) void fetch() {
    const int64_t count = min(per_call_, lines_);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += count * kLine;
    lines_ -= count;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_;
  int64_t lines_, per_call_;
};

// One vector of channels in one tile of columns.
template <class T>
struct Tile {
  const RowTap* taps;  // [tap_count]
  int64_t tap_count;
  const T* x;            // the image that rows are read of, at the vector's first channel
  int64_t first;         // the column that is read first, maybe outside of the image
  int64_t width;         // columns of the image
  int64_t pixel;         // elements from pixel to pixel
  const Acc<T>* weight;  // [kernel_h, kernel_w, lanes]
  Vec<Acc<T>> start;     // what a sum begins with
  T* y;                  // where sums go as they are; null: to the caller
  int64_t done;          // columns of y, at most the tile's
  int64_t lanes;
  const WindowAxis* columns;

  const T* row(int64_t tap) const { return x + taps[tap].row * width * pixel; }
  const Acc<T>* weight_row(int64_t tap) const {
    return weight + taps[tap].kernel_row * columns->kernel * kLanes<Acc<T>>;
  }
  bool holds(int64_t column) const {
    return static_cast<uint64_t>(column) < static_cast<uint64_t>(width);
  }
};

// Sums of a tile, to tile.y or to sums.
template <int kColumns, class T>
inline __attribute__((always_inline)) void put(const Tile<T>& tile,
                                               const Vec<Acc<T>> (&sum)[kColumns],
                                               Vec<Acc<T>>* sums) {
  unrolled<0, kColumns>([&](auto q) __attribute__((always_inline)) {
    if (tile.y == nullptr) {
      sums[q.value] = sum[q.value];
    } else if (q.value < tile.done) {
      store(tile.y + q.value * tile.pixel, sum[q.value]);
    }
  });
}

template <class T>
using TileSums = void (*)(const Tile<T>&, Vec<Acc<T>>*);

// y[columns] = what becomes of the sums.
template <class T>
using Finish = void (*)(const Vec<Acc<T>>* sums, Act act, const T* dy, T* y, int64_t columns,
                        int64_t pixel, int64_t lanes);

// y = act(z), of as many pixels at a time as the activation takes.
template <class T, class A>
void finish_act(const Vec<Acc<T>>* sums, Act number, const T*, T* y, int64_t columns, int64_t pixel,
                int64_t lanes) {
  using S = Acc<T>;
  const A act(number);
  const auto finish = [&](auto count, int64_t q) __attribute__((always_inline)) {
    Vec<S> values[count.value];
    for (int i = 0; i < count.value; ++i) values[i] = sums[q + i];
    act.fwd(values);
    for (int i = 0; i < count.value; ++i, y += pixel) {
      if (lanes == kLanes<S>) {
        store(y, values[i]);
      } else {
        store(y, values[i], lanes);
      }
    }
  };
  int64_t q = 0;
  for (; q + A::kVectors <= columns; q += A::kVectors) finish(Index<A::kVectors>{}, q);
  for (; q < columns; ++q) finish(Index<1>{}, q);
}

// y = dy * act'(z)
template <class T>
void finish_act_bwd(const Vec<Acc<T>>* sums, Act number, const T* dy, T* y, int64_t columns,
                    int64_t pixel, int64_t lanes) {
  const CalledAct act(number);
  for (int64_t q = 0; q < columns; ++q, y += pixel, dy += pixel) {
    const Vec<Acc<T>> dz = act_bwd_one(act, load_channels(dy, lanes), sums[q]);
    if (lanes == kLanes<Acc<T>>) {
      store(y, dz);
    } else {
      store(y, dz, lanes);
    }
  }
}

// An activation that is compiled into its loop, of several vectors at a time.
template <Act act>
struct SeveralAct {
  static constexpr int kVectors = 4;

  explicit SeveralAct(Act) {}
  template <class V, int kCount>
  void fwd(V (&z)[kCount]) const {
    EachAct<V>::template fwd<act>(z);
  }
};

template <class T>
Finish<T> choose_finish(Act act, bool backward) {
  if (backward) return finish_act_bwd<T>;
  if constexpr (sizeof(Acc<T>) == sizeof(float)) {
    if (act == Act::kLeakyRelu) return finish_act<T, SeveralAct<Act::kLeakyRelu>>;
    if (act == Act::kSilu) return finish_act<T, SeveralAct<Act::kSilu>>;
    if (act == Act::kGelu) return finish_act<T, SeveralAct<Act::kGelu>>;
    if (act == Act::kSigmoid) return finish_act<T, SeveralAct<Act::kSigmoid>>;
    if (act == Act::kHardswish) return finish_act<T, SeveralAct<Act::kHardswish>>;
  }
  return dispatch_act<Acc<T>>(
      act, [](auto of) -> Finish<T> { return finish_act<T, typename decltype(of)::type>; });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
