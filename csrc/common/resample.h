// Which input pixels a pixel of a resized axis is made of: PyTorch's definition
// (aten/src/ATen/native/UpSample.h, the CPU's), once for host and device.
//
// Of nearest sampling PyTorch has two: nearest_idx and nearest_exact_idx, and what a general kernel
// does in place of them. The former are taken here: they are what F.interpolate does on the CPU in
// every backward, in channels_last from 4 channels on, and wherever h + w of the output is at most
// 128. The general kernel serves the forward of all else, and there (torch 2.13)
// - a scale that only rounds to the same or the doubled size is divided by, as in other sizes;
// - nearest-exact rounds scale * (o + 0.5) - 0.5 before it adds 0.5 again;
// - coordinates of float64 tensors are float64;
// so that its own backward does not match it. tests/ops/upsample/test_values.py has a case of each.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastcnn {

// The operator schemas carry the number; fastcnn/ops/upsample/arguments.py holds the same table.
enum class Sampling : int32_t {
  kNearest = 0,
  kNearestExact = 1,
  kBilinear = 2,
  kBilinearCorners = 3,  // align_corners=True
};
constexpr int64_t kSamplingCount = 4;

struct Axis {
  int64_t in, out;  // at least 1, at most kMaxPixels
  double scale;     // out / in as the caller gave it; 0: the ratio of the sizes
};
constexpr int64_t kMaxPixels = (int64_t{1} << 31) - 2;  // indices are int32_t

// y[o] = (1 - weight) * x[index] + weight * x[next], next being index or index + 1.
template <class S>
struct Source {
  int32_t index, next;
  S weight;
};

FASTCNN_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCNN_HOST_DEVICE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The sources of one axis. index and next never fall as o rises, so the outputs made of an input
// pixel are neighbours: they are [first(i - reach), first(i + 1)).
//
// S is the type of coordinates: float, and double for float64. Nearest modes use float always: a
// coordinate just below an integer would fall to another pixel in another type.
template <class S>
struct Sampler {
  int32_t in, out;
  Sampling sampling;
  bool linear;  // two pixels a source; one where the sizes are equal: a copy, whatever the scale
  S step;       // input pixels for each output pixel

  FASTCNN_HOST_DEVICE Sampler(const Axis& axis, Sampling sampling)
      : in(static_cast<int32_t>(axis.in)),
        out(static_cast<int32_t>(axis.out)),
        sampling(sampling),
        linear(sampling >= Sampling::kBilinear && axis.in != axis.out) {
    if (sampling == Sampling::kBilinearCorners) {
      step = out > 1 ? static_cast<S>(in - 1) / static_cast<S>(out - 1) : S(0);
    } else {
      step = sampling == Sampling::kBilinear ? ratio<S>(axis) : static_cast<S>(ratio<float>(axis));
    }
  }

  FASTCNN_HOST_DEVICE int32_t reach() const { return linear ? 1 : 0; }

  FASTCNN_HOST_DEVICE Source<S> at(int32_t o) const {
    if (!linear) {
      const int32_t index = single(o);
      return {index, index, S(0)};
    }
    S place = step * static_cast<S>(o);
    if (sampling == Sampling::kBilinear) {
      place = step * (static_cast<S>(o) + S(0.5)) - S(0.5);
      if (place < 0) place = 0;
    }
    const int32_t index = static_cast<int32_t>(least(static_cast<int64_t>(place), in - 1));
    S weight = place - static_cast<S>(index);
    if (weight < 0) weight = 0;
    if (weight > 1) weight = 1;
    return {index, index < in - 1 ? index + 1 : index, weight};
  }

  // The smallest o whose index is at least i.
  FASTCNN_HOST_DEVICE int32_t first(int32_t i) const {
    int32_t below = 0, from = out;  // the answer is in [below, from]
    while (below < from) {
      const int32_t middle = below + (from - below) / 2;
      if (at(middle).index < i) {
        below = middle + 1;
      } else {
        from = middle;
      }
    }
    return below;
  }

 private:
  template <class C>
  static FASTCNN_HOST_DEVICE C ratio(const Axis& axis) {
    return axis.scale > 0 ? static_cast<C>(1.0 / axis.scale)
                          : static_cast<C>(axis.in) / static_cast<C>(axis.out);
  }

  FASTCNN_HOST_DEVICE int32_t single(int32_t o) const {
    if (sampling != Sampling::kNearestExact) {
      if (in == out) return o;
      // Not the same as below where the caller gave a scale that only rounds to these sizes.
      if (out == 2 * static_cast<int64_t>(in)) return o / 2;
    }
    const float shift = sampling == Sampling::kNearestExact ? 0.5f : 0.f;
    const float place = (static_cast<float>(o) + shift) * static_cast<float>(step);
    return static_cast<int32_t>(least(static_cast<int64_t>(place), in - 1));
  }
};

// How much of input pixel i there is in an output pixel.
template <class S>
FASTCNN_HOST_DEVICE S share_of(const Source<S>& source, int32_t i) {
  return (source.index == i ? 1 - source.weight : S(0)) + (source.next == i ? source.weight : S(0));
}

}  // namespace fastcnn
