// common/dropout_mask.h for the CPU's vectors: the bits of a whole register of blocks at a time.
#pragma once

#include "common/dropout_mask.h"
#include "cpu/simd/philox_vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

using Halves = Vec<uint16_t>;
constexpr int kCounters = kLanes<uint64_t>;    // blocks of a register
constexpr int kUnit = kKeepBlock * kCounters;  // their elements: 16, 32 or 64, one bit each
static_assert(kUnit == 2 * kLanes<uint16_t>);

// What all draws of one call share.
struct KeepVector {
  PhiloxVectorKeys keys;
  Halves limit;
  uint64_t all;  // every bit where all draws are kept: their limit, 2^16, is no 16-bit number
  Keep keep;

  explicit KeepVector(const Keep& keep)
      : keys(keep.seed),
        limit(splat(static_cast<uint16_t>(keep.high))),
        all(keep.high > 0xffff ? ~uint64_t{0} : 0),
        keep(keep) {}
};

// The lane that holds block number b of kCounters. With 64-byte registers, whose 16-byte quarters
// are unpacked each by itself, this order is what brings the bits into the elements' order.
constexpr int lane_of(int b) { return kCounters == 8 ? b % 4 * 2 + b / 4 : b; }

// first + b * step for block number b of the pair.
inline WideWordPair block_lanes(uint64_t first, uint64_t step) {
  WideWords number{};
#pragma GCC unroll 8
  for (int b = 0; b < kCounters; ++b) number[lane_of(b)] = static_cast<uint64_t>(b);
  const WideWords v = number * step + first;
  return {v, v + kCounters * step};
}

#if defined(__AVX512F__)
// One bit for each 16-bit lane of a, then of b.
inline uint64_t concat_bits(uint32_t a, uint32_t b) { return a | static_cast<uint64_t>(b) << 32; }
inline uint64_t bits_below(Halves a, Halves b, Halves limit) {
  const __m512i l = reinterpret_cast<__m512i>(limit);
  return concat_bits(_mm512_cmplt_epu16_mask(reinterpret_cast<__m512i>(a), l),
                     _mm512_cmplt_epu16_mask(reinterpret_cast<__m512i>(b), l));
}
inline uint64_t bits_equal(Halves a, Halves b, Halves limit) {
  const __m512i l = reinterpret_cast<__m512i>(limit);
  return concat_bits(_mm512_cmpeq_epu16_mask(reinterpret_cast<__m512i>(a), l),
                     _mm512_cmpeq_epu16_mask(reinterpret_cast<__m512i>(b), l));
}
#else
// One bit for each 16-bit lane that is all ones: the first half of a's, the first half of b's, then
// the second ones where a register has two halves (AVX2).
template <class Mask>
inline uint64_t bits_of(Mask a, Mask b) {
#if defined(__AVX2__)
  const __m256i packed =
      _mm256_packs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return static_cast<uint32_t>(_mm256_movemask_epi8(packed));
#elif defined(__SSE2__)
  const __m128i packed =
      _mm_packs_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b));
  return static_cast<uint32_t>(_mm_movemask_epi8(packed));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<uint16_t>; ++i) {
    bits |= static_cast<uint64_t>(a[i] & 1) << i;
    bits |= static_cast<uint64_t>(b[i] & 1) << (i + kLanes<uint16_t>);
  }
  return bits;
#endif
}
inline uint64_t bits_below(Halves a, Halves b, Halves limit) {
  return bits_of(a < limit, b < limit);
}
inline uint64_t bits_equal(Halves a, Halves b, Halves limit) {
  return bits_of(a == limit, b == limit);
}
#endif

// As kept by a mask of bits: value where the lane's bit is set, else 0.
template <class S>
inline Vec<S> kept(uint64_t bits, Vec<S> value) {
#if defined(__AVX512F__)
  static_assert(sizeof(S) == 4);
  return reinterpret_cast<Vec<S>>(
      _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(value)));
#else
  using Int = typename IntOf<S>::type;
  Vec<Int> lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = Int{1} << i;
  return (splat(static_cast<Int>(bits)) & lane) != Vec<Int>{} ? value : Vec<S>{};
#endif
}

// The rare part of keep_bits: elements whose first draw equals the threshold's upper half.
[[gnu::noinline, gnu::cold]] inline uint64_t keep_equal_bits(const Keep& keep,
                                                             const WideWords& blocks,
                                                             uint64_t equal) {
  uint64_t bits = 0;
  for (int b = 0; b < kCounters; ++b) {
    const uint32_t own = static_cast<uint32_t>(equal >> (kKeepBlock * b)) & 0xff;
    if (own == 0) continue;
    bits |= static_cast<uint64_t>(keep_equal(keep, blocks[lane_of(b)], own)) << (kKeepBlock * b);
  }
  return bits;
}

// From the four words of each lane to the bits of its block.
inline __attribute__((always_inline)) uint64_t bits_of_words(const KeepVector& k, WideWords blocks,
                                                             WideWords w0, WideWords w1,
                                                             WideWords w2, WideWords w3) {
  const WideWords low = splat<uint64_t>(0xffffffff);
  const WideWords first = (w0 & low) | (w1 << 32), second = (w2 & low) | (w3 << 32);
  // The halves of even lanes' blocks, and of odd ones'.
  WideWords even, odd;
#if defined(__AVX512F__)
  even = __builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14);
  odd = __builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
#elif defined(__AVX2__)
  even = __builtin_shufflevector(first, second, 0, 4, 2, 6);
  odd = __builtin_shufflevector(first, second, 1, 5, 3, 7);
#else
  even = __builtin_shufflevector(first, second, 0, 2);
  odd = __builtin_shufflevector(first, second, 1, 3);
#endif
  const Halves a = reinterpret_cast<Halves>(even), b = reinterpret_cast<Halves>(odd);
  uint64_t bits = bits_below(a, b, k.limit) | k.all;
  const uint64_t equal = bits_equal(a, b, k.limit);
  if (__builtin_expect(equal != 0 && k.keep.low != 0, 0)) {
    bits |= keep_equal_bits(k.keep, blocks, equal);
  }
  return bits;
}

// Of blocks.a and blocks.b each, bit 8 * b + j: element j of the block in lane_of(b) is kept.
inline __attribute__((always_inline)) void keep_bits(const KeepVector& k, WideWordPair blocks,
                                                     uint64_t (&bits)[2]) {
  WideWordPair w[4] = {blocks, blocks >> 32, {}, {}};
  philox4x32_10(w, k.keys, MultiplyVector{});
  bits[0] = bits_of_words(k, blocks.a, w[0].a, w[1].a, w[2].a, w[3].a);
  bits[1] = bits_of_words(k, blocks.b, w[0].b, w[1].b, w[2].b, w[3].b);
}

// ---- channels_last -----------------------------------------------------------------------------

// Neighbours in memory are neighbouring channels, whose logical indices lie hw apart, in different
// blocks and at different places of them (their phase). So each channel has a window of two blocks,
// 16 bits: the one its phase lies in, and the next.

// Shifts kCounters windows by a block and puts the blocks of `bits` into the upper halves.
inline void push_blocks(uint16_t* windows, uint64_t bits) {
  typedef uint16_t Window __attribute__((vector_size(2 * kCounters)));
  typedef uint8_t Bytes __attribute__((vector_size(kCounters)));
  Window old;
  Bytes block;
  std::memcpy(&old, windows, sizeof old);
  std::memcpy(&block, &bits, sizeof block);
  const Window pushed = (old >> 8) | (__builtin_convertvector(block, Window) << 8);
  std::memcpy(windows, &pushed, sizeof pushed);
}

// Of kUnit channels the bit `shift` places above the one that `place` marks.
inline uint64_t window_bits(const uint16_t* windows, const uint16_t* place, int shift) {
  Halves a, b, at_a, at_b;
  std::memcpy(&a, windows, sizeof a);
  std::memcpy(&b, windows + kLanes<uint16_t>, sizeof b);
  std::memcpy(&at_a, place, sizeof at_a);
  std::memcpy(&at_b, place + kLanes<uint16_t>, sizeof at_b);
  at_a <<= shift;
  at_b <<= shift;
#if defined(__AVX512F__)
  return concat_bits(
      _mm512_test_epi16_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(at_a)),
      _mm512_test_epi16_mask(reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(at_b)));
#else
  const Halves zero{};
  auto in_a = (a & at_a) != zero, in_b = (b & at_b) != zero;
#if defined(__AVX2__)  // bits_of takes the halves of both in turn
  const auto first = __builtin_shufflevector(reinterpret_cast<WideWords>(in_a),
                                             reinterpret_cast<WideWords>(in_b), 0, 1, 4, 5);
  const auto second = __builtin_shufflevector(reinterpret_cast<WideWords>(in_a),
                                              reinterpret_cast<WideWords>(in_b), 2, 3, 6, 7);
  return bits_of(first, second);
#else
  return bits_of(in_a, in_b);
#endif
#endif
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
