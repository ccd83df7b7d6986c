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
      : mean(c * repeat, Fill::kNothing),
        scale(c * repeat, Fill::kNothing),
        bias(c * repeat, Fill::kNothing),
        shift(c * repeat, Fill::kNothing),
        slope(c * repeat, Fill::kNothing),
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

// Pointers that may be null stay null.
template <class T>
T* at(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
