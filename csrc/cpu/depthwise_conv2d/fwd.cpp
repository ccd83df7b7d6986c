// depthwise_conv2d forward on the CPU: y = act(conv2d(x, weight) + bias), or with a dy instead
// dy * act'(z), of which backward begins. sweep.h has channels_last, blocks.h NCHW, with how each
// moves data. Floor: x is read and y written once; kernel_h * kernel_w multiply-adds a value.
#include "cpu/depthwise_conv2d/blocks.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// sum[q] += sum over b of x[first + q * stride + b] * weight[b], of a row x and neighbouring taps.
template <class T, int kTaps, int kStride, int kColumns>
inline __attribute__((always_inline)) void add_taps(const Tile<T>& tile, const T* x, int64_t first,
                                                    const Acc<T>* weight,
                                                    Vec<Acc<T>> (&sum)[kColumns]) {
  using S = Acc<T>;
  x += first * tile.pixel;
  Vec<S> w[kTaps];
  unrolled<0, kTaps>([&](auto b) __attribute__((always_inline)) {
    w[b.value] = load(weight + b.value * kLanes<S>);
  });
  unrolled<0, (kColumns - 1) * kStride + kTaps>([&](auto j) __attribute__((always_inline)) {
    if (tile.holds(first + j.value)) {
      const Vec<S> value = in_register(load(x + j.value * tile.pixel));
      unrolled<0, kTaps>([&](auto b) __attribute__((always_inline)) {
        constexpr int kAt = decltype(j)::value - decltype(b)::value;
        if constexpr (kAt >= 0 && kAt % kStride == 0 && kAt / kStride < kColumns) {
          sum[kAt / kStride] += value * w[b.value];
        }
      });
    }
  });
}

// sums[q] += sum over a, b of x[row a, first + q * stride + b] * weight[a, b], for strides 1 and 2
// without dilation. kKernel: the taps of a row, 0 for any number, which are taken 7, 5, 3 and 1 at
// a time: in the order of one by one.
template <class T, int kKernel, int kStride, int kColumns>
void window_sums(const Tile<T>& tile, Vec<Acc<T>>* sums) {
  using S = Acc<T>;
  Vec<S> sum[kColumns];
  unrolled<0, kColumns>([&](auto q) __attribute__((always_inline)) { sum[q.value] = tile.start; });
  for (int64_t t = 0; t < tile.tap_count; ++t) {
    const T* x = tile.row(t);
    const S* weight = tile.weight_row(t);
    int64_t b = 0;
    const auto add = [&](auto taps) __attribute__((always_inline)) {
      add_taps<T, decltype(taps)::value, kStride>(tile, x, tile.first + b, weight + b * kLanes<S>,
                                                  sum);
      b += taps.value;
    };
    if constexpr (kKernel > 0) {
      add(Index<kKernel>{});
    } else {
      const int64_t kernel = tile.columns->kernel;
      while (kernel - b >= 7) add(Index<7>{});
      if (kernel - b >= 5) add(Index<5>{});
      if (kernel - b >= 3) add(Index<3>{});
      while (b < kernel) add(Index<1>{});
    }
  }
  put(tile, sum, sums);
}

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

}  // namespace

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
    if (columns.kernel == 3) return of_stride(Index<3>{});
    if (columns.kernel == 5) return of_stride(Index<5>{});
    if (columns.kernel == 7) return of_stride(Index<7>{});
    if (columns.kernel > 3) of_stride(Index<0>{});
  }
}

template void choose_window_sums(Sweep<float>&);
template void choose_window_sums(Sweep<BFloat16>&);
template void choose_window_sums(Sweep<Float16>&);
#if FASTCNN_CPU_LEVEL_IS_BASELINE
template void choose_window_sums(Sweep<double>&);
#endif

void depthwise_conv2d_fwd_cpu(const DepthwiseConv2dFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Acc<T>;
    const DepthwiseShape& s = p.shape;
    const auto* x = static_cast<const T*>(p.x);
    const auto* weight = static_cast<const S*>(p.weight);
    const auto* bias = static_cast<const S*>(p.bias);
    const auto* dy = static_cast<const T*>(p.dy);
    auto* y = static_cast<T*>(p.y);
    if (!s.channels_last) {
      Sweep<S> block = block_sweep<S>(s.rows, s.columns, false, false);
      choose_window_sums(block);
      return sweep_blocks(block, s.n, s.c, x, weight, bias, dy, y, p.act);
    }
    Sweep<T> sweep{s.n, s.c, s.rows, s.columns, false, false, x, weight, bias, dy, y, p.act};
    choose_window_sums(sweep);
    sweep.finish = choose_finish<T>(p.act, dy != nullptr);
    sweep.run();
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
