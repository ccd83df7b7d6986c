// The activations, defined once for host and device, for scalars and for the CPU's vectors.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/types.h"

namespace fastcnn {

// The numbers are part of the operator schemas: fastcnn/common/activation.py holds the same table.
enum class Act : int32_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,
  kSilu = 4,
  kGelu = 5,
  kSigmoid = 6,
  kHardswish = 7,
};
constexpr int32_t kActCount = 8;

// Whether d act / dz can be read off y = act(z). The others need z.
FASTCNN_HOST_DEVICE constexpr bool derivative_needs_only_y(Act act) {
  return act == Act::kNone || act == Act::kRelu || act == Act::kRelu6;
}

// exp and erf of V: of the device's scalars here, of the CPU's doubles in cpu/simd/vec_math.h.
template <class V>
struct Math;

template <>
struct Math<float> {
  using Scalar = float;
  FASTCNN_HOST_DEVICE static float exp(float x) { return expf(x); }
  FASTCNN_HOST_DEVICE static float erf(float x) { return erff(x); }
};

template <class V>
FASTCNN_HOST_DEVICE V constant(double value) {
  return V{} + static_cast<typename Math<V>::Scalar>(value);
}

// V is float or a vector of floats or doubles: a comparison then selects lane by lane.
// A NaN comes through, as in PyTorch. Where an infinite z meets a factor of 0, silu, gelu and
// hardswish have their limits, in value and derivative; PyTorch's formulas give NaN there. To that
// end z is held within +-kFar, beyond which those factors are 0 in double too.
constexpr double kFar = 1e4, kLeakySlope = 0.01;

template <class V>
FASTCNN_HOST_DEVICE V not_below_far(V z) {
  const V low = constant<V>(-kFar);
  return z < low ? low : z;
}

template <class V>
FASTCNN_HOST_DEVICE V within_far(V z) {
  const V low = constant<V>(-kFar), high = constant<V>(kFar);
  return z < low ? low : (z > high ? high : z);
}

// 1 / (1 + exp(-z)) and 1 minus that, from exp(-|z|): nothing overflows or cancels.
template <class V>
struct Sigmoid {
  V value, rest;

  FASTCNN_HOST_DEVICE explicit Sigmoid(V z) {
    const V zero = V{}, one = zero + 1;
    const V e = Math<V>::exp(z < zero ? z : -z);
    const V large = one / (one + e), small = e * large;
    value = z < zero ? small : large;
    rest = z < zero ? large : small;
  }
};

// The normal distribution: the probability of a value below z.
template <class V>
FASTCNN_HOST_DEVICE V normal_cdf(V z) {
  const V half = constant<V>(0.5);
  return half + half * Math<V>::erf(z * constant<V>(0.70710678118654752440));
}

template <Act act, class V>
FASTCNN_HOST_DEVICE V act_fwd(V z) {
  const V zero = V{};
  if constexpr (act == Act::kRelu) {
    return z < zero ? zero : z;
  } else if constexpr (act == Act::kRelu6) {
    const V six = zero + 6;
    return z < zero ? zero : (z > six ? six : z);
  } else if constexpr (act == Act::kLeakyRelu) {
    return z > zero ? z : z * constant<V>(kLeakySlope);
  } else if constexpr (act == Act::kSilu) {
    return not_below_far(z) * Sigmoid<V>(z).value;
  } else if constexpr (act == Act::kGelu) {
    return not_below_far(z) * normal_cdf(z);
  } else if constexpr (act == Act::kSigmoid) {
    return Sigmoid<V>(z).value;
  } else if constexpr (act == Act::kHardswish) {
    const V three = zero + 3;
    return z <= -three ? zero : (z >= three ? z : z * (z + three) * constant<V>(1.0 / 6));
  } else {
    return z;
  }
}

// d act / dz times dy, from z; where derivative_needs_only_y(act), equally from y. Where the
// derivative jumps it is PyTorch's: the smaller one, but of hardswish the outer one.
template <Act act, class V>
FASTCNN_HOST_DEVICE V act_bwd(V dy, V z) {
  const V zero = V{};
  if constexpr (act == Act::kRelu) {
    return z <= zero ? zero : dy;
  } else if constexpr (act == Act::kRelu6) {
    const V six = zero + 6;
    return z <= zero ? zero : (z >= six ? zero : dy);
  } else if constexpr (act == Act::kLeakyRelu) {
    return z > zero ? dy : dy * constant<V>(kLeakySlope);
  } else if constexpr (act == Act::kSilu) {
    const Sigmoid<V> sigmoid(z);
    return dy * (sigmoid.value + within_far(z) * (sigmoid.value * sigmoid.rest));
  } else if constexpr (act == Act::kGelu) {
    const V near = within_far(z);
    const V density = Math<V>::exp(near * near * constant<V>(-0.5));
    return dy * (normal_cdf(z) + near * density * constant<V>(0.39894228040143267794));
  } else if constexpr (act == Act::kSigmoid) {
    const Sigmoid<V> sigmoid(z);
    return dy * (sigmoid.value * sigmoid.rest);
  } else if constexpr (act == Act::kHardswish) {
    const V three = zero + 3;
    const V derivative = z * constant<V>(1.0 / 3) + constant<V>(0.5);
    return z <= -three ? zero : (z >= three ? dy : dy * derivative);
  } else {
    return dy;
  }
}

// An activation of several values, in place. cpu/simd/vec_math.h has those of exp for its vectors.
template <class V>
struct EachAct {
  template <Act act, int kCount>
  FASTCNN_HOST_DEVICE static void fwd(V (&z)[kCount]) {
    for (int i = 0; i < kCount; ++i) z[i] = act_fwd<act>(z[i]);
  }
  template <Act act, int kCount>
  FASTCNN_HOST_DEVICE static void bwd(V (&dy)[kCount], const V (&z)[kCount]) {
    for (int i = 0; i < kCount; ++i) dy[i] = act_bwd<act>(dy[i], z[i]);
  }
};

// Any activation, known at run time only, in place, for several values at once, which share the one
// branch.
template <class V, int kCount>
FASTCNN_HOST_DEVICE void act_fwd(Act act, V (&z)[kCount]) {
  switch (act) {
    case Act::kNone:
      return;
    case Act::kRelu:
      return EachAct<V>::template fwd<Act::kRelu>(z);
    case Act::kRelu6:
      return EachAct<V>::template fwd<Act::kRelu6>(z);
    case Act::kLeakyRelu:
      return EachAct<V>::template fwd<Act::kLeakyRelu>(z);
    case Act::kSilu:
      return EachAct<V>::template fwd<Act::kSilu>(z);
    case Act::kGelu:
      return EachAct<V>::template fwd<Act::kGelu>(z);
    case Act::kSigmoid:
      return EachAct<V>::template fwd<Act::kSigmoid>(z);
    case Act::kHardswish:
      return EachAct<V>::template fwd<Act::kHardswish>(z);
  }
}

template <class V, int kCount>
FASTCNN_HOST_DEVICE void act_bwd(Act act, V (&dy)[kCount], const V (&z)[kCount]) {
  switch (act) {
    case Act::kNone:
      return;
    case Act::kRelu:
      return EachAct<V>::template bwd<Act::kRelu>(dy, z);
    case Act::kRelu6:
      return EachAct<V>::template bwd<Act::kRelu6>(dy, z);
    case Act::kLeakyRelu:
      return EachAct<V>::template bwd<Act::kLeakyRelu>(dy, z);
    case Act::kSilu:
      return EachAct<V>::template bwd<Act::kSilu>(dy, z);
    case Act::kGelu:
      return EachAct<V>::template bwd<Act::kGelu>(dy, z);
    case Act::kSigmoid:
      return EachAct<V>::template bwd<Act::kSigmoid>(dy, z);
    case Act::kHardswish:
      return EachAct<V>::template bwd<Act::kHardswish>(dy, z);
  }
}

}  // namespace fastcnn
