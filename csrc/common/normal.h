// Normal numbers from random words, defined once for host and device, for scalars and for the CPU's
// vectors: Box and Muller 1958. Logarithm, sine and cosine are written out, so that every device
// computes the same numbers but for the rounding of fused multiply-adds.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastcnn {

// ln x for x in [2^-23, 1], to 1 ulp: x = 2^e m with m around 1, atanh's series in (m - 1) / (m +
// 1). Coefficients: FreeBSD's logf.
template <class V, class U>
FASTCNN_HOST_DEVICE V log_of(V x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3;  // sqrt(0.5) as bits
  const U bits = __builtin_bit_cast(U, x) + (0x3f800000u - kRootHalf);
  const V m = __builtin_bit_cast(V, (bits & 0x007fffffu) + kRootHalf);
  // An integer below 2^23 as a float: put into the mantissa of 2^23.
  const V e = __builtin_bit_cast(V, (bits >> 23) | 0x4b000000u) - (8388608.f + 127.f);
  const V f = m - 1.f, s = f / (f + 2.f), z = s * s, w = z * z;
  const V even = z * (w * 0.28498786688f + 0.66666662693f);
  const V odd = w * (w * 0.24279078841f + 0.40000972152f);
  const V half = f * f * 0.5f;
  return s * (half + even + odd) + e * 9.0580006145e-6f - half + f + e * 0.69313812256f;
}

// Two independent normal numbers from two random words: sqrt(-2 ln u) in a random direction. The
// largest has a magnitude of 5.65. root: the square root of a V.
template <class V, class U, class Root>
FASTCNN_HOST_DEVICE void normal_pair(U radius_word, U angle_word, Root root, V& first, V& second) {
  const V u = 2.f - __builtin_bit_cast(V, (radius_word >> 9) | 0x3f800000u);  // (0, 1]
  const V radius = root(log_of<V, U>(u) * -2.f);
  // The quadrant, and within it an angle from -pi/4 to pi/4. Coefficients: Cephes' sinf and cosf.
  const U quadrant = angle_word >> 30;
  const V t = __builtin_bit_cast(V, ((angle_word << 2) >> 9) | 0x3f800000u) - 1.5f;
  const V angle = t * 1.57079632679f, z = angle * angle;
  const V sine =
      ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * angle + angle;
  const V cosine =
      ((z * 2.443315711e-5f - 1.388731625e-3f) * z + 4.166664568e-2f) * z * z - z * 0.5f + 1.f;
  const auto odd = (quadrant & 1u) != 0;
  const V x = odd ? sine : cosine, y = odd ? cosine : sine;
  const U sign_x = ((quadrant + 1u) & 2u) << 30, sign_y = (quadrant & 2u) << 30;
  first = radius * __builtin_bit_cast(V, __builtin_bit_cast(U, x) ^ sign_x);
  second = radius * __builtin_bit_cast(V, __builtin_bit_cast(U, y) ^ sign_y);
}

}  // namespace fastcnn
