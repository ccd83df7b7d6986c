// The activations as the loops of CUDA kernels have them: chosen before the loop, few instructions.
//
// exp2 and 1 / x are the hardware's, to 2^-22 and 2^-23 of the result. So are
//   sigmoid, silu   to 2^-21 + |z| 2^-23 of the result; |z| by the rounding of z log2(e)
//   gelu            to 1e-7 in float32, to 6e-7 in half types, and there to 2^-17 of the result
//                   while |z| < 5: the tail of the normal distribution is 2^-P(|z|), where the
//                   polynomial P approximates -log2(tail), which is smooth
// and results of type T are rounded on top. tests/ops/batch_norm_act/test_cuda.py holds these
// bounds, in an emulator whose exp2 and 1 / x are as far off as that.
#pragma once

#include <type_traits>

#include "common/activation.h"

namespace fastcnn {

// The special function unit. Subnormal arguments and results are 0.
struct SFU {
#ifdef FASTCNN_CUDA_EMULATION
  static float exp2(float x) { return cuda_emu::exp2_approx(x); }
  static float reciprocal(float x) { return cuda_emu::reciprocal_approx(x); }
#else
  __device__ static float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ static float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
};

constexpr float kLog2E = 1.44269504088896340736f;

// exp(-z) overflows to infinity, whose reciprocal is 0, as it should be.
__device__ inline float sigmoid_of(float z) {
  return SFU::reciprocal(1.f + SFU::exp2(z * -kLog2E));
}

// Finite, where the other factor is 0. Of a NaN it makes a number: the other factor is NaN then.
__device__ inline float not_below_finite(float z) { return fmaxf(z, -static_cast<float>(kFar)); }
__device__ inline float not_above_finite(float z) { return fminf(z, static_cast<float>(kFar)); }

// The probability that the normal distribution is above a >= 0.
template <class T>
__device__ inline float normal_tail(float a) {
  // From the highest power of a. Fitted over [0, 5.5] to the relative error of the tail, and over
  // [0, 5.8] to the absolute one of a times the tail; above them the tail falls to 0.
  constexpr float kHalf[] = {1.79347785e-06f, -6.09047420e-05f, 9.26034350e-04f, -8.49378109e-03f,
                             5.39379008e-02f, 4.58480448e-01f,  1.15124691e+00f, 9.99995470e-01f};
  constexpr float kSingle[] = {2.83533197e-08f,  -8.35224625e-07f, 1.05772006e-05f,
                               -7.32878470e-05f, 2.65314360e-04f,  3.77082579e-05f,
                               -7.00419350e-03f, 5.24897538e-02f,  4.59199756e-01f,
                               1.15110815e+00f,  9.99999762e-01f};
  const auto power = [&]<int kTerms>(const float(&coefficients)[kTerms]) {
    float sum = coefficients[0];
#pragma unroll
    for (int i = 1; i < kTerms; ++i) sum = sum * a + coefficients[i];
    return sum;
  };
  return SFU::exp2(-(sizeof(T) == sizeof(float) ? power(kSingle) : power(kHalf)));
}

// One activation, of results of type T.
template <Act act, class T>
class FixedAct {
 public:
  __device__ static constexpr bool derivative_needs_only_y() { return false; }

  template <int kCount>
  __device__ void fwd_each(float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = fwd(z[i]);
  }
  template <int kCount>
  __device__ void bwd_each(float (&dy)[kCount], const float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) dy[i] = bwd(dy[i], z[i]);
  }

 private:
  __device__ static float fwd(float z) {
    if constexpr (act == Act::kSigmoid) {
      return sigmoid_of(z);
    } else if constexpr (act == Act::kSilu) {
      return not_below_finite(z) * sigmoid_of(z);
    } else if constexpr (act == Act::kGelu) {
      // max(z, 0) - |z| tail(|z|): on either side of 0 the normal distribution's z cdf(z).
      const float a = fabsf(z);
      return fmaxf(z, 0.f) - not_above_finite(a) * normal_tail<T>(a);
    } else {
      return act_fwd<act>(z);
    }
  }

  __device__ static float bwd(float dy, float z) {
    if constexpr (act == Act::kSigmoid) {
      const float sigmoid = sigmoid_of(z);
      return dy * (sigmoid - sigmoid * sigmoid);
    } else if constexpr (act == Act::kSilu) {
      const float sigmoid = sigmoid_of(z);
      const float finite = not_above_finite(not_below_finite(z));
      return dy * (sigmoid * (finite * (1.f - sigmoid) + 1.f));
    } else if constexpr (act == Act::kGelu) {
      // Of -|z| it is tail(|z|) - |z| density(z), of |z| what is left of 1.
      const float a = not_above_finite(fabsf(z));
      constexpr float kRootHalfLog2E = 0.84932180028801904272f;
      const float root = a * kRootHalfLog2E, density = SFU::exp2(-root * root);
      const float left = normal_tail<T>(fabsf(z)) - a * 0.39894228040143267794f * density;
      return dy * (z < 0.f ? left : 1.f - left);
    } else {
      return act_bwd<act>(dy, z);
    }
  }
};

// Those whose derivative needs only y, as one: z within bounds. A bound that an activation lacks is
// NaN, with which no comparison holds. Of two conditions one behind the other nvcc makes
// selections, of nested ones branches.
class BoundedAct {
 public:
  __device__ explicit BoundedAct(Act act)
      : low_(act == Act::kNone ? __builtin_nanf("") : 0.f),
        high_(act == Act::kRelu6 ? 6.f : __builtin_nanf("")) {}

  __device__ static constexpr bool derivative_needs_only_y() { return true; }

  template <int kCount>
  __device__ void fwd_each(float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = z[i] < low_ ? low_ : z[i];
      z[i] = z[i] > high_ ? high_ : z[i];
    }
  }
  template <int kCount>
  __device__ void bwd_each(float (&dy)[kCount], const float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dy[i] = z[i] <= low_ ? 0.f : dy[i];
      dy[i] = z[i] >= high_ ? 0.f : dy[i];
    }
  }

 private:
  float low_, high_;
};

// body(the activation), compiled for each of them.
template <class T, class Body>
__device__ void with_act(Act act, Body body) {
  switch (act) {
    case Act::kLeakyRelu:
      return body(FixedAct<Act::kLeakyRelu, T>{});
    case Act::kSilu:
      return body(FixedAct<Act::kSilu, T>{});
    case Act::kGelu:
      return body(FixedAct<Act::kGelu, T>{});
    case Act::kSigmoid:
      return body(FixedAct<Act::kSigmoid, T>{});
    case Act::kHardswish:
      return body(FixedAct<Act::kHardswish, T>{});
    default:
      return body(BoundedAct(act));
  }
}

}  // namespace fastcnn
