// augment on the CPU.
//
// Data movement: reads what of the images is seen, writes y once. A task is a band of one sample's
// rows. A row of the output passes through three short loops, whose floats between them stay in the
// L1 cache: `Source::read` samples the image, `colour` works on grey levels, `write` normalises and
// stores in y's dtype and layout. Contrast needs the mean of the sampled image first, summed row
// by row and joined in the rows' order: where a task is a whole sample that the L2 cache holds, its
// rows wait there, else they are sampled a second time.
#include "augment.h"

#include "common/color.h"
#include "common/dispatch.h"
#include "common/gather.h"
#include "common/normal.h"
#include "common/parallel.h"
#include "common/philox_vec.h"
#include "common/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

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

// One image, as it is sampled for the rows from `first` to before `last`.
template <int kChannels, bool kPacked>  // kPacked: a pixel's channels lie side by side
class Source {
 public:
  Source(const AugmentParams& p, int64_t i, int64_t first, int64_t last, Reused<uint32_t>& memory)
      : p_(p), sample_(p.samples[i]), image_(p.images + i * p.c * p.h_in * p.w_in) {
    copied_ = is_copied();
    // Copied: one row of the output, whose last vector is read whole. Sampled: the rows of the
    // source that are seen, and a word, since pixels are read in pairs.
    if (!copied_) find_rows(first, last);
    const int64_t words = copied_ ? ceil_div(p.w, kLane) * kLane : rows_ * p.w_in + 1;
    pixels_ = memory.reserve(words);
    if (copied_) return;
    load_pixels<kChannels, kPacked>(image_, p.h_in * p.w_in, top_ * p.w_in, rows_ * p.w_in,
                                    pixels_);
    pixels_[words - 1] = 0;
  }

  void read(int64_t y, const Row& out) const { copied_ ? copy(y, out) : sample(y, out); }

 private:
  // Whether each pixel of the output is one of the source: flips and crops alone.
  bool is_copied() const {
    const AugmentSample& s = sample_;
    const auto whole = [](float v) {
      return v > -2e7f && v < 2e7f && v == static_cast<float>(static_cast<int32_t>(v));
    };
    // From the first pixel to the last one step of 1 each, within the crop (nothing is clamped) and
    // with it within the source.
    const auto steps = [&](float step, float start, float size, float most, float origin,
                           int64_t size_in) {
      const float end = start + step * (size - 1.f);
      const float low = start < end ? start : end, high = start < end ? end : start;
      return (step == 1.f || step == -1.f) && whole(start) && whole(origin) && low >= 0.f &&
             high <= most && origin + low >= 0.f &&
             origin + high <= static_cast<float>(size_in - 1);
    };
    return s.xu == 1.f && s.xv == 0.f && s.yu == 0.f && s.yv == 1.f &&
           steps(s.u_step, s.u_start, static_cast<float>(p_.w), s.u_last, s.x0, p_.w_in) &&
           steps(s.v_step, s.v_start, static_cast<float>(p_.h), s.v_last, s.y0, p_.h_in);
  }

  void copy(int64_t y, const Row& out) const {
    const int64_t row = static_cast<int64_t>(sample_.v(static_cast<float>(y)) + sample_.y0);
    const bool back = sample_.u_step < 0.f;
    const int64_t first =
        static_cast<int64_t>(sample_.u_start + sample_.x0) - (back ? p_.w - 1 : 0);
    load_pixels<kChannels, kPacked>(image_, p_.h_in * p_.w_in, row * p_.w_in + first, p_.w,
                                    pixels_);
    const Ints mirrored = static_cast<int32_t>(kLane) - 1 - lane_numbers();
    for (int64_t i = 0; i < p_.w; i += kLane) {
      Words pixel{};
      if (!back) {
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

  // Bilinear. The two neighbours along an axis are `left` (`top`) and the next, kept within what
  // was loaded; each weighs 1 minus its distance, at least 0, so that what is outside weighs
  // nothing, and the fill has the rest of the weight.
  void sample(int64_t y, const Row& out) const {
    const float v = sample_.v(static_cast<float>(y));
    const int32_t width = static_cast<int32_t>(p_.w_in), above = static_cast<int32_t>(top_);
    const float last_left = static_cast<float>(max(0, p_.w_in - 2));
    const float last_top = static_cast<float>(max(top_, top_ + rows_ - 2));
    const float right = p_.w_in > 1 ? 1.f : 0.f, bottom = rows_ > 1 ? 1.f : 0.f;  // is there one?
    const int32_t below = rows_ > 1 ? width : 0;
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
      const Ints place = (top - above) * width + left;
      gather_pairs(pixels_, place, a, b);
      gather_pairs(pixels_, place + below, c, d);
      for (int j = 0; j < kChannels; ++j) {
        const Floats upper = level_of(a, j) * w_left + level_of(b, j) * w_right;
        const Floats lower = level_of(c, j) * w_left + level_of(d, j) * w_right;
        store(out.channel(j) + i, upper * w_top + lower * w_bottom + outside * p_.channels[j].fill);
      }
    }
  }

  const AugmentParams& p_;
  const AugmentSample& sample_;
  const uint8_t* image_;
  uint32_t* pixels_;
  int64_t top_ = 0, rows_ = 0;  // of the source, in pixels_
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

// The random words of as many pixels as there are lanes, from `first` on: those of the even lanes
// and of the odd ones are computed apart.
inline __attribute__((always_inline)) void random_words(int64_t first, const PhiloxLaneKeys& keys,
                                                        Words (&words)[4]) {
  using Wide = Vec<uint64_t>;
  Wide lane{};
  for (int i = 0; i < kLane / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i);
  Wide halves[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    const Wide pixel = lane + static_cast<uint64_t>(first + odd);
    Wide(&half)[4] = halves[odd];
    half[0] = pixel;
    half[1] = pixel >> 32;
    half[2] = half[3] = Wide{};
    philox4x32_10(half, keys, MultiplyLanes{});
  }
  for (int k = 0; k < 4; ++k) {
    words[k] = reinterpret_cast<Words>((halves[0][k] & 0xffffffffu) | (halves[1][k] << 32));
  }
}

// One or three normal numbers for each pixel: of the pixel's own counter, whatever the layout.
template <int kChannels>
inline __attribute__((always_inline)) void add_noise(Floats (&levels)[kChannels],
                                                     const PhiloxLaneKeys& keys, int64_t pixel,
                                                     float deviation) {
  Words words[4];
  random_words(pixel, keys, words);
  Floats normal[4];
  normal_pair(words[0], words[1], root, normal[0], normal[1]);
  if constexpr (kChannels > 2) normal_pair(words[2], words[3], root, normal[2], normal[3]);
  for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] + normal[j] * deviation);
}

template <int kChannels>
void colour(const AugmentSample& s, float mean, const PhiloxLaneKeys& keys, int64_t pixel,
            int64_t w, const Row& row) {
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
    if (s.noise != 0.f) add_noise(levels, keys, pixel + i, s.noise);
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

// What one thread works in.
struct Memory {
  Reused<uint32_t> pixels;
  Reused<float> levels;
};

// A whole sample in grey levels stays in the L2 cache up to this size.
constexpr int64_t kKeptBytes = 1 << 20;

template <int kChannels, bool kPacked>
void run(const AugmentParams& p) {
  const int64_t band = min(p.h, ceil_div(p.n * p.h, kTasks)), bands = ceil_div(p.h, band);
  const int64_t tasks = p.n * bands, grain = task_grain(tasks, p.n * p.h * p.w);
  const int64_t stride = ceil_div(p.w, kLane) * kLane, size = kChannels * stride;
  const bool fits = bands == 1 && p.h * size * int64_t{sizeof(float)} <= kKeptBytes;
  const Scratch<double> sums(p.n * p.h);
  const WriteFn write_row = pick_write<kChannels>(p);
  const auto contrasts = [&](int64_t i) { return p.samples[i].contrast != 1.f; };
  // body(y, row) for the rows of a task, sampled or, where `kept`, as the call before left them.
  const auto for_each_row = [&](int64_t task, Memory& memory, bool kept, auto body) {
    const int64_t i = task / bands, first = task % bands * band, last = min(p.h, first + band);
    const bool keep = fits && contrasts(i);
    float* levels = memory.levels.reserve(keep ? p.h * size : size);
    const auto row = [&](int64_t y) { return Row{levels + (keep ? y * size : 0), stride}; };
    if (kept) {
      for (int64_t y = first; y < last; ++y) body(y, row(y));
      return;
    }
    const Source<kChannels, kPacked> source(p, i, first, last, memory.pixels);
    for (int64_t y = first; y < last; ++y) {
      source.read(y, row(y));
      body(y, row(y));
    }
  };
  const auto reduce = [&](int64_t task, Memory& memory) {
    const int64_t i = task / bands;
    if (!contrasts(i)) return;
    for_each_row(task, memory, false, [&](int64_t y, const Row& row) {
      sums[i * p.h + y] = sum_of_gray<kChannels>(row, p.w, p.samples[i].brightness);
    });
  };
  const auto finish = [&](int64_t task, Memory& memory) {
    const int64_t i = task / bands;
    double sum = 0;
    for (int64_t y = 0; y < p.h; ++y) sum += sums[i * p.h + y];
    const float mean = static_cast<float>(sum / static_cast<double>(p.h * p.w));
    const PhiloxLaneKeys keys(static_cast<uint64_t>(p.integers[i].seed));
    for_each_row(task, memory, fits && contrasts(i), [&](int64_t y, const Row& row) {
      colour<kChannels>(p.samples[i], mean, keys, y * p.w, p.w, row);
      write_row(p, i, y, row);
    });
  };
  const auto for_each_task = [&](const auto& body) {
    parallel_ranges(tasks, grain, [&](int64_t begin, int64_t end) {
      Memory memory;
      for (int64_t task = begin; task < end; ++task) body(task, memory);
    });
  };
  if (bands == 1) {
    for_each_task([&](int64_t task, Memory& memory) {
      reduce(task, memory);
      finish(task, memory);
    });
  } else {
    for_each_task(reduce);
    for_each_task(finish);
  }
}

}  // namespace

void augment_cpu(const AugmentParams& p) {
  if (p.c == 1) {
    run<1, false>(p);
  } else {
    dispatch_bool(p.in_channels_last, [&](auto packed) { run<3, packed.value>(p); });
  }
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
