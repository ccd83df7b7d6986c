// What batch_norm_act's forward and backward share on the CPU: the numbers of each channel.
#pragma once

#include "batch_norm_act.h"
#include "common/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

template <class S>
inline S rstd_of(S var, double eps) {
  return S(1) / static_cast<S>(__builtin_sqrt(static_cast<double>(var) + eps));
}

constexpr int64_t kSetGrain = 512;  // channels whose numbers are worth waking a thread

// An output that is large beside the last-level cache is stored past all caches: that saves reading
// its lines before they are overwritten, and leaves the inputs there for the second pass. Measured
// on 2 cores of an AMD EPYC (AVX-512, 32 MiB L3), bf16, with a reader of the output behind it:
// 25.7 MB 1 to 18 % faster, 12.8 MB even, smaller ones mostly slower.
constexpr int64_t kPastCachesBytes = int64_t{1} << 24;

// The per-channel numbers of one call, repeated `repeat` times: value[r * c + j] belongs to channel
// j.
template <class S>
struct Coefficients {
  Scratch<S> mean, scale, bias;  // z = (x - mean) * scale + bias
  Scratch<S> shift, slope;       // dx = scale * (dz - shift - (x - mean) * slope)
  int64_t c, repeat;
  Act act;
  bool past_caches;  // the output is stored past them

  Coefficients(int64_t c, int64_t repeat, Act act, int64_t output_bytes)
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
