// The gradient of depthwise_conv2d's input on the CPU.
//
// With stride 1 it is a forward of dy with the flipped kernel. Otherwise each row of dx gathers the
// rows of dy that it has a part in: one of stride_h rows of the kernel meets it. In channels_last a
// column of dy that is loaded serves the kernel_w columns of dx that it was made of. Floor: dy is
// read and dx written once; kernel_h * kernel_w multiply-adds a value of dy.
#include "cpu/depthwise_conv2d/blocks.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// sums[t] += sum over a, b of dy[row a, q] * weight[a, b] where 2 q + b = first + t; first has the
// parity kOdd, kernels and tiles do so, too: kKernel is odd, kColumns even.
template <class T, int kKernel, int kColumns, int kOdd>
void gathered_by_two(const Tile<T>& tile, Vec<Acc<T>>* sums) {
  using S = Acc<T>;
  // Column q = begin + m has a part in t = kOdd + 2 m + b - (kKernel - 1).
  constexpr int kRead = (kColumns + kKernel - 2 - kOdd) / 2 + 1;
  const int64_t begin = (tile.first - (kKernel - 1) + kOdd) / 2;
  Vec<S> sum[kColumns];
  unrolled<0, kColumns>([&](auto t) __attribute__((always_inline)) { sum[t.value] = tile.start; });
  for (int64_t tap = 0; tap < tile.tap_count; ++tap) {
    const T* dy = tile.row(tap) + begin * tile.pixel;
    const S* weight = tile.weight_row(tap);
    Vec<S> w[kKernel];
    unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
      w[b.value] = load(weight + b.value * kLanes<S>);
    });
    unrolled<0, kRead>([&](auto m) __attribute__((always_inline)) {
      if (tile.holds(begin + m.value)) {
        const Vec<S> value = in_register(load(dy + m.value * tile.pixel));
        unrolled<0, kKernel>([&](auto b) __attribute__((always_inline)) {
          constexpr int kAt = kOdd + 2 * decltype(m)::value + decltype(b)::value - (kKernel - 1);
          if constexpr (kAt >= 0 && kAt < kColumns) sum[kAt] += value * w[b.value];
        });
      }
    });
  }
  put(tile, sum, sums);
}

// The same for any stride and dilation: stride * q + b * dilation = first + t.
template <class T>
void gathered(const Tile<T>& tile, Vec<Acc<T>>* sums) {
  using S = Acc<T>;
  const WindowAxis& columns = *tile.columns;
  Vec<S> sum[kAnyColumns];
  for (int t = 0; t < kAnyColumns; ++t) sum[t] = tile.start;
  for (int64_t tap = 0; tap < tile.tap_count; ++tap) {
    const T* dy = tile.row(tap);
    const S* weight = tile.weight_row(tap);
    for (int64_t b = 0; b < columns.kernel; ++b) {
      const Vec<S> w = load(weight + b * kLanes<S>);
      const int64_t least = tile.first - b * columns.dilation;  // of stride * q
      int64_t q = least <= 0 ? 0 : ceil_div(least, columns.stride);
      for (int64_t t = q * columns.stride - least; t < kAnyColumns && q < tile.width;
           ++q, t += columns.stride) {
        sum[t] += load_channels(dy + q * tile.pixel, tile.lanes) * w;
      }
    }
  }
  put(tile, sum, sums);
}

template <class T>
void choose_gathered(Sweep<T>& sweep) {
  using S = Acc<T>;
  const WindowAxis& columns = sweep.columns;
  sweep.sums_of[0] = sweep.sums_of[1] = gathered<T>;
  sweep.tile = kAnyColumns;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (columns.stride != 2 || columns.dilation != 1 || sweep.c < kLanes<S>) return;
    const auto set = [&](auto kernel, auto width) {
      constexpr int kKernel = decltype(kernel)::value, kColumns = decltype(width)::value;
      sweep.sums_of[0] = gathered_by_two<T, kKernel, kColumns, 0>;
      sweep.sums_of[1] = gathered_by_two<T, kKernel, kColumns, 1>;
      sweep.tile = kColumns;
    };
    const auto of_width = [&](auto kernel) {
      if constexpr (kManyRegisters) {
        if (tile_width(sweep.width(), 2, 0) == 14) return set(kernel, Index<14>{});
      }
      set(kernel, Index<8>{});
    };
    if (columns.kernel == 3) of_width(Index<3>{});
    if (columns.kernel == 5) of_width(Index<5>{});
    if (columns.kernel == 7) of_width(Index<7>{});
  }
}

// The window that reads dy to make dx where both strides are 1.
WindowAxis flipped(const WindowAxis& axis) {
  const int64_t reach = axis.dilation * (axis.kernel - 1);
  return {axis.size_out, axis.size, axis.kernel, 1, reach - axis.padding, axis.dilation};
}

}  // namespace

void depthwise_conv2d_bwd_data_cpu(const DepthwiseConv2dBwdDataParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Acc<T>;
    const DepthwiseShape& s = p.shape;
    const auto* dy = static_cast<const T*>(p.dy);
    const auto* weight = static_cast<const S*>(p.weight);
    auto* dx = static_cast<T*>(p.dx);
    const bool steps = s.rows.stride > 1 || s.columns.stride > 1;
    const WindowAxis rows = steps ? s.rows : flipped(s.rows);
    const WindowAxis columns = steps ? s.columns : flipped(s.columns);
    const auto choose = [&](auto& sweep) {
      steps ? choose_gathered(sweep) : choose_window_sums(sweep);
    };
    if (!s.channels_last) {
      Sweep<S> block = block_sweep<S>(rows, columns, steps, !steps);
      choose(block);
      return sweep_blocks<T>(block, s.n, s.c, dy, weight, nullptr, nullptr, dx, Act::kNone);
    }
    Sweep<T> sweep{s.n, s.c,    rows,    columns, steps, !steps,
                   dy,  weight, nullptr, nullptr, dx,    Act::kNone};
    choose(sweep);
    sweep.finish = finish_act<T, InlineAct<Act::kNone>>;
    sweep.run();
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
