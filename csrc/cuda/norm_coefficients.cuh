// What normalises the channels of a thread's slots, in its registers.
#pragma once

#include "cuda/reduce.cuh"

namespace fastcnn {

// values[first, first + kCount), or `otherwise` where there are none: 16 bytes at a time where
// kCount is whole words, for which values and first are to lie on them.
template <int kCount>
__device__ void load_parameters(const void* values, int64_t first, float otherwise,
                                float (&out)[kCount]) {
  constexpr int kWide = kCount % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int v = 0; v < kCount; v += kWide) {
    float word[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) word[i] = otherwise;
    if (values != nullptr) load(static_cast<const float*>(values) + first + v, word);
#pragma unroll
    for (int i = 0; i < kWide; ++i) out[v + i] = word[i];
  }
}

// z = (x - mean) * scale + bias
template <int kCount>
struct NormCoefficients {
  float mean[kCount], scale[kCount], bias[kCount];

  template <class Params>
  __device__ void set(const Params& p, int s, int64_t channel, float mean_of, float var_of) {
    mean[s] = mean_of;
    scale[s] = rstd_of(var_of, p.eps);
    if (p.weight != nullptr) scale[s] *= static_cast<const float*>(p.weight)[channel];
    bias[s] = p.bias == nullptr ? 0.f : static_cast<const float*>(p.bias)[channel];
  }

  // From the statistics in memory: channel(s) and statistic(s) are where slot s finds its own.
  template <class Params, class Channel, class Statistic>
  __device__ static NormCoefficients read(const Params& p, Channel channel, Statistic statistic) {
    NormCoefficients k;
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const int64_t at = statistic(s);
      k.set(p, s, channel(s), static_cast<const float*>(p.mean)[at],
            static_cast<const float*>(p.var)[at]);
    }
    return k;
  }
};

}  // namespace fastcnn
