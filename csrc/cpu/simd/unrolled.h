// Tiles of vectors that stay in registers: loops that are written out.
#pragma once

#include "cpu/simd/vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr bool kManyRegisters = true;  // 32 vectors; 16 below
#else
constexpr bool kManyRegisters = false;
#endif

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};

// body(Index<i>{}) for i from kBegin to kEnd - 1: arrays that are indexed by it stay in registers.
template <int kBegin, int kEnd, class Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
  if constexpr (kBegin < kEnd) {
    body(Index<kBegin>{});
    unrolled<kBegin + 1, kEnd>(body);
  }
}

// The compiler would read a vector from memory again for each multiply-add that it is part of. By
// value: a reference to a variable has GCC 12 send it through the stack.
template <class V>
inline __attribute__((always_inline)) V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
