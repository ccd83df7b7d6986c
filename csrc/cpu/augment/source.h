// How augment samples one image on the CPU: by copying pixels where geometry is flips and crops
// alone, else bilinearly.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <new>

#include "augment.h"
#include "common/color.h"
#include "cpu/simd/gather.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

constexpr int64_t kLane = kLanes<float>;

// Memory of one thread, uninitialised, kept from task to task.
template <class S>
class Reused {
 public:
  Reused() = default;
  ~Reused() { std::free(data_); }
  Reused(const Reused&) = delete;
  Reused& operator=(const Reused&) = delete;

  S* reserve(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = count;
      data_ = static_cast<S*>(std::aligned_alloc(64, ceil_div(count * sizeof(S), 64) * 64));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  S* data_ = nullptr;
  int64_t capacity_ = 0;
};

// One row of the output in grey levels, channel by channel, each rounded up to whole vectors.
struct Row {
  float* levels;
  int64_t stride;

  float* channel(int64_t j) const { return levels + j * stride; }
};

inline Floats level_of(Words pixel, int byte) {
  return to_float(reinterpret_cast<Ints>((pixel >> (8 * byte)) & 255u));
}

inline Floats at_least_zero(Floats v) { return v > 0.f ? v : Floats{}; }

// `count` pixels from the `start`th on, as words: the channels in the lowest bytes, 0 above.
template <int kChannels, bool kPacked>
void load_pixels(const uint8_t* image, int64_t plane, int64_t start, int64_t count, uint32_t* out) {
  if constexpr (kPacked) {
    const uint8_t* from = image + start * kChannels;
    for (int64_t i = 0; i + 1 < count; ++i) {  // with a byte of the next pixel, masked out
      uint32_t word;
      std::memcpy(&word, from + i * kChannels, sizeof word);
      out[i] = word & 0xffffffu;
    }
    out[count - 1] = 0;
    std::memcpy(&out[count - 1], from + (count - 1) * kChannels, kChannels);
  } else {
    using Bytes = VecOf<uint8_t, kLane>::type;
    const auto widen = [&](int64_t i, int64_t many) __attribute__((always_inline)) {
      Words word{};
      for (int j = 0; j < kChannels; ++j) {
        Bytes bytes{};
        std::memcpy(&bytes, image + j * plane + start + i, static_cast<size_t>(many));
        word |= __builtin_convertvector(bytes, Words) << (8 * j);
      }
      std::memcpy(out + i, &word, static_cast<size_t>(many) * sizeof(uint32_t));
    };
    for_each_vector<float>(count, widen);
  }
}

// Whether each pixel of the output is one of the source (flips and crops alone), and which.
class Copying {
 public:
  Copying(const AugmentParams& p, int64_t i)
      : p_(p), s_(p.samples[i]), image_(p.images + i * p.c * p.h_in * p.w_in) {
    // From the first pixel to the last one step of 1 each, within the crop (nothing is clamped) and
    // with it within the source.
    const auto steps = [](float step, float start, float size, float most, float origin,
                          int64_t size_in) {
      const float end = start + step * (size - 1.f);
      const float low = start < end ? start : end, high = start < end ? end : start;
      return (step == 1.f || step == -1.f) && whole(start) && whole(origin) && low >= 0.f &&
             high <= most && origin + low >= 0.f &&
             origin + high <= static_cast<float>(size_in - 1);
    };
    holds_ = s_.xu == 1.f && s_.xv == 0.f && s_.yu == 0.f && s_.yv == 1.f &&
             steps(s_.u_step, s_.u_start, static_cast<float>(p.w), s_.u_last, s_.x0, p.w_in) &&
             steps(s_.v_step, s_.v_start, static_cast<float>(p.h), s_.v_last, s_.y0, p.h_in);
  }

  bool holds() const { return holds_; }
  bool back() const { return s_.u_step < 0.f; }  // each row is mirrored

  // The leftmost pixel that row y of the output shows, as its number in a plane of the source.
  int64_t first_pixel(int64_t y) const {
    const int64_t row = static_cast<int64_t>(s_.v(static_cast<float>(y)) + s_.y0);
    const int64_t first = static_cast<int64_t>(s_.u_start + s_.x0) - (back() ? p_.w - 1 : 0);
    return row * p_.w_in + first;
  }
  const uint8_t* image() const { return image_; }

 private:
  static bool whole(float v) {
    return v > -2e7f && v < 2e7f && v == static_cast<float>(static_cast<int32_t>(v));
  }

  const AugmentParams& p_;
  const AugmentSample& s_;
  const uint8_t* image_;
  bool holds_;
};

// Pixels of the source, in the rows that a band of the output sees, for each of the band's own: of
// more a rotated band, which sees most rows and few pixels of each, reads those few one by one.
constexpr int64_t kMostLoaded = 4;

// One image, as it is sampled for the rows from `first` to before `last`.
template <int kChannels, bool kPacked>  // kPacked: a pixel's channels lie side by side
class Source {
 public:
  Source(const AugmentParams& p, int64_t i, int64_t first, int64_t last, Reused<uint32_t>& memory)
      : p_(p), sample_(p.samples[i]), copying_(p, i) {
    // Copied: one row of the output, whose last vector is read whole. Sampled: the rows of the
    // source that are seen, and a word, since pixels are read in pairs.
    if (!copying_.holds()) find_rows(first, last);
    loaded_ = rows_ * p.w_in <= kMostLoaded * (last - first) * p.w;
    if (!copying_.holds() && !loaded_) return;
    const int64_t words = copying_.holds() ? ceil_div(p.w, kLane) * kLane : rows_ * p.w_in + 1;
    pixels_ = memory.reserve(words);
    if (copying_.holds()) return;
    load_pixels<kChannels, kPacked>(copying_.image(), p.h_in * p.w_in, top_ * p.w_in,
                                    rows_ * p.w_in, pixels_);
    pixels_[words - 1] = 0;
  }

  void read(int64_t y, const Row& out) const {
    if (copying_.holds()) {
      copy(y, out);
    } else if (loaded_) {
      sample<true>(y, out);
    } else {
      sample<false>(y, out);
    }
  }

 private:
  void copy(int64_t y, const Row& out) const {
    load_pixels<kChannels, kPacked>(copying_.image(), p_.h_in * p_.w_in, copying_.first_pixel(y),
                                    p_.w, pixels_);
    const Ints mirrored = static_cast<int32_t>(kLane) - 1 - lane_numbers();
    for (int64_t i = 0; i < p_.w; i += kLane) {
      Words pixel{};
      if (!copying_.back()) {
        std::memcpy(&pixel, pixels_ + i, sizeof pixel);
      } else if (p_.w - i >= kLane) {
        std::memcpy(&pixel, pixels_ + p_.w - kLane - i, sizeof pixel);
        pixel = __builtin_shuffle(pixel, mirrored);
      } else {
        for (int64_t k = 0; k < p_.w - i; ++k) pixel[k] = pixels_[p_.w - 1 - i - k];
      }
      for (int j = 0; j < kChannels; ++j) store(out.channel(j) + i, level_of(pixel, j));
    }
  }

  // The source's rows that output rows from `first` to before `last` see: coordinates are linear,
  // so the corners tell, but for a rounding. What is asked outside of them weighs nothing.
  void find_rows(int64_t first, int64_t last) {
    float low = 3e38f, high = -3e38f;
    for (int64_t y : {first, last - 1}) {
      for (int64_t x : {int64_t{0}, p_.w - 1}) {
        const float t =
            sample_.y(sample_.u(static_cast<float>(x)), sample_.v(static_cast<float>(y)));
        low = t < low ? t : low;
        high = t > high ? t : high;
      }
    }
    const float most = static_cast<float>(p_.h_in - 1);
    top_ = static_cast<int64_t>(AugmentSample::clamp(low - 1.f, 0.f, most));
    rows_ = static_cast<int64_t>(AugmentSample::clamp(high + 2.f, 0.f, most)) - top_ + 1;
    if (rows_ < 2) {  // all of it outside: any two rows will do
      rows_ = min(2, p_.h_in);
      top_ = min(top_, p_.h_in - rows_);
    }
  }

  // Pixels as load_pixels has them, from the source itself: index is their number in a plane.
  Words fetch(Ints index) const {
    const uint8_t* channel = copying_.image();
    Words words{};
    for (int j = 0; j < kChannels; ++j, channel += kPacked ? 1 : p_.h_in * p_.w_in) {
      for (int k = 0; k < kLane; ++k) {
        words[k] |= uint32_t{channel[index[k] * int64_t{kPacked ? kChannels : 1}]} << (8 * j);
      }
    }
    return words;
  }

  // Bilinear. The two neighbours along an axis are `left` (`top`) and the next, kept within what
  // was loaded; each weighs 1 minus its distance, at least 0, so that what is outside weighs
  // nothing, and the fill has the rest of the weight.
  template <bool kLoaded>
  void sample(int64_t y, const Row& out) const {
    const float v = sample_.v(static_cast<float>(y));
    const int32_t width = static_cast<int32_t>(p_.w_in), above = static_cast<int32_t>(top_);
    const float last_left = static_cast<float>(max(0, p_.w_in - 2));
    const float last_top = static_cast<float>(max(top_, top_ + rows_ - 2));
    const float right = p_.w_in > 1 ? 1.f : 0.f, bottom = rows_ > 1 ? 1.f : 0.f;  // is there one?
    const int32_t beside = p_.w_in > 1 ? 1 : 0, below = rows_ > 1 ? width : 0;
    const Ints lane = lane_numbers();
    for (int64_t i = 0; i < p_.w; i += kLane) {
      const Floats u = sample_.u(to_float(lane + static_cast<int32_t>(i)));
      const Floats x = sample_.x(u, v), t = sample_.y(u, v);
      const Ints left = to_int(AugmentSample::clamp(x, 0.f, last_left));
      const Ints top = to_int(AugmentSample::clamp(t, static_cast<float>(top_), last_top));
      const Floats from_left = x - to_float(left), from_top = t - to_float(top);
      const Floats w_left = at_least_zero(1.f - magnitude(from_left));
      const Floats w_right = at_least_zero(1.f - magnitude(from_left - 1.f)) * right;
      const Floats w_top = at_least_zero(1.f - magnitude(from_top));
      const Floats w_bottom = at_least_zero(1.f - magnitude(from_top - 1.f)) * bottom;
      const Floats outside = 1.f - (w_left + w_right) * (w_top + w_bottom);
      Words a, b, c, d;
      const Ints place = (top - (kLoaded ? above : 0)) * width + left;
      if constexpr (kLoaded) {
        gather_pairs(pixels_, place, a, b);
        gather_pairs(pixels_, place + below, c, d);
      } else {
        a = fetch(place);
        b = fetch(place + beside);
        c = fetch(place + below);
        d = fetch(place + below + beside);
      }
      for (int j = 0; j < kChannels; ++j) {
        const Floats upper = level_of(a, j) * w_left + level_of(b, j) * w_right;
        const Floats lower = level_of(c, j) * w_left + level_of(d, j) * w_right;
        store(out.channel(j) + i, upper * w_top + lower * w_bottom + outside * p_.channels[j].fill);
      }
    }
  }

  const AugmentParams& p_;
  const AugmentSample& sample_;
  Copying copying_;
  bool loaded_;
  uint32_t* pixels_ = nullptr;
  int64_t top_ = 0, rows_ = 0;  // of the source, in pixels_
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
