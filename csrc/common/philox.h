// Philox4x32-10, defined once for host scalars, for the CPU's vectors and for CUDA.
//
// A counter-based generator: 128 bits of counter and 64 of key give 128 random bits, with no state,
// so that any element's draw can be made anywhere, at any time, in any order. Source: Salmon,
// Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastcnn {

// The 64-bit product of the low 32 bits of a word and m.
struct MultiplyScalar {
  FASTCNN_HOST_DEVICE constexpr uint64_t operator()(uint64_t word, uint32_t m) const {
    return (word & 0xffffffffu) * m;
  }
};

// The ten rounds' keys, which are the same for every counter.
struct PhiloxKeys {
  uint32_t k0, k1;

  FASTCNN_HOST_DEVICE constexpr explicit PhiloxKeys(uint64_t key)
      : k0(static_cast<uint32_t>(key)), k1(static_cast<uint32_t>(key >> 32)) {}
  FASTCNN_HOST_DEVICE constexpr uint64_t first(uint32_t round) const {
    return k0 + round * 0x9E3779B9u;  // the golden ratio
  }
  FASTCNN_HOST_DEVICE constexpr uint64_t second(uint32_t round) const {
    return k1 + round * 0xBB67AE85u;  // sqrt(3) - 1
  }
};
constexpr int kPhiloxRounds = 10;

// words: the counter, replaced by the random bits. W is uint64_t or a vector of it, with a word of
// 32 bits in the low half; the upper half holds whatever is left there, in and out. So a product is
// one instruction, its low half needs none and its high half a shift. On a GPU the upper halves are
// never computed.
template <class W, class Keys, class Multiply>
FASTCNN_HOST_DEVICE constexpr void philox4x32_10(W (&words)[4], const Keys& keys,
                                                 Multiply multiply) {
#ifndef __CUDACC__  // nvcc unrolls it unasked
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const W p0 = multiply(words[0], 0xD2511F53u), p1 = multiply(words[2], 0xCD9E8D57u);
    words[0] = (p1 >> 32) ^ words[1] ^ keys.first(round);
    words[1] = p1;
    words[2] = (p0 >> 32) ^ words[3] ^ keys.second(round);
    words[3] = p0;
  }
}

// The known answers of the Random123 library (kat_vectors), asked at every compilation.
constexpr bool philox_answers(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key,
                              uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
  uint64_t words[4] = {c0, c1, c2, c3};
  philox4x32_10(words, PhiloxKeys(key), MultiplyScalar{});
  return static_cast<uint32_t>(words[0]) == a0 && static_cast<uint32_t>(words[1]) == a1 &&
         static_cast<uint32_t>(words[2]) == a2 && static_cast<uint32_t>(words[3]) == a3;
}
static_assert(philox_answers(0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
static_assert(philox_answers(0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffffffffffff,
                             0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
static_assert(philox_answers(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0x299f31d0a4093822,
                             0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));

}  // namespace fastcnn
