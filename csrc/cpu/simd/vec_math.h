// The activations made of exp, for CPU vectors, where activation.h looks for them.
//
// double: activation.h's formulas on the C library, lane by lane: it is there for gradient checks.
//
// float: several vectors step by step side by side, as one of them is a chain of 25 operations,
// each waiting for the one before; no branch, no table. u = 2^-24, half an ulp of 1.
//
// exp      Cody and Waite 1980: x = n ln 2 + r with ln 2 in two parts, |r| <= ln 2 / 2; 2^n is made
//          of its bits. The polynomial, its coefficients rounded, is within 1.6 u of e^r; Horner's
//          roundings are at most 2 u without fused multiply-adds, r's 0.4 u: 4 u in all.
// sigmoid  s = 1 / (1 + exp(-z)): an error of exp counts at most once, sum and quotient round once
//          each: 6 u, and as much for silu, whose numerator is z. 1 - s is exp(-z) s: 7 u, and
//          nothing cancels. The derivative of silu is s (1 + z (1 - s)), of the sigmoid s (1 - s).
// normal   With a = |z| the probability beyond a is exp(-a^2 / 2) R(a). R is Mills' ratio over
//          sqrt(2 pi), as a polynomial in w = 1 / (1 + 0.32 a): its error, coefficients rounded, is
//          0.3 u in that probability, and 1.2e-5 of a far tail's. With exp's (4 u of at most 1/2,
//          0.2 u from its argument), w's (2 u, times dR/dw <= 1.3), Horner's and two products' (4 u
//          of at most 1/2) and the difference's (0.5 u) it is 8 u in the probability.
// Limits: below -87 the derivatives are 0, below -88.4 the sigmoid, as PyTorch's is below -88.7.
// The polynomials are minimax fits, by Lawson's weighted least squares.
#pragma once

#include "common/activation.h"
#include "cpu/simd/vec.h"

namespace fastcnn {
namespace FASTCNN_CPU_LEVEL {

// Beyond them results are their limits. At kLow the sigmoid is a normal number still, at kHigh
// exp(-kHigh) is 0.
constexpr float kLow = -87.f, kHigh = 88.f;

// to[i] = coefficients[0] + coefficients[1] x[i] + ...
template <int kTerms, int kCount>
inline __attribute__((always_inline)) void polynomial(const float (&coefficients)[kTerms],
                                                      const Vec<float> (&x)[kCount],
                                                      Vec<float> (&to)[kCount]) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) to[i] = splat(coefficients[kTerms - 1]);
#pragma GCC unroll 8
  for (int term = kTerms - 2; term >= 0; --term) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) to[i] = to[i] * x[i] + coefficients[term];
  }
}

// e^x for x from -88.3 to 89: 0 below -87.7, inf above 88.4, where 2^n is no normal number.
template <int kCount>
inline __attribute__((always_inline)) void vec_exp(Vec<float> (&x)[kCount]) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer's bits below
  constexpr float kPolynomial[] = {1.f,          0.999999702f,  0.499991506f,
                                   0.166676372f, 0.0418979786f, 0.00829030201f};
  Vec<float> shifted[kCount], power[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    shifted[i] = x[i] * kLog2E + kRound;
    const Vec<float> n = shifted[i] - kRound;
    x[i] = (x[i] - n * kLn2High) - n * kLn2Low;
  }
  polynomial(kPolynomial, x, power);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    // The shift leaves n alone of shifted's bits; 0x3f800000 is 1.
    const Bits32 scale = (reinterpret_cast<Bits32>(shifted[i]) << 23) + 0x3f800000u;
    x[i] = power[i] * reinterpret_cast<Vec<float>>(scale);
  }
}

inline Vec<float> magnitude(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits32>(x) & 0x7fffffffu);
}

inline Vec<float> within_bounds(Vec<float> z) {
  return at_most(splat(kHigh), at_least(splat(kLow), z));
}

// to times the sigmoid of z: to / (1 + exp(-z)), 0 where exp(-z) is inf.
template <int kCount>
inline __attribute__((always_inline)) void times_sigmoid(Vec<float> (&to)[kCount],
                                                         const Vec<float> (&z)[kCount]) {
  Vec<float> e[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) e[i] = -at_most(splat(87.f), at_least(splat(-89.f), z[i]));
  vec_exp(e);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) to[i] = to[i] / (1.f + e[i]);
}

// The sigmoid s and its complement 1 - s = exp(-z) s, of which neither cancels.
template <int kCount>
inline __attribute__((always_inline)) void sigmoid(const Vec<float> (&z)[kCount],
                                                   Vec<float> (&value)[kCount],
                                                   Vec<float> (&complement)[kCount]) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) complement[i] = -within_bounds(z[i]);
  vec_exp(complement);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    value[i] = 1.f / (1.f + complement[i]);
    complement[i] *= value[i];
  }
}

// The normal distribution: the probability of a value below z, and exp(-z^2 / 2).
template <int kCount>
inline __attribute__((always_inline)) void normal(const Vec<float> (&z)[kCount],
                                                  Vec<float> (&cdf)[kCount],
                                                  Vec<float> (&density)[kCount]) {
  constexpr float kMills[] = {0.127954021f, 0.12342979f,    0.138644338f,   0.0199967157f,
                              0.151298746f, -0.0308757816f, -0.0483071916f, 0.0178593714f};
  Vec<float> w[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const Vec<float> a = at_most(splat(kHigh), magnitude(z[i]));
    w[i] = 1.f / (1.f + 0.32f * a);
    density[i] = at_least(splat(-kHigh), a * a * -0.5f);
  }
  vec_exp(density);
  polynomial(kMills, w, cdf);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const Vec<float> beyond = density[i] * (w[i] * cdf[i]);
    cdf[i] = z[i] < 0.f ? beyond : 1.f - beyond;
  }
}

}  // namespace FASTCNN_CPU_LEVEL

template <>
struct Math<FASTCNN_CPU_LEVEL::Vec<float>> {
  using Scalar = float;
};

template <>
struct EachAct<FASTCNN_CPU_LEVEL::Vec<float>> {
  using V = FASTCNN_CPU_LEVEL::Vec<float>;

  template <Act act, int kCount>
  FASTCNN_HOST_DEVICE static void fwd(V (&z)[kCount]) {
    using namespace FASTCNN_CPU_LEVEL;
    if constexpr (act == Act::kSilu || act == Act::kSigmoid) {
      V y[kCount];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        y[i] = act == Act::kSilu ? at_least(splat(-kHigh), z[i]) : splat(1.f);
      }
      times_sigmoid(y, z);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) z[i] = y[i];
    } else if constexpr (act == Act::kGelu) {
      V cdf[kCount], density[kCount];
      normal(z, cdf, density);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) z[i] = at_least(splat(-kHigh), z[i]) * cdf[i];
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) z[i] = act_fwd<act>(z[i]);
    }
  }

  template <Act act, int kCount>
  FASTCNN_HOST_DEVICE static void bwd(V (&dy)[kCount], const V (&z)[kCount]) {
    using namespace FASTCNN_CPU_LEVEL;
    if constexpr (act == Act::kSilu || act == Act::kSigmoid) {
      V value[kCount], complement[kCount];
      sigmoid(z, value, complement);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        if constexpr (act == Act::kSilu) complement[i] = 1.f + within_bounds(z[i]) * complement[i];
        const V dz = dy[i] * (value[i] * complement[i]);
        dy[i] = z[i] < kLow ? V{} : dz;
      }
    } else if constexpr (act == Act::kGelu) {
      V cdf[kCount], density[kCount];
      normal(z, cdf, density);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const V near = within_bounds(z[i]);
        dy[i] *= cdf[i] + near * density[i] * 0.398942280f;
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) dy[i] = act_bwd<act>(dy[i], z[i]);
    }
  }
};

template <>
struct Math<FASTCNN_CPU_LEVEL::Vec<double>> {
  using Scalar = double;
  using V = FASTCNN_CPU_LEVEL::Vec<double>;
  FASTCNN_HOST_DEVICE static V exp(V x) {
    for (int i = 0; i < FASTCNN_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
  }
  FASTCNN_HOST_DEVICE static V erf(V x) {
    for (int i = 0; i < FASTCNN_CPU_LEVEL::kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
    return x;
  }
};

}  // namespace fastcnn
