// Which elements a random mask keeps: a function of the seed, the probability and the element's
// logical index i (in the order n, c, h, w, whatever the memory layout), and of nothing else.
//
// Element i is kept where a draw of 32 bits is below the threshold T, the probability to be kept in
// units of 2^-32:
//   u(i) = 65536 * h(i, 0) + h(i, 1) < T
//   h(i, stream): 16 bits, number i % 8 (low half first) of
//                 Philox4x32-10(counter = {i / 8 low, i / 8 high, stream, 0}, key = seed)
// So one Philox serves eight elements, and is exact to 32 bits all the same: h(i, 1) decides only
// where h(i, 0) equals the upper half of T, which is one element of 65536, and it is drawn only
// there.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace fastcnn {

constexpr int kKeepBlock = 8;  // elements of one draw, a power of two

struct Keep {
  uint64_t seed;
  uint32_t high, low;  // the threshold's lower 16 bits, and what is above: at most 2^16

  Keep() = default;
  FASTCNN_HOST_DEVICE Keep(uint64_t seed, uint64_t threshold)
      : seed(seed),
        high(static_cast<uint32_t>(threshold >> 16)),
        low(static_cast<uint32_t>(threshold & 0xffff)) {}
};

constexpr double kDraws = 4294967296.;  // 2^32, of which `threshold` are kept

// The multiple of 2^-32 nearest to 1 - p, but 0 and 1 (all draws) only where p is 1 and 0.
inline uint64_t keep_threshold(double p) {
  if (p >= 1) return 0;
  if (p <= 0) return uint64_t{1} << 32;
  const double nearest = (1 - p) * kDraws + 0.5;
  return nearest < 1 ? 1 : nearest >= kDraws - 1 ? 0xffffffff : static_cast<uint64_t>(nearest);
}

// What kept elements are multiplied by, so that the mean stays: 1 / (threshold / 2^32).
inline double keep_scale(uint64_t threshold) {
  return threshold == 0 ? 0 : kDraws / static_cast<double>(threshold);
}

// h(8 * block + j, stream) for j = 0 to 7, two to a word.
struct Halves8 {
  uint32_t words[4];

  FASTCNN_HOST_DEVICE Halves8(uint64_t block, uint32_t stream, uint64_t seed) {
    uint64_t wide[4] = {block, block >> 32, stream, 0};
    philox4x32_10(wide, PhiloxKeys(seed), MultiplyScalar{});
    for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(wide[i]);
  }

  FASTCNN_HOST_DEVICE uint32_t at(int j) const {
    return j % 2 == 0 ? words[j / 2] & 0xffff : words[j / 2] >> 16;
  }

  // Bit j: number j is below a limit of at most 2^16. Each difference's sign enters from below.
  FASTCNN_HOST_DEVICE uint32_t below(uint32_t limit) const {
    uint32_t bits = 0;
    for (int j = kKeepBlock - 1; j >= 0; --j) bits = bits << 1 | (at(j) - limit) >> 31;
    return bits;
  }

  // Whether one of them is a number of 16 bits. A half of a word is 0 where subtracting 1 sets its
  // highest bit anew; a borrow of the lower half can deceive the upper one only where that is so.
  FASTCNN_HOST_DEVICE bool any_is(uint32_t number) const {
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t apart = words[i] ^ number * 0x10001u;
      found |= (apart - 0x10001u) & ~apart;
    }
    return (found & 0x80008000u) != 0;
  }

  FASTCNN_HOST_DEVICE uint32_t equal(uint32_t number) const {
    uint32_t bits = 0;
    for (int j = 0; j < kKeepBlock; ++j) bits |= static_cast<uint32_t>(at(j) == number) << j;
    return bits;
  }
};

// For the elements that `equal` names in a block: which of them the further draw keeps.
FASTCNN_HOST_DEVICE uint32_t keep_equal(const Keep& keep, uint64_t block, uint32_t equal) {
  return equal & Halves8(block, 1, keep.seed).below(keep.low);
}

// Bit j: element 8 * block + j is kept.
FASTCNN_HOST_DEVICE uint32_t keep_block(const Keep& keep, uint64_t block) {
  const Halves8 halves(block, 0, keep.seed);
  uint32_t bits = halves.below(keep.high);
  if (keep.low != 0 && halves.any_is(keep.high)) {
    bits |= keep_equal(keep, block, halves.equal(keep.high));
  }
  return bits;
}

// The bits of 8 elements from logical index `first` on, which may straddle two blocks.
FASTCNN_HOST_DEVICE uint32_t keep_from(const Keep& keep, uint64_t first) {
  const uint32_t phase = static_cast<uint32_t>(first % kKeepBlock);
  uint32_t bits = keep_block(keep, first / kKeepBlock);
  if (phase != 0) bits |= keep_block(keep, first / kKeepBlock + 1) << kKeepBlock;
  return bits >> phase & 0xff;
}

}  // namespace fastcnn
