// What the kernels of batch_norm_act share: a thread's channels, and its vectors of the backward.
#pragma once

#include "batch_norm_act.h"
#include "common/columns.cuh"

namespace fastcnn {

__device__ inline float rstd_of(float var, double eps) {
  return rsqrtf(var + static_cast<float>(eps));
}

// A thread's channels: one for each element of its vector, or one for all (NCHW).
template <int kVector, bool kChannelsLast>
constexpr int kSlots = kChannelsLast ? kVector : 1;

// The channel of each slot, from the column of the first.
template <int kCount>
struct SlotChannels {
  int64_t of[kCount];

  __device__ SlotChannels(int64_t column, int64_t repeat) {
    int64_t channel = repeat == 1 ? column : column / repeat, rest = column - channel * repeat;
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      of[s] = channel;
      if (++rest == repeat) {
        rest = 0;
        ++channel;
      }
    }
  }
};

// z = (x - mean) * scale + bias
template <int kCount>
struct Coefficients {
  float mean[kCount], scale[kCount], bias[kCount];

  template <class Params>
  __device__ void set(const Params& p, int s, int64_t channel, float mean_of, float var_of) {
    mean[s] = mean_of;
    scale[s] = rstd_of(var_of, p.eps);
    if (p.weight != nullptr) scale[s] *= static_cast<const float*>(p.weight)[channel];
    bias[s] = p.bias == nullptr ? 0.f : static_cast<const float*>(p.bias)[channel];
  }

  // From the statistics in memory.
  template <class Params>
  __device__ Coefficients(const Params& p, const SlotChannels<kCount>& channels) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const int64_t channel = channels.of[s];
      set(p, s, channel, static_cast<const float*>(p.mean)[channel],
          static_cast<const float*>(p.var)[channel]);
    }
  }

  __device__ Coefficients() {}
};

// y of one vector.
template <class T, int kVector, int kCount>
__device__ Word<T, kVector> normalized(const BatchNormActFwdParams& p,
                                       const Coefficients<kCount>& k, Word<T, kVector> x,
                                       Word<T, kVector> residual) {
  float z[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const int s = kCount == 1 ? 0 : v;
    z[v] = (element<T, kVector>(x, v) - k.mean[s]) * k.scale[s] + k.bias[s];
    if (p.residual != nullptr) z[v] += element<T, kVector>(residual, v);
  }
  act_fwd(p.act, z);
  return to_word<T>(z);
}

// ---- backward ----------------------------------------------------------------------------------

struct Sums {
  float dz = 0, dzx = 0;  // sum(dz), sum(dz * (x - mean))
};

struct JoinSums {
  __device__ void operator()(Sums& a, const Sums& b) const {
    a.dz += b.dz;
    a.dzx += b.dzx;
  }
};

// kN vectors of what the backward reads, asked for together.
template <class T, int kVector, int kN>
struct BwdGroup {
  Word<T, kVector> dy[kN], x[kN], saved[kN];

  // kLast: nothing of the call reads them again.
  template <bool kLast>
  __device__ void load(const BatchNormActBwdParams& p, const int64_t (&offsets)[kN]) {
    const auto read = [&](const void* base, Word<T, kVector>(&words)[kN]) {
#pragma unroll
      for (int u = 0; u < kN; ++u) {
        const T* from = static_cast<const T*>(base) + offsets[u];
        words[u] = kLast ? load_last<kVector>(from) : load_word<kVector>(from);
      }
    };
    read(p.dy, dy);
    read(p.x, x);
    if (p.saved != nullptr) read(p.saved, saved);
  }

  // dz of vector u, and x - mean. z is rebuilt as the forward made it; where a residual was added,
  // with the saved residual, or y is read in place of z.
  template <int kCount>
  __device__ void grad_z(const BatchNormActBwdParams& p, const Coefficients<kCount>& k, int u,
                         float (&dz)[kVector], float (&centered)[kVector]) const {
    float z[kVector];
    const bool from_y = slope_is_in_y(p.act);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kCount == 1 ? 0 : v;
      dz[v] = element<T, kVector>(dy[u], v);
      centered[v] = element<T, kVector>(x[u], v) - k.mean[s];
      z[v] = centered[v] * k.scale[s] + k.bias[s];
      if (p.saved != nullptr) {
        const float saved_value = element<T, kVector>(saved[u], v);
        z[v] = from_y ? saved_value : z[v] + saved_value;
      }
    }
    act_bwd(p.act, dz, z);
  }
};

// dx = scale * (dz - mean(dz) - (x - mean) * rstd * mean(dz * xhat)); with fixed statistics
// dx = scale * dz. shift and slope: those two means, the latter times rstd.
template <class T, int kVector, int kCount>
__device__ Word<T, kVector> grad_x(const BatchNormActBwdParams& p, const Coefficients<kCount>& k,
                                   const float (&shift)[kCount], const float (&slope)[kCount],
                                   const float (&dz)[kVector], const float (&centered)[kVector]) {
  float out[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const int s = kCount == 1 ? 0 : v;
    out[v] = dz[v];
    if (p.training) out[v] -= shift[s] + centered[v] * slope[s];
    out[v] *= k.scale[s];
  }
  return to_word<T>(out);
}

}  // namespace fastcnn
