// common/philox.h for the CPU's vectors: each lane has a counter of its own.
#pragma once

#include "common/philox.h"
#include "cpu/simd/vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastcnn::FASTCNN_CPU_LEVEL {

// Words of 32 bits in lanes of 64, as philox4x32_10 takes them.
using WideWords = Vec<uint64_t>;

// Two registers of them, the instructions on which alternate: a Philox is one long chain, and one
// alone leaves half of the processor idle.
struct WideWordPair {
  WideWords a, b;
};
inline WideWordPair operator^(WideWordPair x, WideWordPair y) { return {x.a ^ y.a, x.b ^ y.b}; }
inline WideWordPair operator^(WideWordPair x, const WideWords& y) { return {x.a ^ y, x.b ^ y}; }
inline WideWordPair operator>>(WideWordPair x, int bits) { return {x.a >> bits, x.b >> bits}; }

// The 64-bit products of the lanes' low 32 bits and m.
struct MultiplyVector {
  WideWordPair operator()(WideWordPair pair, uint32_t m) const {
    return {(*this)(pair.a, m), (*this)(pair.b, m)};
  }
  WideWords operator()(WideWords word, uint32_t m) const {
    const WideWords factor = splat<uint64_t>(m);
#if defined(__AVX512F__)
    // The masked form, all lanes on: see to_float in vec.h.
    return reinterpret_cast<WideWords>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(word),
                                                              reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
    return reinterpret_cast<WideWords>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(word), reinterpret_cast<__m256i>(factor)));
#elif defined(__SSE2__)
    return reinterpret_cast<WideWords>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(word), reinterpret_cast<__m128i>(factor)));
#else
    return (word & splat<uint64_t>(0xffffffff)) * factor;
#endif
  }
};

// The rounds' keys in memory, from where the exclusive or takes them: made anew they would cost an
// instruction each, a quarter of a Philox.
struct PhiloxVectorKeys {
  WideWords k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit PhiloxVectorKeys(uint64_t key) {
    const PhiloxKeys keys(key);
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = splat(keys.first(round));
      k1[round] = splat(keys.second(round));
    }
  }
  const WideWords& first(int round) const { return k0[round]; }
  const WideWords& second(int round) const { return k1[round]; }
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
