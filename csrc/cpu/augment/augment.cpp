// augment on the CPU.
//
// Data movement: reads what of the images is seen, writes y once. A task is a band of one sample's
// rows. Where pixels are flipped and cropped alone and lie in planes on both sides, a row goes from
// bytes to y in one loop. Else a row of the output passes through three short loops, whose floats
// between them stay in the L1 cache: `Source::read` samples the image, `colour` works on grey
// levels, `write` normalises and stores in y's dtype and layout. Contrast needs the mean of the
// sampled image first, summed row by row and merged in the rows' order: where a task is a whole
// sample that the L2 cache holds, its rows wait there, else they are sampled a second time.
#include "augment.h"

#include "common/color.h"
#include "common/normal.h"
#include "cpu/augment/source.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/simd/philox_vec.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

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
// and of the odd ones are computed side by side.
inline __attribute__((always_inline)) void random_words(int64_t first, const PhiloxVectorKeys& keys,
                                                        Words (&words)[4]) {
  WideWords lane{};
  for (int i = 0; i < kLane / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i);
  const WideWords even = lane + static_cast<uint64_t>(first);
  const WideWordPair pixels{even, even + 1};
  WideWordPair wide[4] = {pixels, pixels >> 32, {}, {}};
  philox4x32_10(wide, keys, MultiplyVector{});
  for (int k = 0; k < 4; ++k) {
    words[k] = reinterpret_cast<Words>((wide[k].a & 0xffffffffu) | (wide[k].b << 32));
  }
}

// One or three normal numbers for each pixel: of the pixel's own counter, whatever the layout.
template <int kChannels>
inline __attribute__((always_inline)) void add_noise(Floats (&levels)[kChannels],
                                                     const PhiloxVectorKeys& keys, int64_t pixel,
                                                     float deviation) {
  Words words[4];
  random_words(pixel, keys, words);
  Floats normal[4];
  normal_pair(words[0], words[1], root, normal[0], normal[1]);
  if constexpr (kChannels > 2) normal_pair(words[2], words[3], root, normal[2], normal[3]);
  for (int j = 0; j < kChannels; ++j) levels[j] = clamp_level(levels[j] + normal[j] * deviation);
}

template <int kChannels>
bool keeps_colour(const AugmentSample& s) {
  return s.brightness == 1.f && s.contrast == 1.f && (kChannels != 3 || s.saturation == 1.f) &&
         s.hue == 0.f && s.noise == 0.f;
}

template <int kChannels>
void colour(const AugmentSample& s, float mean, const PhiloxVectorKeys& keys, int64_t pixel,
            int64_t w, const Row& row) {
  const bool saturates = kChannels == 3 && s.saturation != 1.f, turns = s.hue != 0.f;
  if (keeps_colour<kChannels>(s)) return;
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

// The part of a row of the output that is erased.
class Erasure {
 public:
  Erasure(const AugmentParams& p, const AugmentIntegers& marks, int64_t y)
      : any_(marks.top <= y && y < marks.bottom && marks.left < marks.right),
        left_(static_cast<int32_t>(min(max(marks.left, 0), p.w))),
        right_(static_cast<int32_t>(min(max(marks.right, 0), p.w))) {}

  // y of the vector at column i.
  Floats normalized(Floats level, const AugmentChannel& channel, int64_t i) const {
    const Floats value = level * channel.scale + channel.shift;
    if (!any_) return value;
    const Ints column = lane_numbers() + static_cast<int32_t>(i);
    return (column >= left_) & (column < right_) ? splat(channel.erased) : value;
  }

 private:
  bool any_;
  int32_t left_, right_;  // within the row, so that columns and edges fit into 32 bits
};

template <class T, int kChannels, bool kPacked>
void write(const AugmentParams& p, int64_t sample, int64_t y, const Row& row) {
  const Erasure erasure(p, p.integers[sample], y);
  const int64_t pixel = kPacked ? kChannels : 1, plane = kPacked ? 1 : p.h * p.w;
  T* out = static_cast<T*>(p.y) + sample * p.c * p.h * p.w + y * p.w * pixel;
  for_each_pixels<kChannels>(row, p.w, [&](auto& levels, int64_t i, int64_t count) {
    for (int j = 0; j < kChannels; ++j) levels[j] = erasure.normalized(levels[j], p.channels[j], i);
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

// One row whose pixels are copied, from planes to planes.
template <class T, int kChannels>
void write_copied(const AugmentParams& p, int64_t sample, int64_t y, const Copying& copying) {
  using Bytes = VecOf<uint8_t, kLane>::type;
  Bytes mirrored{};
  for (int k = 0; k < kLane; ++k) mirrored[k] = static_cast<uint8_t>(kLane - 1 - k);
  const Erasure erasure(p, p.integers[sample], y);
  const uint8_t* from = copying.image() + copying.first_pixel(y);
  const bool back = copying.back();
  const int64_t whole = p.w / kLane * kLane, left = p.w - whole;
  for (int j = 0; j < kChannels; ++j) {
    const AugmentChannel channel = p.channels[j];
    const uint8_t* row = from + j * p.h_in * p.w_in;
    T* out = static_cast<T*>(p.y) + ((sample * kChannels + j) * p.h + y) * p.w;
    const auto normalized = [&](Bytes bytes, int64_t i) __attribute__((always_inline)) {
      return erasure.normalized(to_float(__builtin_convertvector(bytes, Ints)), channel, i);
    };
    for (int64_t i = 0; i < whole; i += kLane) {
      Bytes bytes;
      std::memcpy(&bytes, back ? row + p.w - kLane - i : row + i, sizeof bytes);
      if (back) bytes = __builtin_shuffle(bytes, mirrored);
      store(out + i, normalized(bytes, i));
    }
    if (left > 0) {
      Bytes bytes{};
      for (int64_t k = 0; k < left; ++k) bytes[k] = back ? row[left - 1 - k] : row[whole + k];
      store(out + whole, normalized(bytes, whole), left);
    }
  }
}

using CopyFn = void (*)(const AugmentParams& p, int64_t sample, int64_t y, const Copying& copying);

// Null where images or y have their channels side by side.
template <int kChannels, bool kPacked>
CopyFn pick_write_copied(const AugmentParams& p) {
  if (kChannels > 1 && (kPacked || p.channels_last)) return nullptr;
  CopyFn fn = nullptr;
  dispatch_half_or_float(p.dtype,
                         [&](auto element) { fn = write_copied<decltype(element), kChannels>; });
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
  const CopyFn write_copied_row = pick_write_copied<kChannels, kPacked>(p);
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
  const auto finalize = [&](int64_t task, Memory& memory) {
    const int64_t i = task / bands;
    if (write_copied_row != nullptr && keeps_colour<kChannels>(p.samples[i])) {
      const Copying copying(p, i);
      const int64_t first = task % bands * band, last = min(p.h, first + band);
      for (int64_t y = first; copying.holds() && y < last; ++y) write_copied_row(p, i, y, copying);
      if (copying.holds()) return;
    }
    double sum = 0;
    for (int64_t y = 0; y < p.h; ++y) sum += sums[i * p.h + y];
    const float mean = static_cast<float>(sum / static_cast<double>(p.h * p.w));
    const PhiloxVectorKeys keys(static_cast<uint64_t>(p.integers[i].seed));
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
      finalize(task, memory);
    });
  } else {
    for_each_task(reduce);
    for_each_task(finalize);
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
