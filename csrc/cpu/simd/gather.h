// Vectors of integers beside those of floats, and reading at places that differ from lane to lane.
#pragma once

#include "cpu/simd/vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

using Floats = Vec<float>;
using Ints = Vec<int32_t>;
using Words = Vec<uint32_t>;

inline Ints lane_numbers() {
  Ints lane{};
  for (int i = 0; i < kLanes<int32_t>; ++i) lane[i] = i;
  return lane;
}

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// Towards 0. Each lane must be within int32_t's range.
inline Ints to_int(Floats v) { return __builtin_convertvector(v, Ints); }

// The square root of each lane.
inline Floats root(Floats v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// In each lane words[index] and words[index + 1], by one load of 8 bytes.
inline void gather_pairs(const uint32_t* words, Ints index, Words& first, Words& second) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  using Half = VecOf<int32_t, kVectorBytes / 2>::type;
  Half halves[2];
  std::memcpy(halves, &index, sizeof halves);
  const auto read = [&](Half half) {
    return reinterpret_cast<Words>(_mm512_mask_i32gather_epi64(
        _mm512_setzero_si512(), 0xff, reinterpret_cast<__m256i>(half), words, 4));
  };
#else
  using Half = VecOf<int32_t, kVectorBytes / 2>::type;
  Half halves[2];
  std::memcpy(halves, &index, sizeof halves);
  const auto read = [&](Half half) {
    return reinterpret_cast<Words>(_mm256_i32gather_epi64(reinterpret_cast<const long long*>(words),
                                                          reinterpret_cast<__m128i>(half), 4));
  };
#endif
  const Words low = read(halves[0]), high = read(halves[1]);
  const Ints even = lane_numbers() * 2;
  first = __builtin_shuffle(low, high, even);
  second = __builtin_shuffle(low, high, even + 1);
#else
  for (int i = 0; i < kLanes<int32_t>; ++i) {
    first[i] = words[index[i]];
    second[i] = words[index[i] + 1];
  }
#endif
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
