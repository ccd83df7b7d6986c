// augment on the CPU.
//
// Data movement: reads what of the images is seen, writes y once. A task is a band of one sample's
// rows. A row of the output passes through three short loops, whose floats between them stay in the
// L1 cache: `Source::read` samples the image, `colour` works on grey levels, `write` normalises and
// stores in y's dtype and layout. A sample whose contrast changes is sampled twice: contrast needs
// the mean of the sampled image, which is summed row by row and then joined in the rows' order.
#include "augment.h"

#include "common/color.h"
#include "common/dispatch.h"
#include "common/gather.h"
#include "common/normal.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kLane = kLanes<float>;

// One row of the output in grey levels, channel by channel, each rounded up to whole vectors.
struct Row {
  int64_t stride;
  Scratch<float> levels;

  Row(int64_t c, int64_t w) : stride(ceil_div(w, kLane) * kLane), levels(c * stride) {}
  float* channel(int64_t j) const { return levels.get() + j * stride; }
};

inline Floats level_of(Words word, int byte) {
  return to_float(reinterpret_cast<Ints>((word >> (8 * byte)) & 255u));
}

inline Floats at_least_zero(Floats v) { return v > 0.f ? v : Floats{}; }

// One image, as it is sampled.
template <int kChannels, bool kPacked>  // kPacked: a pixel's channels lie side by side
class Source {
 public:
  Source(const AugmentParams& p, const uint8_t* images, int64_t i)
      : p_(p),
        sample_(p.samples[i]),
        image_(images + i * p.c * p.h_in * p.w_in),
        bytes_(image_, max(4, p.n * p.c * p.h_in * p.w_in) - i * p.c * p.h_in * p.w_in),
        copied_(is_copied()) {}

  void read(int64_t y, const Row& out) const { copied_ ? copy(y, out) : sample(y, out); }

 private:
  // Whether each pixel of the output is one of the source: flips and crops alone.
  bool is_copied() const {
    const AugmentSample& s = sample_;
    const auto whole = [](float v) { return v == static_cast<float>(static_cast<int32_t>(v)); };
    const auto unit = [&](float step, float start) {
      return (step == 1.f || step == -1.f) && start >= 0.f && start <= 1e7f && whole(start);
    };
    // Both ends of u and v within the crop, so that nothing is clamped; and the crop in the source.
    const float u_end = s.u_step * static_cast<float>(p_.w - 1) + s.u_start;
    const float v_end = s.v_step * static_cast<float>(p_.h - 1) + s.v_start;
    const auto within = [&](float start, float end, float last, float origin, int64_t size) {
      const float low = start < end ? start : end, high = start < end ? end : start;
      return low >= 0.f && high <= last && origin + low >= 0.f && whole(origin) &&
             origin + high <= static_cast<float>(size - 1);
    };
    return unit(s.u_step, s.u_start) && unit(s.v_step, s.v_start) && s.xu == 1.f && s.xv == 0.f &&
           s.yu == 0.f && s.yv == 1.f && s.x0 >= -1e7f && s.x0 <= 1e7f && s.y0 >= -1e7f &&
           s.y0 <= 1e7f && within(s.u_start, u_end, s.u_last, s.x0, p_.w_in) &&
           within(s.v_start, v_end, s.v_last, s.y0, p_.h_in);
  }

  void copy(int64_t y, const Row& out) const {
    const int64_t row = static_cast<int64_t>(sample_.v(static_cast<float>(y)) + sample_.y0);
    const int64_t first = static_cast<int64_t>(sample_.u_start + sample_.x0);
    const int32_t step = sample_.u_step > 0.f ? 1 : -1;
    const int64_t start = row * p_.w_in + first;
    if constexpr (kPacked && kChannels == 3) {
      for (int64_t i = 0; i < p_.w; i += kLane) {
        const Ints column = lane_numbers() + static_cast<int32_t>(i);
        const Ints shown = column < splat(static_cast<int32_t>(p_.w)) ? column : Ints{};
        const Words pixel = bytes_.at((shown * step + static_cast<int32_t>(start)) * 3);
        for (int j = 0; j < 3; ++j) store(out.channel(j) + i, level_of(pixel, j));
      }
    } else {
      for (int j = 0; j < kChannels; ++j) {
        const uint8_t* from = image_ + j * p_.h_in * p_.w_in + start;
        float* to = out.channel(j);
        if (step > 0) {
          for (int64_t i = 0; i < p_.w; ++i) to[i] = static_cast<float>(from[i]);
        } else {
          for (int64_t i = 0; i < p_.w; ++i) to[i] = static_cast<float>(from[-i]);
        }
      }
    }
  }

  // Bilinear. The two neighbours along an axis are `base` and base + 1, kept within the source;
  // each weighs 1 minus its distance, at least 0, so that what is outside weighs nothing, and the
  // fill has the rest of the weight.
  void sample(int64_t y, const Row& out) const {
    const float v = sample_.v(static_cast<float>(y));
    const int32_t width = static_cast<int32_t>(p_.w_in), height = static_cast<int32_t>(p_.h_in);
    const float x_base = static_cast<float>(max(0, width - 2)), two_columns = width > 1 ? 1.f : 0.f;
    const float y_base = static_cast<float>(max(0, height - 2)), two_rows = height > 1 ? 1.f : 0.f;
    const Ints lane = lane_numbers(), below = splat(height > 1 ? width * kPixel : 0);
    for (int64_t i = 0; i < p_.w; i += kLane) {
      const Floats u = sample_.u(to_float(lane + static_cast<int32_t>(i)));
      const Floats x = sample_.x(u, v), t = sample_.y(u, v);
      const Ints left = to_int(AugmentSample::clamp(x, 0.f, x_base));
      const Ints top = to_int(AugmentSample::clamp(t, 0.f, y_base));
      const Floats from_left = x - to_float(left), from_top = t - to_float(top);
      const Floats w_left = at_least_zero(1.f - magnitude(from_left));
      const Floats w_right = at_least_zero(1.f - magnitude(from_left - 1.f)) * two_columns;
      const Floats w_top = at_least_zero(1.f - magnitude(from_top));
      const Floats w_bottom = at_least_zero(1.f - magnitude(from_top - 1.f)) * two_rows;
      const Floats weights[4] = {w_left * w_top, w_right * w_top, w_left * w_bottom,
                                 w_right * w_bottom};
      const Floats outside = 1.f - (w_left + w_right) * (w_top + w_bottom);
      const Ints offset = (top * width + left) * kPixel;
      mix(offset, offset + below, weights, outside, out, i);
    }
  }

  static constexpr int32_t kPixel = kPacked ? kChannels : 1;  // bytes from one pixel to the next

  inline __attribute__((always_inline)) void mix(Ints top, Ints bottom, const Floats (&w)[4],
                                                 Floats outside, const Row& out, int64_t i) const {
    if constexpr (kPacked && kChannels == 3) {
      // r g b r of the left pixel and the right one's first, then b r g b: all six bytes.
      const Words a = bytes_.at(top), b = bytes_.at(top + 2);
      const Words c = bytes_.at(bottom), d = bytes_.at(bottom + 2);
      for (int j = 0; j < 3; ++j) {
        const Floats level = level_of(a, j) * w[0] + level_of(b, j + 1) * w[1] +
                             level_of(c, j) * w[2] + level_of(d, j + 1) * w[3];
        store(out.channel(j) + i, level + outside * p_.channels[j].fill);
      }
    } else {
      const int32_t plane = static_cast<int32_t>(p_.h_in * p_.w_in);
      for (int32_t j = 0; j < kChannels; ++j) {
        const Words a = bytes_.at(top + j * plane), c = bytes_.at(bottom + j * plane);
        const Floats level = level_of(a, 0) * w[0] + level_of(a, 1) * w[1] + level_of(c, 0) * w[2] +
                             level_of(c, 1) * w[3];
        store(out.channel(j) + i, level + outside * p_.channels[j].fill);
      }
    }
  }

  const AugmentParams& p_;
  const AugmentSample& sample_;
  const uint8_t* image_;
  Bytes bytes_;
  bool copied_;
};

// body(levels of one vector, i, count) over the channels of a row.
template <int kChannels, class Body>
inline __attribute__((always_inline)) void for_each_pixels(const Row& row, int64_t w, Body body) {
  for (int64_t i = 0; i < w; i += kLane) {
    Floats levels[kChannels];
    for (int j = 0; j < kChannels; ++j) levels[j] = load(row.channel(j) + i);
    body(levels, i, min(kLane, w - i));
  }
}

template <int kChannels>
inline __attribute__((always_inline)) Floats gray_of(const Floats (&levels)[kChannels]) {
  if constexpr (kChannels == 3) {
    return gray(levels[0], levels[1], levels[2]);
  } else {
    return levels[0];
  }
}

// The sum of a row's grey after brightness: contrast blends with its mean.
template <int kChannels>
double sum_of_gray(const Row& row, int64_t w, float brightness) {
  Floats sum{};
  for_each_pixels<kChannels>(row, w, [&](auto& levels, int64_t, int64_t count) {
    for (Floats& level : levels) level = clamp_level(level * brightness);
    sum += first_lanes<float>(gray_of(levels), count);
  });
  return static_cast<double>(horizontal_sum<float>(sum));
}

using Wide = Vec<uint64_t>;  // lanes of two words, as Philox takes them

struct MultiplyVector {
  inline __attribute__((always_inline)) Wide operator()(Wide word, uint32_t m) const {
    const Wide factor = splat<uint64_t>(m);
#if defined(__AVX512F__)
    return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(word),
                                                         reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
    return reinterpret_cast<Wide>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(word), reinterpret_cast<__m256i>(factor)));
#else
    return (word & 0xffffffffu) * factor;
#endif
  }
};

// The random words of as many pixels as there are lanes, from `first` on: those of the even lanes
// and of the odd ones are computed apart.
inline __attribute__((always_inline)) void random_words(int64_t first, int64_t seed,
                                                        Words (&words)[4]) {
  Wide lane{};
  for (int i = 0; i < kLane / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i);
  Wide halves[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    const Wide pixel = lane + static_cast<uint64_t>(first + odd);
    Wide(&half)[4] = halves[odd];
    half[0] = pixel;
    half[1] = pixel >> 32;
    half[2] = half[3] = Wide{};
    philox4x32_10(half, static_cast<uint64_t>(seed), MultiplyVector{});
  }
  for (int k = 0; k < 4; ++k) {
    words[k] = reinterpret_cast<Words>((halves[0][k] & 0xffffffffu) | (halves[1][k] << 32));
  }
}

// One or three normal numbers for each pixel: of the pixel's own counter, whatever the layout.
template <int kChannels>
inline __attribute__((always_inline)) void add_noise(Floats (&levels)[kChannels], int64_t seed,
                                                     int64_t pixel, float deviation) {
  Words words[4];
  random_words(pixel, seed, words);
  Floats normal[4];
  normal_pair(words[0], words[1], root, normal[0], normal[1]);
  if constexpr (kChannels > 2) normal_pair(words[2], words[3], root, normal[2], normal[3]);
  for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] + normal[j] * deviation);
}

template <int kChannels>
void colour(const AugmentSample& s, float mean, int64_t seed, int64_t y, int64_t w,
            const Row& row) {
  const bool saturates = kChannels == 3 && s.saturation != 1.f, turns = s.hue != 0.f;
  if (s.brightness == 1.f && s.contrast == 1.f && !saturates && !turns && s.noise == 0.f) return;
  for_each_pixels<kChannels>(row, w, [&](auto& levels, int64_t i, int64_t) {
    if (s.brightness != 1.f) {
      for (Floats& level : levels) level = clamp_level(level * s.brightness);
    }
    if (s.contrast != 1.f) {
      for (Floats& level : levels) level = blend(level, splat(mean), s.contrast);
    }
    if constexpr (kChannels == 3) {  // grey stays as it is, as in torchvision
      if (saturates) {
        const Floats towards = gray_of(levels);
        for (Floats& level : levels) level = blend(level, towards, s.saturation);
      }
      if (turns) turn_hue(levels[0], levels[1], levels[2], s.hue);
    }
    if (s.noise != 0.f) add_noise(levels, seed, y * w + i, s.noise);
    for (int j = 0; j < kChannels; ++j) store(row.channel(j) + i, levels[j]);
  });
}

// Which lanes make three vectors of pixels r g b r g b ... from one vector a channel: the first
// shuffle takes from r and g, the second from its result and b.
struct Interleaving {
  int32_t first[3][kLane]{}, second[3][kLane]{};
  constexpr Interleaving() {
    for (int k = 0; k < 3; ++k) {
      for (int lane = 0; lane < kLane; ++lane) {
        const int32_t element = k * kLane + lane, pixel = element / 3;
        first[k][lane] = element % 3 == 1 ? kLane + pixel : pixel;
        second[k][lane] = element % 3 == 2 ? kLane + pixel : lane;
      }
    }
  }
};
constexpr Interleaving kInterleaving;

template <class T, int kChannels, bool kPacked>
void write(const AugmentParams& p, int64_t sample, int64_t y, const Row& row) {
  const AugmentIntegers& marks = p.integers[sample];
  const bool erases = marks.top <= y && y < marks.bottom && marks.left < marks.right;
  // Within the row, so that columns and edges fit into 32 bits.
  const int32_t left = static_cast<int32_t>(min(max(marks.left, 0), p.w));
  const int32_t right = static_cast<int32_t>(min(max(marks.right, 0), p.w));
  const int64_t pixel = kPacked ? kChannels : 1, plane = kPacked ? 1 : p.h * p.w;
  T* out = static_cast<T*>(p.y) + sample * p.c * p.h * p.w + y * p.w * pixel;
  for_each_pixels<kChannels>(row, p.w, [&](auto& levels, int64_t i, int64_t count) {
    for (int j = 0; j < kChannels; ++j) {
      const AugmentChannel& channel = p.channels[j];
      levels[j] = levels[j] * channel.scale + channel.shift;
      if (erases) {
        const Ints column = lane_numbers() + static_cast<int32_t>(i);
        const Ints erased = (column >= left) & (column < right);
        levels[j] = erased ? splat(channel.erased) : levels[j];
      }
    }
    if constexpr (kPacked && kChannels == 3) {
      for (int k = 0; k < 3; ++k) {
        Ints first, second;
        std::memcpy(&first, kInterleaving.first[k], sizeof first);
        std::memcpy(&second, kInterleaving.second[k], sizeof second);
        const Floats two = __builtin_shuffle(levels[0], levels[1], first);
        const Floats three = __builtin_shuffle(two, levels[2], second);
        T* to = out + i * 3 + k * kLane;
        if (count == kLane) {
          store(to, three);
        } else {
          store(to, three, min(kLane, max(0, count * 3 - k * kLane)));
        }
      }
    } else {
      for (int j = 0; j < kChannels; ++j) {
        if (count == kLane) {
          store(out + j * plane + i, levels[j]);
        } else {
          store(out + j * plane + i, levels[j], count);
        }
      }
    }
  });
}

using WriteFn = void (*)(const AugmentParams& p, int64_t sample, int64_t y, const Row& row);

template <int kChannels>
WriteFn pick_write(const AugmentParams& p) {
  WriteFn fn = nullptr;
  dispatch_half_or_float(p.dtype, [&](auto element) {
    dispatch_bool(p.channels_last, [&](auto packed) {
      fn = write < decltype(element), kChannels, packed.value && kChannels == 3 > ;
    });
  });
  return fn;
}

template <int kChannels, bool kPacked>
void run(const AugmentParams& p, const uint8_t* images) {
  const int64_t band = min(p.h, ceil_div(p.n * p.h, kTasks)), bands = ceil_div(p.h, band);
  const int64_t tasks = p.n * bands, grain = task_grain(tasks, p.n * p.h * p.w);
  const auto for_each_row = [&](int64_t task, auto body) __attribute__((always_inline)) {
    const int64_t i = task / bands, first = task % bands * band;
    const Row row(kChannels, p.w);
    const Source<kChannels, kPacked> source(p, images, i);
    for (int64_t y = first; y < min(p.h, first + band); ++y) {
      source.read(y, row);
      body(y, row);
    }
  };
  const Scratch<double> sums(p.n * p.h);
  const auto reduce = [&](int64_t task) {
    const int64_t i = task / bands;
    if (p.samples[i].contrast == 1.f) return;
    for_each_row(task, [&](int64_t y, const Row& row) {
      sums[i * p.h + y] = sum_of_gray<kChannels>(row, p.w, p.samples[i].brightness);
    });
  };
  const WriteFn write_row = pick_write<kChannels>(p);
  const auto finish = [&](int64_t task) {
    const int64_t i = task / bands;
    double sum = 0;
    for (int64_t y = 0; y < p.h; ++y) sum += sums[i * p.h + y];
    const float mean = static_cast<float>(sum / static_cast<double>(p.h * p.w));
    for_each_row(task, [&](int64_t y, const Row& row) {
      colour<kChannels>(p.samples[i], mean, p.integers[i].seed, y, p.w, row);
      write_row(p, i, y, row);
    });
  };
  if (bands == 1) {  // the second read then comes from the cache
    parallel_for(tasks, grain, [&](int64_t task) {
      reduce(task);
      finish(task);
    });
  } else {
    parallel_for(tasks, grain, reduce);
    parallel_for(tasks, grain, finish);
  }
}

}  // namespace

void augment_cpu(const AugmentParams& p) {
  const uint8_t* images = p.images;
  const int64_t bytes = p.n * p.c * p.h_in * p.w_in;
  uint8_t few[4] = {};
  if (bytes < 4) {  // Bytes reads four
    std::memcpy(few, images, static_cast<size_t>(bytes));
    images = few;
  }
  if (p.c == 1) {
    run<1, false>(p, images);
  } else {
    dispatch_bool(p.in_channels_last, [&](auto packed) { run<3, packed.value>(p, images); });
  }
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
