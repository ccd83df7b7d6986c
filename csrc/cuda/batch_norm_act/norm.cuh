// What the kernels of batch_norm_act share: a thread's channels, and its vectors of the backward.
#pragma once

#include "batch_norm_act.h"
#include "cuda/activation.cuh"
#include "cuda/norm_coefficients.cuh"

namespace fastcnn {

// The channel of each slot, from the column of the first: 4 bits each for how much further it is,
// since registers are short.
class SlotChannels {
 public:
  __device__ SlotChannels(int64_t column, int64_t repeat)
      : first_(repeat == 1 ? column : column / repeat) {
    int64_t rest = column - first_ * repeat;
    unsigned further = 0;
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      further_ |= further << (4 * s);
      if (++rest == repeat) {
        rest = 0;
        ++further;
      }
    }
  }
  __device__ int64_t operator[](int s) const { return first_ + (further_ >> (4 * s) & 15u); }

 private:
  int64_t first_;
  unsigned further_ = 0;
};

template <int kCount, class Params>
__device__ NormCoefficients<kCount> read_coefficients(const Params& p,
                                                      const SlotChannels& channels) {
  const auto channel = [&](int s) { return channels[s]; };
  return NormCoefficients<kCount>::read(p, channel, channel);
}

// kN vectors of what the forward reads, in flight together; nothing of the call reads them again.
template <class T, int kVector, int kN>
struct FwdGroup {
  Word<T, kVector> x[kN], residual[kN];

  __device__ void load_x(const BatchNormActFwdParams& p, const int64_t (&offsets)[kN]) {
    read(p.x, offsets, x);
  }
  __device__ void load_residual(const BatchNormActFwdParams& p, const int64_t (&offsets)[kN]) {
    if (p.residual != nullptr) read(p.residual, offsets, residual);
  }

 private:
  __device__ static void read(const void* from, const int64_t (&offsets)[kN],
                              Word<T, kVector> (&words)[kN]) {
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      words[u] = load_last<kVector>(static_cast<const T*>(from) + offsets[u]);
    }
  }
};

// y of one vector.
template <class T, int kVector, class A, int kCount>
__device__ Word<T, kVector> normalized(const BatchNormActFwdParams& p, A act,
                                       const NormCoefficients<kCount>& k, Word<T, kVector> x,
                                       Word<T, kVector> residual) {
  float z[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const int s = kCount == 1 ? 0 : v;
    z[v] = (element<T, kVector>(x, v) - k.mean[s]) * k.scale[s] + k.bias[s];
    if (p.residual != nullptr) z[v] += element<T, kVector>(residual, v);
  }
  act.fwd_each(z);
  return to_word<T>(z);
}

// ---- backward ----------------------------------------------------------------------------------

// Vectors in flight: each brings one of dy and one of x.
constexpr int kBwdUnroll = kUnroll / 2;

// kN vectors of what the backward reads, asked for together.
template <class T, int kVector, int kN>
struct BwdGroup {
  Word<T, kVector> dy[kN], x[kN], saved[kN];

  // kLast: nothing of the call reads them again.
  template <bool kLast>
  __device__ void load(const BatchNormActBwdParams& p, const int64_t (&offsets)[kN]) {
    read<kLast>(p.dy, offsets, dy);
    read<kLast>(p.x, offsets, x);
    load_saved<kLast>(p, offsets);
  }
  template <bool kLast>
  __device__ void load_saved(const BatchNormActBwdParams& p, const int64_t (&offsets)[kN]) {
    if (p.saved != nullptr) read<kLast>(p.saved, offsets, saved);
  }

  // body(v, s, dz, x - mean) for each element v of vector u, whose slot is s. z is recomputed as
  // the forward made it; where a residual was added, with the saved residual, or y is read in place
  // of z.
  template <class A, int kCount, class Body>
  __device__ void for_each_dz(const BatchNormActBwdParams& p, A act,
                              const NormCoefficients<kCount>& k, int u, Body body) const {
    float dz[kVector], z[kVector], centered[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int s = kCount == 1 ? 0 : v;
      dz[v] = element<T, kVector>(dy[u], v);
      centered[v] = element<T, kVector>(x[u], v) - k.mean[s];
      z[v] = centered[v] * k.scale[s] + k.bias[s];
      if (p.saved != nullptr) {
        const float saved_value = element<T, kVector>(saved[u], v);
        z[v] = act.derivative_needs_only_y() ? saved_value : z[v] + saved_value;
      }
    }
    act.bwd_each(dz, z);
#pragma unroll
    for (int v = 0; v < kVector; ++v) body(v, kCount == 1 ? 0 : v, dz[v], centered[v]);
  }

 private:
  template <bool kLast>
  __device__ static void read(const void* base, const int64_t (&offsets)[kN],
                              Word<T, kVector> (&words)[kN]) {
#pragma unroll
    for (int u = 0; u < kN; ++u) {
      const T* from = static_cast<const T*>(base) + offsets[u];
      words[u] = kLast ? load_last<kVector>(from) : load_word<kVector>(from);
    }
  }
};

// What dx is made with: dx = scale * (dz - mean(dz) - (x - mean) * rstd * mean(dz * xhat)); with
// fixed statistics dx = scale * dz.
template <int kCount>
struct GradX {
  float shift[kCount], slope[kCount];  // those two means, the latter times rstd

  // inverse: of the values a channel
  __device__ void set(int s, float dbias, float dweight, float rstd, float inverse) {
    shift[s] = dbias * inverse;
    slope[s] = dweight * inverse * rstd;
  }

  // dx of vector u.
  template <class A, class T, int kVector, int kN>
  __device__ Word<T, kVector> of(const BatchNormActBwdParams& p, A act,
                                 const NormCoefficients<kCount>& k,
                                 const BwdGroup<T, kVector, kN>& group, int u) const {
    float dx[kVector];
    group.for_each_dz(p, act, k, u, [&](int v, int s, float dz, float centered) {
      dx[v] = dz;
      if (p.training) dx[v] -= shift[s] + centered * slope[s];
      dx[v] *= k.scale[s];
    });
    return to_word<T>(dx);
  }
};

// Adds a vector's dz to the sums of its slots, and returns it as it is stored.
template <class A, class T, int kVector, int kN, int kCount>
__device__ Word<T, kVector> add_up(const BatchNormActBwdParams& p, A act,
                                   const NormCoefficients<kCount>& k,
                                   const BwdGroup<T, kVector, kN>& group, int u,
                                   Sums (&sums)[kCount]) {
  float rounded[kVector];
  group.for_each_dz(p, act, k, u, [&](int v, int s, float dz, float centered) {
    rounded[v] = dz;
    sums[s].dz += dz;
    sums[s].dzx += dz * centered;
  });
  return to_word<T>(rounded);
}

}  // namespace fastcnn
