// exp and erf of CPU vectors, where activation.h looks for them.
//
// float: at most 2 ulp from the exact value at every instruction set; inf, zeros, subnormal results
// and NaN as the C library gives them. double: the C library, lane by lane, since float64 is there
// for gradient checks.
//
// exp   Cody and Waite 1980: x = n ln 2 + r with ln 2 in two parts, so that r is exact enough; a
//       polynomial in r; 2^n built from its bits, in two factors for subnormal results.
// erf   |x| < 1: x + x p(x^2). Beyond: 1 - exp(-|x| q(|x|)), as log(erfc) is smooth (W. J. Cody,
//       Rational Chebyshev approximations for the error function, 1969, cuts erf at the same
//       places); from 4.1 on it is 1.
// The polynomials are minimax fits, by Lawson's weighted least squares in 40 digits.
#pragma once

#include "common/activation.h"
#include "cpu/simd/vec.h"

namespace fastcnn {
namespace FASTCNN_CPU_LEVEL {

using Int32 = Vec<int32_t>;

template <int kCount>
inline __attribute__((always_inline)) Vec<float> polynomial(const float (&coefficients)[kCount],
                                                            Vec<float> x) {
  Vec<float> sum = splat(coefficients[kCount - 1]);
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

inline __attribute__((always_inline)) Vec<float> vec_exp(Vec<float> x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer's bits below
  constexpr float kPolynomial[] = {0.49999994f, 0.166665196f, 0.0416684076f, 0.0083689225f,
                                   0.00138141715f};
  x = x > 89.f ? splat(89.f) : (x < -105.f ? splat(-105.f) : x);  // inf and 0 from there on
  const Vec<float> shifted = x * kLog2E + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (x - n * kLn2High) - n * kLn2Low;
  const Vec<float> power = polynomial(kPolynomial, r) * (r * r) + r + 1.f;
  const Int32 exponent = reinterpret_cast<Int32>(shifted) - 0x4b400000;
  const Int32 half = exponent >> 1;
  return power * reinterpret_cast<Vec<float>>((half + 127) << 23) *
         reinterpret_cast<Vec<float>>((exponent - half + 127) << 23);
}

inline __attribute__((always_inline)) Vec<float> vec_erf(Vec<float> x) {
  constexpr float kSmall[] = {0.128379166f,   -0.376126260f,   0.112836003f,  -0.0268544443f,
                              0.00518953521f, -8.02084105e-4f, 7.88911930e-5f};
  constexpr float kLarge[] = {1.12847555f,    0.635846376f,   0.105096713f,
                              -0.0227861125f, 0.00318312598f, -2.10183178e-4f};
  const Vec<float> t = x < 0.f ? -x : x;
  const Vec<float> small = polynomial(kSmall, x * x) * x + x;
  const Vec<float> u = t > 4.1f ? splat(4.1f) : t;
  const Vec<float> large = 1.f - vec_exp(-u * polynomial(kLarge, u));
  return t < 1.f ? small : (x < 0.f ? -large : large);
}

inline __attribute__((always_inline)) Vec<double> vec_exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

inline __attribute__((always_inline)) Vec<double> vec_erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

}  // namespace FASTCNN_CPU_LEVEL

template <>
struct Math<FASTCNN_CPU_LEVEL::Vec<float>> {
  using Scalar = float;
  using V = FASTCNN_CPU_LEVEL::Vec<float>;
  FASTCNN_HOST_DEVICE static V exp(V x) { return FASTCNN_CPU_LEVEL::vec_exp(x); }
  FASTCNN_HOST_DEVICE static V erf(V x) { return FASTCNN_CPU_LEVEL::vec_erf(x); }
};

template <>
struct Math<FASTCNN_CPU_LEVEL::Vec<double>> {
  using Scalar = double;
  using V = FASTCNN_CPU_LEVEL::Vec<double>;
  FASTCNN_HOST_DEVICE static V exp(V x) { return FASTCNN_CPU_LEVEL::vec_exp(x); }
  FASTCNN_HOST_DEVICE static V erf(V x) { return FASTCNN_CPU_LEVEL::vec_erf(x); }
};

}  // namespace fastcnn
