// What batch_norm_act's forward and backward share on the CPU: the numbers of each channel.
#pragma once

#include "batch_norm_act.h"
#include "cpu/norm.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

constexpr int64_t kSetGrain = 512;  // channels whose numbers are worth waking a thread

// The per-channel numbers of one call, repeated `repeat` times: value[r * c + j] belongs to channel
// j.
template <class S>
struct BatchNormCoefficients {
  Scratch<S> mean, scale, bias;  // z = (x - mean) * scale + bias
  Scratch<S> shift, slope;       // dx = scale * (dz - shift - (x - mean) * slope)
  int64_t c, repeat;
  Act act;
  bool past_caches;  // the output is stored past them

  BatchNormCoefficients(int64_t c, int64_t repeat, Act act, int64_t output_bytes)
      : mean(c * repeat + kLanes<S>, Fill::kNothing),  // a piece's last vector may end behind it
        scale(c * repeat + kLanes<S>, Fill::kNothing),
        bias(c * repeat + kLanes<S>, Fill::kNothing),
        shift(c * repeat + kLanes<S>, Fill::kNothing),
        slope(c * repeat + kLanes<S>, Fill::kNothing),
        c(c),
        repeat(repeat),
        act(act),
        past_caches(output_bytes >= kPastCachesBytes) {}

  template <class Params>
  void set(const Params& p, int64_t j) {
    const S* weight = static_cast<const S*>(p.weight);
    const S* beta = static_cast<const S*>(p.bias);
    const S rstd = rstd_of(static_cast<const S*>(p.var)[j], p.eps);
    for (int64_t i = j; i < c * repeat; i += c) {
      mean[i] = static_cast<const S*>(p.mean)[j];
      scale[i] = weight ? weight[j] * rstd : rstd;
      bias[i] = beta ? beta[j] : S(0);
    }
  }
};

// Where x and dx lie: whole, or in the pieces of a concatenation.
class Pieces {
 public:
  Pieces(const BatchNormActFwdParams& p) : Pieces(p, nullptr) {}
  Pieces(const BatchNormActBwdParams& p) : Pieces(p, p.dx) {}

  const BatchNormPiece* begin() const { return list_ == nullptr ? &whole_ : list_; }
  const BatchNormPiece* end() const { return begin() + count_; }

  const BatchNormPiece& of_channel(int64_t j) const {
    const BatchNormPiece* piece = begin();
    while (j >= piece->first + piece->c) ++piece;
    return *piece;
  }

  // A row of several pieces is one pixel: repeated, its channels would not lie side by side.
  WideRows rows(const ImageShape& shape, int64_t element_bytes, int64_t lanes) const {
    return WideRows(shape, element_bytes, lanes, kTasks, count_ == 1);
  }

  // body(image, images) for planes of NCHW: of several pieces one after the other, whose planes are
  // not as far apart as y's.
  template <class Body>
  void for_images(int64_t first, int64_t last, Body body) const {
    if (count_ == 1) return body(first, last - first);
    for (int64_t image = first; image < last; ++image) body(image, int64_t{1});
  }

  // body(piece, row, rows) for rows of channels_last: all pieces of some rows, then those of the
  // next ones, so that y and dy come from memory and go there in whole rows.
  template <class Body>
  void for_rows(int64_t first, int64_t rows, Body body) const {
    const int64_t step = count_ == 1 ? rows : kSumRows;
    for (int64_t row = first; row < first + rows; row += step) {
      for (const BatchNormPiece& piece : *this) body(piece, row, min(step, first + rows - row));
    }
  }

 private:
  template <class Params>
  Pieces(const Params& p, void* dx)
      : whole_{0, p.shape.c, p.x, dx},
        list_(p.pieces),
        count_(p.pieces == nullptr ? 1 : p.piece_count) {}

  BatchNormPiece whole_;
  const BatchNormPiece* list_;
  int64_t count_;
};

// Pointers that may be null stay null.
template <class T>
T* at(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
