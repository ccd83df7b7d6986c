// dropout on the CPU.
//
// Data movement: x (and residual) are read and y is written once, 2T or 3T; the mask exists in
// registers only, and for channels_last as 2 bytes a channel. One Philox of kCounters lanes serves
// kUnit = 16, 32 or 64 elements:
//   flat           NCHW, and where images have one pixel or one channel: neighbours in memory are
//                  neighbours in logical index, so kCounters blocks in a row are kUnit elements.
//   channels_last  8 pixels of all channels at a time: kCounters channels side by side, and each
//                  pixel tests one bit of its channels' windows (cpu/simd/dropout_mask_vec.h).
//   per channel    the bits of the channels first, then their pixels times one factor each.
#include "dropout.h"

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd/dropout_mask_vec.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

KeepVector keep_of(const DropoutParams& p) {
  return KeepVector(Keep(static_cast<uint64_t>(*p.seed), p.threshold));
}

// The images of a call, offset to some element. A residual that is not there stays null.
template <class T>
struct Images {
  const T *x, *residual;
  T* y;

  explicit Images(const DropoutParams& p)
      : x(static_cast<const T*>(p.x)),
        residual(static_cast<const T*>(p.residual)),
        y(static_cast<T*>(p.y)) {}
};

// A multiplication, not a selection: as in PyTorch, a NaN that is dropped stays a NaN.
template <class T, bool kAdd>
inline __attribute__((always_inline)) void apply(const Images<T>& t, int64_t o, int64_t count,
                                                 Vec<Acc<T>> factor) {
  Vec<Acc<T>> z = load(t.x + o, count) * factor;
  if constexpr (kAdd) z += load(t.residual + o, count);
  store(t.y + o, z, count);
}

// kUnit elements from o on, kept by the bits.
template <class T, bool kAdd>
inline __attribute__((always_inline)) void apply_unit(const Images<T>& t, int64_t o, uint64_t bits,
                                                      Vec<Acc<T>> scale) {
  constexpr int kLane = kLanes<Acc<T>>;
#pragma GCC unroll 8
  for (int u = 0; u < kUnit; u += kLane) {
    apply<T, kAdd>(t, o + u, kLane, kept<Acc<T>>(bits >> u, scale));
  }
}

// The first `count` of them.
template <class T, bool kAdd>
void apply_part(const Images<T>& t, int64_t o, int64_t count, uint64_t bits, Vec<Acc<T>> scale) {
  constexpr int kLane = kLanes<Acc<T>>;
  for (int64_t u = 0; u < count; u += kLane) {
    apply<T, kAdd>(t, o + u, min(kLane, count - u), kept<Acc<T>>(bits >> u, scale));
  }
}

// ---- one draw an element -----------------------------------------------------------------------

template <class T, bool kAdd>
void run_flat(const DropoutParams& p) {
  const KeepVector keep = keep_of(p);
  const int64_t numel = p.shape.numel();
  // At least 16K elements a task, so that the work outweighs waking a thread.
  const int64_t chunk = max(1 << 14, ceil_div(ceil_div(numel, kTasks), kUnit) * kUnit);
  const auto run = [&](int64_t task) {
    // Local, so that no store into y may change them.
    const Images<T> t(p);
    const Vec<Acc<T>> scale = splat(static_cast<Acc<T>>(p.scale));
    const int64_t last = min(numel, (task + 1) * chunk);
    int64_t i = task * chunk;
    uint64_t bits[2];
    for (; i + 2 * kUnit <= last; i += 2 * kUnit) {
      keep_bits(keep, block_lanes(static_cast<uint64_t>(i) / kKeepBlock, 1), bits);
      apply_unit<T, kAdd>(t, i, bits[0], scale);
      apply_unit<T, kAdd>(t, i + kUnit, bits[1], scale);
    }
    if (i < last) {
      keep_bits(keep, block_lanes(static_cast<uint64_t>(i) / kKeepBlock, 1), bits);
      apply_part<T, kAdd>(t, i, min(kUnit, last - i), bits[0], scale);
      apply_part<T, kAdd>(t, i + kUnit, last - i - kUnit, bits[1], scale);
    }
  };
  parallel_for(ceil_div(numel, chunk), 1, run);
}

// How channels_last images are cut: a task is a range of pixels of one image, whole blocks of 8.
struct PixelRanges {
  int64_t parts, pixels, tasks, grain;

  explicit PixelRanges(const ImageShape& s) {
    // At least 8 blocks a task, since it may have to draw one ahead.
    const int64_t blocks = ceil_div(s.hw, kKeepBlock);
    pixels = max(8, ceil_div(blocks, ceil_div(kTasks, s.n))) * kKeepBlock;
    parts = ceil_div(s.hw, pixels);
    tasks = s.n * parts;
    grain = task_grain(tasks, s.numel());
  }
  int64_t image(int64_t task) const { return task / parts; }
  int64_t first(int64_t task) const { return task % parts * pixels; }
  int64_t last(int64_t task, int64_t hw) const { return min(hw, first(task) + pixels); }
};

template <class T, bool kAdd>
void run_channels_last(const DropoutParams& p) {
  const KeepVector keep = keep_of(p);
  const int64_t c = p.shape.c, hw = p.shape.hw, padded = ceil_div(c, kUnit) * kUnit;
  const uint64_t stride = static_cast<uint64_t>(hw);  // from channel to channel
  // Where planes are whole blocks every phase is 0 and a window needs no next block: its own is
  // drawn into the upper half and read there.
  const int64_t ahead = hw % kKeepBlock == 0 ? 0 : kKeepBlock;
  const PixelRanges ranges(p.shape);
  const auto run = [&](int64_t task) {
    const Images<T> t(p);
    const Vec<Acc<T>> scale = splat(static_cast<Acc<T>>(p.scale));
    const int64_t image = ranges.image(task), last = ranges.last(task, hw);
    Scratch<uint16_t> windows(padded), places(padded);
    // Logical index of a channel's element at `pixel`.
    const auto index = [&](int64_t j, int64_t pixel) { return (image * c + j) * hw + pixel; };
    const auto draw = [&](int64_t pixel) {
      WideWordPair first = block_lanes(static_cast<uint64_t>(index(0, pixel)), stride);
      for (int64_t j = 0; j < c; j += 2 * kCounters) {
        uint64_t bits[2];
        keep_bits(keep, first >> 3, bits);
        push_blocks(windows.get() + j, bits[0]);
        push_blocks(windows.get() + j + kCounters, bits[1]);
        first.a += 2 * kCounters * stride;
        first.b += 2 * kCounters * stride;
      }
    };
    int64_t pixel = ranges.first(task);
    for (int64_t j = 0; j < c; ++j) {
      places[j] =
          static_cast<uint16_t>(ahead ? 1 << index(j, pixel) % kKeepBlock : 1 << kKeepBlock);
    }
    if (ahead) draw(pixel);
    for (; pixel < last; pixel += kKeepBlock) {
      draw(pixel + ahead);
      const int rows = static_cast<int>(min(kKeepBlock, last - pixel));
      for (int row = 0; row < rows; ++row) {
        const int64_t o = (image * hw + pixel + row) * c;
        int64_t j = 0;
        for (; j + kUnit <= c; j += kUnit) {
          const uint64_t bits = window_bits(windows.get() + j, places.get() + j, row);
          apply_unit<T, kAdd>(t, o + j, bits, scale);
        }
        if (j < c) {
          const uint64_t bits = window_bits(windows.get() + j, places.get() + j, row);
          apply_part<T, kAdd>(t, o + j, c - j, bits, scale);
        }
      }
    }
  };
  parallel_for(ranges.tasks, ranges.grain, run);
}

// ---- one draw a channel ------------------------------------------------------------------------

// factors[i] of draw first + i.
template <class S>
void draw_factors(const DropoutParams& p, int64_t first, int64_t count, S* factors) {
  const KeepVector keep = keep_of(p);
  const int64_t begin = first / kKeepBlock * kKeepBlock;
  for (int64_t i = begin; i < first + count; i += 2 * kUnit) {
    uint64_t bits[2];
    keep_bits(keep, block_lanes(static_cast<uint64_t>(i) / kKeepBlock, 1), bits);
    for (int64_t j = max(i, first); j < min(i + 2 * kUnit, first + count); ++j) {
      const bool kept = bits[(j - i) / kUnit] >> (j - i) % kUnit & 1;
      factors[j - first] = kept ? static_cast<S>(p.scale) : S(0);
    }
  }
}

// `rows` spans of `length` neighbouring elements times factors in step with a span, or one for all.
template <class T, bool kAdd, bool kArray>
void scale_spans(const Images<T>& t, int64_t o, int64_t rows, int64_t length,
                 const Acc<T>* factors) {
  using S = Acc<T>;
  const PerChannel<S, kArray> factor{factors};
  for_each_block<S>(
      rows, length,
      [&](auto block, int64_t row, int64_t i, int64_t count) __attribute__((always_inline)) {
        const Vec<S> f = factor.at(i);
#pragma GCC unroll 4
        for (int u = 0; u < block.value; ++u) {
          apply<T, kAdd>(t, o + (row + u) * length + i, count, f);
        }
      });
}

template <class T, bool kAdd>
void run_planes(const DropoutParams& p) {
  const Images<T> t(p);
  const int64_t planes = p.shape.n * p.shape.c, hw = p.shape.hw;
  const int64_t chunk = max(kKeepBlock, ceil_div(planes, kTasks * kKeepBlock) * kKeepBlock);
  const int64_t tasks = ceil_div(planes, chunk);
  const auto run = [&](int64_t task) {
    const int64_t first = task * chunk, count = min(chunk, planes - first);
    Scratch<Acc<T>> factors(count);
    draw_factors(p, first, count, factors.get());
    for (int64_t i = 0; i < count; ++i) {
      scale_spans<T, kAdd, false>(t, (first + i) * hw, 1, hw, factors.get() + i);
    }
  };
  parallel_for(tasks, task_grain(tasks, p.shape.numel()), run);
}

template <class T, bool kAdd>
void run_channels(const DropoutParams& p) {
  using S = Acc<T>;
  const Images<T> t(p);
  const int64_t c = p.shape.c, hw = p.shape.hw;
  // Spans of several pixels where there are few channels: a loop worth its start.
  const int64_t repeat = max(1, 8 * kLanes<S> / c), wide = repeat * c;
  const PixelRanges ranges(p.shape);
  const auto run = [&](int64_t task) {
    const int64_t image = ranges.image(task), first = ranges.first(task);
    const int64_t pixels = ranges.last(task, hw) - first, o = (image * hw + first) * c;
    Scratch<S> factors(wide + kLanes<S>);  // PerChannel reads whole vectors
    draw_factors(p, image * c, c, factors.get());
    for (int64_t i = c; i < wide; ++i) factors[i] = factors[i - c];
    const int64_t rows = pixels / repeat;
    scale_spans<T, kAdd, true>(t, o, rows, wide, factors.get());
    scale_spans<T, kAdd, true>(t, o + rows * wide, 1, pixels % repeat * c, factors.get());
  };
  parallel_for(ranges.tasks, ranges.grain, run);
}

template <class T, bool kAdd>
void run(const DropoutParams& p) {
  const ImageShape& s = p.shape;
  if (s.hw == 1 || (!p.per_channel && (!s.channels_last || s.c == 1))) return run_flat<T, kAdd>(p);
  if (!p.per_channel) return run_channels_last<T, kAdd>(p);
  s.channels_last ? run_channels<T, kAdd>(p) : run_planes<T, kAdd>(p);
}

}  // namespace

void dropout_apply_cpu(const DropoutParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.residual != nullptr ? run<T, true>(p) : run<T, false>(p);
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
