// conv2d_bwd_weight on CPUs with a bfloat16 dot product.
//
// One product of matrices: dweight [c_out, taps * c_in] = dy^T [c_out, pixels] * columns [pixels,
// taps * c_in], where a tap is one place of the kernel and its columns are x, shifted. The
// instruction multiplies pairs along the sum, here pixels, which lie c apart in memory: both sides
// are packed into pairs first, a chunk of pixels at a time, into the caches.
//
//   a panel   [pairs, 16] pairs of neighbouring pixels of 16 output channels, broadcast one by one
//   a strip   [pairs, 32] the same of 32 input channels of one tap: two vectors
//   a tile    [16, 32] of dweight: 8 of its rows stay in registers over a chunk
//
// Places outside the image are multiplied as zeros: an infinite dy at the border gives NaN there,
// where a kernel that leaves them out gives infinity.
//
// A task owns some tiles (at most kTaskBytes, so that they stay in the L2 cache) over a split of
// the pixels. Splits are summed at the end, in their order: the result depends on the shape alone.
// Bytes: x is read kernel_h * kernel_w times, mostly from cache; dy once for each of a task's rows
// of tiles. Arithmetic decides: 2 * pixels * taps * c_in * c_out operations.
#include "conv2d_bwd_weight.h"

#include <immintrin.h>

#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kLane = 16, kStrip = 2 * kLane, kTile = kLane * kStrip;
// Pixels of a chunk: a strip (25 KiB) and a panel (12 KiB) fit in a 48 KiB L1 cache; a tile is
// loaded and stored once a chunk.
constexpr int64_t kChunk = 400, kPairs = kChunk / 2;
constexpr int64_t kTaskBytes = 512 << 10;
constexpr int64_t kSplitPixels = 784;              // at least, in a split
constexpr int64_t kSplitBytes = int64_t{8} << 20;  // at most, of all splits' tiles

// How dweight is cut.
struct Plan {
  int64_t panels, strips;  // of the whole: c_out in 16s (an even number), taps * c_in in 32s
  int64_t strips_per_tap;
  int64_t panels_per_task, strips_per_task, across, down;  // tasks side by side, and below
  int64_t splits, pixels_per_split, chunk, pixels;

  explicit Plan(const Conv2dBwdWeightParams& p) {
    panels = ceil_div(p.c_out, kStrip) * 2;
    strips_per_tap = ceil_div(p.c_in, kStrip);
    strips = p.kernel_h * p.kernel_w * strips_per_tap;
    panels_per_task = min(panels, 16);
    down = ceil_div(panels, panels_per_task);
    const int64_t tiles = kTaskBytes / (kTile * static_cast<int64_t>(sizeof(float)));
    across = ceil_div(strips, max(1, tiles / panels_per_task));
    strips_per_task = ceil_div(strips, across);
    across = ceil_div(strips, strips_per_task);
    pixels = p.n * p.h_out * p.w_out;
    splits = 1;
    while (splits * across * down < kTasks / 8 && pixels >= 2 * splits * kSplitPixels &&
           2 * splits * tile_count() * kTile * static_cast<int64_t>(sizeof(float)) <= kSplitBytes) {
      splits *= 2;
    }
    const int64_t share = ceil_div(pixels, splits);
    chunk = ceil_div(ceil_div(share, ceil_div(share, kChunk)), 2) * 2;
    pixels_per_split = ceil_div(share, chunk) * chunk;
    splits = ceil_div(pixels, pixels_per_split);  // none is empty
  }
  int64_t tile_count() const { return panels * strips; }
  int64_t tasks() const { return splits * across * down; }
};

// Rows a and b of 32 channels -> pairs (a, b): `low` of channels 0-3, 8-11, 16-19 and 24-27, `high`
// of the others, which is the order in which the instructions give them. channel_of() undoes it.
inline void pack_pair(const uint16_t* a, const uint16_t* b, __mmask32 mask_a, __mmask32 mask_b,
                      uint32_t* low, uint32_t* high) {
  const __m512i row_a = _mm512_maskz_loadu_epi16(mask_a, a);
  const __m512i row_b = _mm512_maskz_loadu_epi16(mask_b, b);
  _mm512_store_si512(low, _mm512_unpacklo_epi16(row_a, row_b));
  _mm512_store_si512(high, _mm512_unpackhi_epi16(row_a, row_b));
}

// The channel, of 32, of a panel's row; `panel` is 0 for the low half, 1 for the high one.
inline int64_t channel_of(int64_t panel, int64_t row) { return row / 4 * 8 + panel * 4 + row % 4; }

inline __mmask32 channels_mask(int64_t channels) {
  return channels >= kStrip ? 0xffffffffu : (__mmask32{1} << channels) - 1;
}

// tile[8][32] (+)= panel[pairs][8 of 16]^T * strip[pairs][32]
template <bool kFirst>
void multiply(const uint32_t* panel, const uint32_t* strip, int64_t pairs, float* tile) {
  constexpr int kRows = 8;
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = kFirst ? _mm512_setzero_ps() : _mm512_load_ps(tile + r * kStrip);
    sums[r][1] = kFirst ? _mm512_setzero_ps() : _mm512_load_ps(tile + r * kStrip + kLane);
  }
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh low = (__m512bh)_mm512_load_si512(strip + k * kStrip);
    const __m512bh high = (__m512bh)_mm512_load_si512(strip + k * kStrip + kLane);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(panel[k * kLane + r]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, low);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, high);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_ps(tile + r * kStrip, sums[r][0]);
    _mm512_store_ps(tile + r * kStrip + kLane, sums[r][1]);
  }
}

// Memory that the next chunk will read, fetched into the L2 cache a few lines at a time while this
// one is multiplied: packing reads faster than the hardware's own prefetchers see it coming.
class Prefetcher {
 public:
  Prefetcher(const uint16_t* const* rows, int64_t count, int64_t width, int64_t calls)
      : rows_(rows), end_(rows + count), width_(width) {
    per_call_ = ceil_div(count * ceil_div(width, kLine), max(calls, 1));
  }

  void fetch() {
    for (int64_t i = 0; i < per_call_ && rows_ < end_; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(*rows_ + at_), _MM_HINT_T1);
      at_ += kLine;
      if (at_ >= width_) {
        at_ = 0;
        ++rows_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(uint16_t);
  const uint16_t *const *rows_, *const *end_;
  int64_t width_, per_call_, at_ = 0;
};

// One task: its tiles over its split of the pixels, chunk by chunk.
class Task {
 public:
  Task(const Conv2dBwdWeightParams& p, const Plan& plan, float* partial, int64_t task)
      : p_(p),
        plan_(plan),
        split_(task / (plan.across * plan.down)),
        first_panel_(task / plan.across % plan.down * plan.panels_per_task),
        first_strip_(task % plan.across * plan.strips_per_task),
        last_panel_(min(plan.panels, first_panel_ + plan.panels_per_task)),
        last_strip_(min(plan.strips, first_strip_ + plan.strips_per_task)),
        tiles_(partial + split_ * plan.tile_count() * kTile),
        panels_(plan.panels_per_task * kPairs * kLane, Fill::kNothing),
        strip_(kPairs * kStrip, Fill::kNothing),
        rows_(kChunk, Fill::kNothing),
        next_dy_(kChunk, Fill::kNothing),
        next_x_(kChunk, Fill::kNothing),
        zeros_(p.c_in) {}

  void run() {
    const int64_t begin = split_ * plan_.pixels_per_split;
    const int64_t end = min(plan_.pixels, begin + plan_.pixels_per_split);
    for (int64_t pixel = begin; pixel < end; pixel += plan_.chunk) {
      const int64_t pixels = min(plan_.chunk, end - pixel), pairs = ceil_div(pixels, 2);
      pack_panels(pixel, pixels);
      const int64_t next = pixel + plan_.chunk, coming = max(0, min(plan_.chunk, end - next));
      const int64_t calls = (last_strip_ - first_strip_) * (last_panel_ - first_panel_);
      const int64_t channel = first_panel_ * kLane;
      for (int64_t k = 0; k < coming; ++k) {
        next_dy_[k] = p_.dy + (next + k) * p_.c_out + channel;
      }
      Prefetcher dy(next_dy_.get(), coming,
                    min(p_.c_out - channel, (last_panel_ - first_panel_) * kLane), calls);
      if (coming > 0) find_rows(first_strip_ / plan_.strips_per_tap, next, coming, next_x_.get());
      Prefetcher x(next_x_.get(), coming, p_.c_in, calls);
      int64_t tap = -1;
      for (int64_t strip = first_strip_; strip < last_strip_; ++strip) {
        if (strip / plan_.strips_per_tap != tap) {
          tap = strip / plan_.strips_per_tap;
          find_rows(tap, pixel, pixels, rows_.get());
        }
        pack_strip(strip % plan_.strips_per_tap * kStrip, pixels);
        for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
          const uint32_t* a = panels_.get() + (panel - first_panel_) * kPairs * kLane;
          dy.fetch();
          x.fetch();
          float* tile = tiles_ + (panel * plan_.strips + strip) * kTile;
          for (int64_t half = 0; half < 2; ++half) {
            (pixel == begin ? multiply<true> : multiply<false>)(a + half * kLane / 2, strip_.get(),
                                                                pairs, tile + half * kTile / 2);
          }
        }
      }
    }
  }

 private:
  void pack_panels(int64_t pixel, int64_t pixels) {
    for (int64_t k = 0; k < pixels; k += 2) {
      const uint16_t* row = p_.dy + (pixel + k) * p_.c_out;
      const bool second = k + 1 < pixels;
      for (int64_t panel = first_panel_; panel < last_panel_; panel += 2) {
        const int64_t channel = panel * kLane;
        const __mmask32 mask = channels_mask(p_.c_out - channel);
        uint32_t* out = panels_.get() + ((panel - first_panel_) * kPairs + k / 2) * kLane;
        pack_pair(row + channel, row + p_.c_out + channel, mask, second ? mask : 0, out,
                  out + kPairs * kLane);
      }
    }
  }

  // Where each pixel of the chunk reads x at a tap: zeros outside the image. Row by row of dy.
  void find_rows(int64_t tap, int64_t pixel, int64_t pixels, const uint16_t** rows) {
    const int64_t down = tap / p_.kernel_w * p_.dilation_h - p_.padding_h;
    const int64_t right = tap % p_.kernel_w * p_.dilation_w - p_.padding_w;
    const uint16_t* zeros = zeros_.get();
    for (int64_t k = 0; k < pixels;) {
      const int64_t row = (pixel + k) / p_.w_out, first = (pixel + k) % p_.w_out;
      const int64_t run = min(pixels - k, p_.w_out - first);
      const int64_t y = row % p_.h_out * p_.stride_h + down;
      if (y < 0 || y >= p_.h) {
        for (int64_t i = 0; i < run; ++i) rows[k + i] = zeros;
      } else {
        const uint16_t* image_row = p_.x + (row / p_.h_out * p_.h + y) * p_.w * p_.c_in;
        int64_t x = first * p_.stride_w + right;
        for (int64_t i = 0; i < run; ++i, x += p_.stride_w) {
          rows[k + i] = x >= 0 && x < p_.w ? image_row + x * p_.c_in : zeros;
        }
      }
      k += run;
    }
    if (pixels % 2 != 0) rows[pixels] = zeros;
  }

  void pack_strip(int64_t channel, int64_t pixels) {
    const __mmask32 mask = channels_mask(p_.c_in - channel);
    uint32_t* out = strip_.get();
    for (int64_t k = 0; k < pixels; k += 2, out += kStrip) {
      pack_pair(rows_[k] + channel, rows_[k + 1] + channel, mask, mask, out, out + kLane);
    }
  }

  const Conv2dBwdWeightParams& p_;
  const Plan& plan_;
  int64_t split_, first_panel_, first_strip_, last_panel_, last_strip_;
  float* tiles_;
  Scratch<uint32_t> panels_, strip_;
  Scratch<const uint16_t*> rows_, next_dy_, next_x_;
  Scratch<uint16_t> zeros_;
};

// One tile: the sum of its splits, in their order, rounded.
void finalize(const Conv2dBwdWeightParams& p, const Plan& plan, const float* partial,
              int64_t tile) {
  const int64_t strip = tile % plan.strips, panel = tile / plan.strips;
  const int64_t tap = strip / plan.strips_per_tap, taps = p.kernel_h * p.kernel_w;
  const int64_t channel = strip % plan.strips_per_tap * kStrip;
  const __mmask32 mask = channels_mask(p.c_in - channel);
  // The four neighbouring channels of a lane of `low`, then those of `high`, and so on.
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t r = 0; r < kLane; ++r) {
    const int64_t out_channel = panel / 2 * kStrip + channel_of(panel % 2, r);
    if (out_channel >= p.c_out) continue;
    const float* row = partial + tile * kTile + r * kStrip;
    __m512 low = _mm512_load_ps(row), high = _mm512_load_ps(row + kLane);
    for (int64_t split = 1; split < plan.splits; ++split) {
      row += plan.tile_count() * kTile;
      low = _mm512_add_ps(low, _mm512_load_ps(row));
      high = _mm512_add_ps(high, _mm512_load_ps(row + kLane));
    }
    const __m512 front = _mm512_permutex2var_ps(low, first, high);
    const __m512 back = _mm512_permutex2var_ps(low, last, high);
    uint16_t* out = p.dweight + (out_channel * taps + tap) * p.c_in + channel;
    _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(back, front));
  }
}

}  // namespace

void conv2d_bwd_weight_cpu(const Conv2dBwdWeightParams& p) {
  const Plan plan(p);
  const Scratch<float> partial(plan.splits * plan.tile_count() * kTile, Fill::kNothing);
  const auto task = [&](int64_t i) { Task(p, plan, partial.get(), i).run(); };
  parallel_for(plan.tasks(), 1, task);
  const auto tile = [&](int64_t i) { finalize(p, plan, partial.get(), i); };
  parallel_for(plan.tile_count(), 16, tile);
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
