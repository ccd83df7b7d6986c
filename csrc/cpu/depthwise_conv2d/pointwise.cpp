// pointwise_depthwise_conv2d on the CPU, channels_last: y = act2(depthwise(act1(x w + b)) + b2).
//
// A thread owns bands of rows of y (band_height). For a few vectors of channels at a time it makes
// the rows of the first result that a band needs, [vectors, pixels, lanes] as float, and of these
// the band of y, by the loops of NCHW's blocks. Both stay in the L2 cache: memory sees x read and y
// written once, but for the kernel_h - 1 rows that two bands share, which are made twice. A tile of
// the first product is 6 pixels by up to 4 vectors (6 by 2 with 16 registers): 24 multiply-adds for
// 4 loads and 6 broadcasts.
#include "cpu/depthwise_conv2d/blocks.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int kMostVectors = kManyRegisters ? 4 : 2;  // of channels, at a time
constexpr int kPixels = 6;

// The first product's weights and bias for vectors [first, first + kVectors): weight [c_in,
// kVectors, lanes], bias [kVectors, lanes].
template <class S>
struct Expansion {
  int64_t c_in;
  const S* weight;
  const S* bias;
  Act act;
};

// to[v * apart + p * lanes ..] = act(x[p] w + b) of kCount pixels and kVectors vectors.
template <int kCount, int kVectors, class S, class A>
inline __attribute__((always_inline)) void expand_tile(Expansion<S> e, A act, const S* x, S* to,
                                                       int64_t apart) {
  constexpr int kWide = kLanes<S>;
  Vec<S> sums[kCount][kVectors];
  unrolled<0, kCount>([&](auto p) __attribute__((always_inline)) {
    unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      sums[p.value][v.value] = load(e.bias + v.value * kWide);
    });
  });
  const S* weight = e.weight;
  for (int64_t k = 0; k < e.c_in; ++k, weight += kVectors * kWide) {
    Vec<S> w[kVectors];
    unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      w[v.value] = load(weight + v.value * kWide);
      keep_in_register(w[v.value]);
    });
    unrolled<0, kCount>([&](auto p) __attribute__((always_inline)) {
      Vec<S> value = splat(x[p.value * e.c_in + k]);
      keep_in_register(value);
      unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
        sums[p.value][v.value] += value * w[v.value];
      });
    });
  }
  unrolled<0, kCount>([&](auto p) __attribute__((always_inline)) {
    if constexpr (A::kVectors == 1) act.fwd(sums[p.value]);
    unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      store(to + v.value * apart + p.value * kWide, sums[p.value][v.value]);
    });
  });
}

// x: [pixels, c_in]; to: [kVectors, pixels, lanes], `apart` from vector to vector.
template <int kVectors, class S, class A>
void expand(Expansion<S> e, const S* x, int64_t pixels, S* to, int64_t apart) {
  const A act(e.act);
  int64_t p = 0;
  for (; p + kPixels <= pixels; p += kPixels) {
    expand_tile<kPixels, kVectors>(e, act, x + p * e.c_in, to + p * kLanes<S>, apart);
  }
  for (; p < pixels; ++p) {
    expand_tile<1, kVectors>(e, act, x + p * e.c_in, to + p * kLanes<S>, apart);
  }
  // One that is called would have the tile's sums saved before each call.
  for (int v = 0; A::kVectors > 1 && v < kVectors; ++v, to += apart) {
    finish_act<S, A>(reinterpret_cast<const Vec<S>*>(to), e.act, nullptr, to, pixels, kLanes<S>,
                     kLanes<S>);
  }
}

template <class S>
using Expand = void (*)(Expansion<S>, const S*, int64_t, S*, int64_t);

template <class S>
Expand<S> choose_expand(int64_t vectors, Act act) {
  return dispatch_act<S>(act, [&](auto of) -> Expand<S> {
    using A = typename decltype(of)::type;
    if constexpr (kMostVectors > 2) {
      if (vectors == 4) return expand<4, S, A>;
      if (vectors == 3) return expand<3, S, A>;
    }
    return vectors == 2 ? expand<2, S, A> : expand<1, S, A>;
  });
}

// Rows of y whose part of x, first result and y fit into kBandElements.
int64_t band_height(const DepthwiseShape& s, int64_t c_in, int64_t together) {
  const int64_t of_read = s.columns.size * (c_in + together);
  const int64_t of_row = s.rows.stride * of_read + s.columns.size_out * (s.c + together);
  const int64_t halo = (s.rows.kernel - 1) * s.rows.dilation * of_read;
  return max(1, min(s.rows.size_out, (kBandElements - halo) / of_row));
}

template <class T>
class PointwiseDepthwise {
  using S = Acc<T>;
  static constexpr int64_t kWide = kLanes<S>;

 public:
  explicit PointwiseDepthwise(const PointwiseDepthwiseConv2dFwdParams& p)
      : p_(p),
        s_(p.depthwise.shape),
        taps_(s_.rows.kernel * s_.columns.kernel),
        vectors_(ceil_div(s_.c, kWide)),
        // Groups of nearly equal size: 9 vectors are three of 3, not 4, 4 and 1.
        per_group_(ceil_div(vectors_, ceil_div(vectors_, kMostVectors))),
        pointwise_(vectors_ * kWide * (p.c_in + 1)),
        depthwise_(vectors_ * kWide * (taps_ + 1)),
        sweep_(block_sweep<S>(s_.rows, s_.columns, false, false)) {
    choose_window_sums(sweep_);
    pack();
  }

  void run() const {
    const int64_t most = band_height(s_, p_.c_in, per_group_ * kWide);
    const int64_t bands = ceil_div(s_.rows.size_out, most), tasks = s_.n * bands;
    const int64_t most_read = min(
        s_.rows.size, (most - 1) * s_.rows.stride + (s_.rows.kernel - 1) * s_.rows.dilation + 1);
    const auto body = [&](int64_t begin, int64_t end) {
      const Scratch<S> x(sizeof(T) == sizeof(S) ? 0 : most_read * s_.columns.size * p_.c_in,
                         Fill::kNothing);
      const Scratch<S> first(per_group_ * most_read * s_.columns.size * kWide, Fill::kNothing);
      const Scratch<S> made(most * s_.columns.size_out * kWide, Fill::kNothing);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % bands * most;
        const Band band(s_.rows, false, row, min(s_.rows.size_out, row + most));
        run_band(task / bands, band, x.get(), first.get(), made.get());
      }
    };
    const int64_t work = s_.n * s_.c * s_.rows.size * s_.columns.size;
    parallel_ranges(tasks, task_grain(tasks, work), body);
  }

 private:
  int64_t in_group(int64_t group) const { return min(per_group_, vectors_ - group * per_group_); }
  S* pointwise(int64_t group) const {
    return pointwise_.get() + group * per_group_ * kWide * (p_.c_in + 1);
  }
  // Weights [taps, lanes] and bias [lanes] of a vector.
  S* depthwise(int64_t v) const { return depthwise_.get() + v * kWide * (taps_ + 1); }

  // Weights of a group [c_in, vectors, lanes], and its bias behind them; 0 where no channel is.
  void pack() const {
    const auto* weight = static_cast<const S*>(p_.weight);
    const auto* bias = static_cast<const S*>(p_.bias);
    const auto* dw_weight = static_cast<const S*>(p_.depthwise.weight);
    const auto* dw_bias = static_cast<const S*>(p_.depthwise.bias);
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t group = v / per_group_, wide = in_group(group) * kWide;
      S* to = pointwise(group) + v % per_group_ * kWide;
      const int64_t channel = v * kWide, count = min(kWide, s_.c - channel);
      const auto copy = [&](const S* from, S* to) { store(to, load(from + channel, count)); };
      for (int64_t k = 0; k < p_.c_in; ++k) copy(weight + k * s_.c, to + k * wide);
      if (bias != nullptr) copy(bias, to + p_.c_in * wide);
      if (dw_bias != nullptr) copy(dw_bias, depthwise(v) + taps_ * kWide);
      pack_block(dw_weight + channel * taps_, count, taps_, false, depthwise(v));
    }
  }

  // x, first, made: scratch memory for a band's rows, as float.
  void run_band(int64_t image, const Band& band, S* x, S* first, S* made) const {
    const DepthwiseConv2dFwdParams& d = p_.depthwise;
    const int64_t width = s_.columns.size_out, pixels = (band.last - band.first) * s_.columns.size;
    const T* from = static_cast<const T*>(d.x) +
                    (image * s_.rows.size + band.first) * s_.columns.size * p_.c_in;
    T* to = static_cast<T*>(d.y) + (image * s_.rows.size_out + band.begin) * width * s_.c;
    const S* read = as_acc(from, pixels * p_.c_in, x);
    Sweep<S> sweep = sweep_;
    sweep.rows = band.rows;
    sweep.to = made;
    const Finish<T> finish = choose_finish<T>(d.act, false);
    for (int64_t group = 0, v = 0; v < vectors_; ++group) {
      const int64_t count = in_group(group), apart = pixels * kWide;
      const S* weight = pointwise(group);
      const Expansion<S> e{p_.c_in, weight, weight + p_.c_in * count * kWide, p_.act};
      choose_expand<S>(count, p_.act)(e, read, pixels, first, apart);
      for (int64_t i = 0; i < count; ++i, ++v) {
        sweep.from = first + i * apart;
        sweep.bias = depthwise(v) + taps_ * kWide;
        sweep.sweep(ChannelVectors(kWide, kWide), depthwise(v), 0, band.end - band.begin);
        const int64_t channel = v * kWide;
        finish(reinterpret_cast<const Vec<S>*>(made), d.act, nullptr, to + channel,
               (band.end - band.begin) * width, s_.c, min(kWide, s_.c - channel));
      }
    }
  }

  static const S* as_acc(const T* from, int64_t count, S* room) {
    if constexpr (sizeof(T) == sizeof(S)) {
      return from;
    } else {
      for_each_vector<S>(
          count, [&](int64_t i, int64_t some) { store(room + i, load(from + i, some), some); });
      return room;
    }
  }

  const PointwiseDepthwiseConv2dFwdParams& p_;
  const DepthwiseShape& s_;
  const int64_t taps_, vectors_, per_group_;
  const Scratch<S> pointwise_, depthwise_;
  Sweep<S> sweep_;
};

}  // namespace

void pointwise_depthwise_conv2d_fwd_cpu(const PointwiseDepthwiseConv2dFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) { PointwiseDepthwise<decltype(tag)>(p).run(); });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
