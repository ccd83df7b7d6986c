// common/philox.h for the CPU's vectors.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastcnn::FASTCNN_CPU_LEVEL {

// The 64-bit products of the lanes' low 32 bits and m.
struct MultiplyLanes {
  inline __attribute__((always_inline)) Vec<uint64_t> operator()(Vec<uint64_t> word,
                                                                 uint32_t m) const {
    using Wide = Vec<uint64_t>;
    const Wide factor = splat<uint64_t>(m);
#if defined(__AVX512F__)
    // The masked form, all lanes on: see to_float in vec.h.
    return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(word),
                                                         reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
    return reinterpret_cast<Wide>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(word), reinterpret_cast<__m256i>(factor)));
#elif defined(__SSE2__)
    return reinterpret_cast<Wide>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(word), reinterpret_cast<__m128i>(factor)));
#else
    return (word & splat<uint64_t>(0xffffffff)) * factor;
#endif
  }
};

// The rounds' keys in memory, from where the exclusive or takes them.
struct PhiloxLaneKeys {
  Vec<uint64_t> k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit PhiloxLaneKeys(uint64_t key) {
    const PhiloxKeys keys(key);
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = splat<uint64_t>(keys.first(round));
      k1[round] = splat<uint64_t>(keys.second(round));
    }
  }
  const Vec<uint64_t>& first(int round) const { return k0[round]; }
  const Vec<uint64_t>& second(int round) const { return k1[round]; }
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
