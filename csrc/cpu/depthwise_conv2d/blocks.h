// depthwise_conv2d on the CPU in NCHW: by the loops of channels_last.
//
// As many planes as a vector has lanes are brought side by side, as float: [pixels, lanes], a band
// of rows at a time that fits into the L2 cache (kBandElements). The sums go back the same way,
// through the activation. Both are transpositions in registers, two shuffles a vector for each
// doubling of the lanes. Vectors along a row would be half empty where images are small: 7 columns
// in 16 lanes. x is read and y written once but for the kernel_h - 1 rows that two bands share.
#pragma once

#include "cpu/depthwise_conv2d/sweep.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kBandElements = 1 << 17;

template <class S>
struct SignedOf {
  using type = int32_t;
};
template <>
struct SignedOf<double> {
  using type = int64_t;
};

// What exchanges the lanes of two vectors that lie kStep apart, where kStep is set in their number.
template <class S, int kStep>
struct Exchange {
  alignas(kVectorBytes) typename SignedOf<S>::type low[kLanes<S>]{}, high[kLanes<S>]{};

  constexpr Exchange() {
    for (int lane = 0; lane < kLanes<S>; ++lane) {
      low[lane] = (lane & kStep) != 0 ? kLanes<S> + lane - kStep : lane;
      high[lane] = (lane & kStep) != 0 ? kLanes<S> + lane : lane + kStep;
    }
  }
};

template <class S, int kStep = 1>
inline __attribute__((always_inline)) void transpose(Vec<S> (&rows)[kLanes<S>]) {
  if constexpr (kStep < kLanes<S>) {
    static constexpr Exchange<S, kStep> kExchange;
    Vec<typename SignedOf<S>::type> low, high;
    std::memcpy(&low, kExchange.low, sizeof low);
    std::memcpy(&high, kExchange.high, sizeof high);
    unrolled<0, kLanes<S>>([&](auto i) __attribute__((always_inline)) {
      constexpr int kRow = decltype(i)::value;
      if constexpr ((kRow & kStep) == 0) {
        const Vec<S> a = rows[kRow], b = rows[kRow + kStep];
        rows[kRow] = __builtin_shuffle(a, b, low);
        rows[kRow + kStep] = __builtin_shuffle(a, b, high);
      }
    });
    transpose<S, 2 * kStep>(rows);
  }
}

// Planes to pixels [pixels, lanes]; lanes without a channel become 0.
template <class T>
void to_pixels(const T* from, int64_t plane, int64_t channels, int64_t pixels, Acc<T>* to) {
  using S = Acc<T>;
  for_each_vector<S>(
      pixels, [&](int64_t p, int64_t count) __attribute__((always_inline)) {
        Vec<S> rows[kLanes<S>];
        unrolled<0, kLanes<S>>([&](auto i) __attribute__((always_inline)) {
          rows[i.value] = i.value < channels ? load(from + i.value * plane + p, count) : Vec<S>{};
        });
        transpose<S>(rows);
        unrolled<0, kLanes<S>>([&](auto i) __attribute__((always_inline)) {
          if (i.value < count) store(to + (p + i.value) * kLanes<S>, rows[i.value]);
        });
      });
}

// And back, finished.
template <class T>
void to_planes(const Acc<T>* from, int64_t plane, int64_t channels, int64_t pixels,
               Finish<T> finish, Act act, const T* dy, T* to) {
  using S = Acc<T>;
  for_each_vector<S>(
      pixels, [&](int64_t p, int64_t count) __attribute__((always_inline)) {
        Vec<S> rows[kLanes<S>];
        unrolled<0, kLanes<S>>([&](auto i) __attribute__((always_inline)) {
          rows[i.value] = i.value < count ? load(from + (p + i.value) * kLanes<S>) : Vec<S>{};
        });
        transpose<S>(rows);
        for (int64_t i = 0; i < channels; ++i) {
          const int64_t at = i * plane + p;
          finish(rows + i, act, dy == nullptr ? nullptr : dy + at, to + at, 1, 0, count);
        }
      });
}

// Rows [begin, end) of a result and the rows [first, last) that they are made of. `rows` is the
// window with both counted from their first.
struct Band {
  int64_t begin, end, first, last;
  WindowAxis rows;

  // of_input: the result is the convolution's input.
  Band(const WindowAxis& whole, bool of_input, int64_t begin, int64_t end)
      : begin(begin), end(end), rows(whole) {
    const int64_t reach = (whole.kernel - 1) * whole.dilation;
    if (of_input) {
      first = max(0, ceil_div(max(0, begin + whole.padding - reach), whole.stride));
      last = min(whole.size_out, (end - 1 + whole.padding) / whole.stride + 1);
      rows.padding = whole.padding + begin - first * whole.stride;
    } else {
      first = max(0, begin * whole.stride - whole.padding);
      last = min(whole.size, (end - 1) * whole.stride + reach - whole.padding + 1);
      rows.padding = whole.padding + first - begin * whole.stride;
    }
    last = max(first, last);
    rows.size = of_input ? end - begin : last - first;
    rows.size_out = of_input ? last - first : end - begin;
  }

  // How many rows of the result fit, with what they are made of.
  static int64_t height(const WindowAxis& whole, bool of_input, int64_t width, int64_t read_width,
                        int64_t lanes) {
    const int64_t reach = (whole.kernel - 1) * whole.dilation;
    const int64_t room = kBandElements / lanes;
    const int64_t of_row =
        of_input ? width + ceil_div(read_width, whole.stride) : width + read_width * whole.stride;
    const int64_t halo = (of_input ? reach / whole.stride : reach) * read_width;
    return max(1, min(of_input ? whole.size : whole.size_out, (room - halo) / of_row));
  }
};

// The weights of a block of channels, [taps, lanes]; 0 where there is no channel.
template <class S>
void pack_block(const S* weight, int64_t channels, int64_t taps, bool flipped, S* to) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(taps * kLanes<S>) * sizeof(S));
  for (int64_t lane = 0; lane < channels; ++lane, weight += taps) {
    for (int64_t t = 0; t < taps; ++t) {
      to[t * kLanes<S> + lane] = weight[flipped ? taps - 1 - t : t];
    }
  }
}

// sweep: the window of one image of kLanes channels of S, with its loops chosen. The rest is of the
// whole call, in planes.
template <class T>
void sweep_blocks(const Sweep<Acc<T>>& sweep, int64_t n, int64_t c, const T* from,
                  const Acc<T>* weight, const Acc<T>* bias, const T* dy, T* to, Act act) {
  using S = Acc<T>;
  constexpr int64_t kWide = kLanes<S>;
  const int64_t height = sweep.height(), width = sweep.width();
  const int64_t read_height = sweep.read_height(), read_width = sweep.read_width();
  const int64_t taps = sweep.rows.kernel * sweep.columns.kernel, blocks = ceil_div(c, kWide);
  const int64_t most = Band::height(sweep.rows, sweep.of_input, width, read_width, kWide);
  const int64_t bands = ceil_div(height, most), tasks = blocks * n * bands;
  const Finish<T> finish = choose_finish<T>(act, dy != nullptr);
  int64_t most_read = 0;
  for (int64_t band = 0; band < bands; ++band) {
    const Band rows(sweep.rows, sweep.of_input, band * most, min(height, (band + 1) * most));
    most_read = max(most_read, rows.last - rows.first);
  }
  const auto run = [&](int64_t begin, int64_t end) {
    const Scratch<S> packed(taps * kWide), start(kWide);
    const Scratch<S> read(most_read * read_width * kWide, Fill::kNothing);
    const Scratch<S> made(most * width * kWide, Fill::kNothing);
    const ChannelVectors vectors(kWide, kWide);
    int64_t packed_block = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / (n * bands), image = task / bands % n, channel = block * kWide;
      const int64_t channels = min(kWide, c - channel), plane = image * c + channel;
      if (block != packed_block) {
        pack_block(weight + channel * taps, channels, taps, sweep.flipped, packed.get());
        for (int64_t i = 0; bias != nullptr && i < kWide; ++i) {
          start[i] = i < channels ? bias[channel + i] : S(0);
        }
        packed_block = block;
      }
      const int64_t first_row = task % bands * most;
      const Band band(sweep.rows, sweep.of_input, first_row, min(height, first_row + most));
      to_pixels(from + (plane * read_height + band.first) * read_width, read_height * read_width,
                channels, (band.last - band.first) * read_width, read.get());
      Sweep<S> of_band = sweep;
      of_band.rows = band.rows;
      of_band.from = read.get();
      of_band.bias = start.get();
      of_band.to = made.get();
      of_band.sweep(vectors, packed.get(), 0, band.end - band.begin);
      const int64_t at = (plane * height + band.begin) * width;
      to_planes(made.get(), height * width, channels, (band.end - band.begin) * width, finish, act,
                dy == nullptr ? nullptr : dy + at, to + at);
    }
  };
  parallel_ranges(tasks, task_grain(tasks, n * c * height * width), run);
}

// The window of one image of kLanes channels of S.
template <class S>
Sweep<S> block_sweep(const WindowAxis& rows, const WindowAxis& columns, bool of_input,
                     bool flipped) {
  return {1,       kLanes<S>, rows,    columns, of_input, flipped,
          nullptr, nullptr,   nullptr, nullptr, nullptr,  Act::kNone};
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CPU_LEVEL
