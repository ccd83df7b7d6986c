// Reading bytes of an image at places that differ from lane to lane.
#pragma once

#include "common/vec.h"

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

// An image as a source of bytes. Four are read at once, also where the fourth lies beyond the
// image: never beyond the batch, whose size in bytes must be at least 4.
class Bytes {
 public:
  // left: bytes from `image` to the end of the batch.
  Bytes(const uint8_t* image, int64_t left)
      : image_(image), last_(static_cast<int32_t>(left - 4 < INT32_MAX ? left - 4 : INT32_MAX)) {}

  // In each lane the four bytes from its offset on, the first lowest; 0 for what lies beyond.
  Words at(Ints offset) const {
    const Ints last = splat(last_);
    const Ints start = offset < last ? offset : last;
    return words(start) >> reinterpret_cast<Words>((offset - start) << 3);
  }

 private:
  Words words(Ints offset) const {
#if defined(__AVX512F__)
    return reinterpret_cast<Words>(_mm512_mask_i32gather_epi32(
        _mm512_setzero_si512(), 0xffff, reinterpret_cast<__m512i>(offset), image_, 1));
#elif defined(__AVX2__)
    return reinterpret_cast<Words>(_mm256_i32gather_epi32(reinterpret_cast<const int*>(image_),
                                                          reinterpret_cast<__m256i>(offset), 1));
#else
    Words words{};
    for (int i = 0; i < kLanes<int32_t>; ++i) {
      uint32_t word;
      std::memcpy(&word, image_ + offset[i], sizeof word);
      words[i] = word;
    }
    return words;
#endif
  }

  const uint8_t* image_;
  int32_t last_;
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
