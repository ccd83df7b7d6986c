// y = act(x w + b + residual) for rows of values: what 1x1 convolutions in channels_last are.
//
// The weight comes in panels of kPanel columns, [panels, c_in, kPanel], 0 beyond c_out, whatever
// the instruction set. A tile is some rows by two vectors of columns, or three or one at the end,
// which lie side by side or a panel apart. Its sums stay in registers from the first to the last of
// c_in, and are added up one behind the other: 24 multiply-adds for 2 loads and 12 broadcasts with
// 32 registers (12 rows by 2 vectors), 12 for 2 and 6 with 16 (6 by 2). Which tile a row falls into
// changes none of its bits.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/simd/unrolled.h"
#include "cpu/spans.h"
#include "pointwise_conv2d.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

// What a product has beside the rows: the weight, the bias and the activation.
template <class S>
class Weights {
 public:
  Weights(const void* panels, const void* bias, int64_t c_in, int64_t c_out, Act act)
      : c_in(c_in),
        c_out(c_out),
        act(act),
        panels_(static_cast<const S*>(panels)),
        bias_(ceil_div(c_out, kPanel) * kPanel) {
    if (bias != nullptr) std::memcpy(bias_.get(), bias, static_cast<size_t>(c_out) * sizeof(S));
  }

  const int64_t c_in, c_out;
  const Act act;

  int64_t vectors() const { return ceil_div(c_out, kLanes<S>); }
  const S* panel(int64_t vector) const {
    const int64_t column = vector * kLanes<S>;
    return panels_ + column / kPanel * c_in * kPanel + column % kPanel;
  }
  Vec<S> bias(int64_t vector) const { return load(bias_.get() + vector * kLanes<S>); }

 private:
  const S* panels_;
  const Scratch<S> bias_;
};

// x: [rows, c_in], x_stride apart; residual (null: none) and y: [rows, c_out], y_stride apart.
template <class T>
struct Rows {
  using S = Acc<T>;
  const S* x;
  int64_t x_stride, count;
  const T* residual;
  T* y;
  int64_t y_stride;

  Rows from(int64_t row) const {
    return {x + row * x_stride, x_stride,
            count - row,        residual == nullptr ? nullptr : residual + row * y_stride,
            y + row * y_stride, y_stride};
  }
};

// Columns of y from vector `first` to `last`, through all rows a tile's width at a time: its
// weights stay in the L1 cache meanwhile, and the rows, where they fit, in the L2 cache. The tiles
// are most of what there is to compile, once: in fwd.cpp.
template <class T>
void multiply_rows(const Weights<Acc<T>>& w, const Rows<T>& rows, int64_t first, int64_t last);

// As float; x: [rows, c], x_stride apart.
template <class T>
void convert_rows(const T* x, int64_t x_stride, int64_t rows, int64_t c, Acc<T>* to) {
  for (int64_t row = 0; row < rows; ++row, x += x_stride, to += c) {
    for_each_vector<Acc<T>>(
        c, [&](int64_t i, int64_t count) { store(to + i, load(x + i, count), count); });
  }
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
