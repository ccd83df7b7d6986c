// The epilogue of conv2d_int8 on the CPU.
//
// Data movement: reads acc (4 bytes an element, which the caller keeps small enough for the caches)
// and the residual, writes y (1, 2 or 4 bytes). A row is some pixels, and the channels' numbers are
// repeated in step with it (WideRows): 2 or 3 channels fill vectors as 64 do. All arithmetic is
// float32's. This file is compiled without fused multiply-adds: they would round otherwise than a
// multiplication and an addition do.
#include "conv2d_int8.h"

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

// Added to a float32 below 2^22 it rounds that to an integer, to nearest even, and leaves it in the
// lowest bits: 1.5 * 2^23.
constexpr float kRounds = 12582912.0f;

template <class T>
using Lanes = typename VecOf<T, kLanes<float>* static_cast<int>(sizeof(T))>::type;

// As many elements as a vector of floats has, `count` of them from memory.
template <class T>
inline Lanes<T> load_lanes(const T* from, int64_t count) {
  Lanes<T> v{};
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

// GCC 12 takes the bytes one by one, to int32 and back, where it is not told how.
template <class T>
inline Vec<int32_t> widen_bytes(Lanes<T> bytes) {
  [[maybe_unused]] constexpr bool kSigned = static_cast<T>(-1) < 0;
#if defined(__AVX512F__)
  const auto v = reinterpret_cast<__m128i>(bytes);
  return reinterpret_cast<Vec<int32_t>>(kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, v)
                                                : _mm512_maskz_cvtepu8_epi32(0xffff, v));
#elif defined(__AVX2__)
  const __m128i v = _mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes));
  return reinterpret_cast<Vec<int32_t>>(kSigned ? _mm256_cvtepi8_epi32(v)
                                                : _mm256_cvtepu8_epi32(v));
#else
  return __builtin_convertvector(bytes, Vec<int32_t>);
#endif
}

// The lowest byte of each lane.
inline Lanes<uint8_t> low_bytes(Vec<uint32_t> v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(v));
  return reinterpret_cast<Lanes<uint8_t>>(bytes);
#elif defined(__AVX2__)
  const auto alone = reinterpret_cast<__m256i>(v & 0xffu);
  const __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(alone), _mm256_extracti128_si256(alone, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
  return reinterpret_cast<Lanes<uint8_t>>(bytes);
#else
  return __builtin_convertvector(v, Lanes<uint8_t>);
#endif
}

// The channels' numbers in a row of pixels. A: the sums' type.
template <class A>
struct Channels {
  Scratch<float> multiplier, bias;  // bias: of a y in floating point
  Scratch<A> units;                 // bias: of a quantised one, in units of acc; A holds it

  Channels(const Conv2dInt8Params& p, int64_t count)
      : multiplier(count), bias(count), units(count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = i % p.c;
      multiplier[i] = p.multiplier[j];
      if (p.bias == nullptr) continue;
      if (p.quantizes)
        units[i] = static_cast<A>(static_cast<const int32_t*>(p.bias)[j]);
      else
        bias[i] = static_cast<const float*>(p.bias)[j];
    }
  }
};

struct NoResidual {
  explicit NoResidual(const Conv2dInt8Params&) {}
  Vec<float> add_to(Vec<float> z, int64_t, int64_t) const { return z; }
};

// In units of z. R: 8 bits, or the type of a y in floating point.
template <class R>
struct Residual {
  const R* from;
  const Vec<float> scale;
  const Vec<int32_t> zero;

  explicit Residual(const Conv2dInt8Params& p)
      : from(static_cast<const R*>(p.residual)),
        scale(splat(p.residual_scale)),
        zero(splat(p.residual_zero_point)) {}

  Vec<float> add_to(Vec<float> z, int64_t o, int64_t count) const {
    if constexpr (sizeof(R) == 1) {
      const Vec<int32_t> q = widen_bytes<R>(load_lanes(from + o, count)) - zero;
      return z + __builtin_convertvector(q, Vec<float>) * scale;
    } else {
      return z + load(from + o, count);
    }
  }
};

// What becomes of z. Y: uint8_t for both kinds of 8 bits.
template <class Y>
struct Output {
  static constexpr bool kQuantizes = sizeof(Y) == 1;
  Y* y;
  Vec<float> low, high;
  Lanes<uint8_t> zero;

  // Bounds of integers are bounds of what is rounded to them; a zero point lies within its type's.
  explicit Output(const Conv2dInt8Params& p)
      : y(static_cast<Y*>(p.y)), zero(Lanes<uint8_t>{} + static_cast<uint8_t>(p.zero_point)) {
    float least = -__builtin_inff(), most = p.cap;
    if constexpr (kQuantizes) {
      least = static_cast<float>(p.low - p.zero_point);
      const auto last = static_cast<float>(p.high - p.zero_point);
      most = most < last ? most : last;
    }
    low = splat(p.relu ? 0.0f : least);
    high = splat(most);
  }

  // A NaN of the residual comes through the bounds.
  void write(Vec<float> z, int64_t o, int64_t count) const {
    z = at_most(high, at_least(low, z));
    if constexpr (kQuantizes) {
      const Lanes<uint8_t> q = low_bytes(reinterpret_cast<Vec<uint32_t>>(z + kRounds)) + zero;
      std::memcpy(y + o, &q, static_cast<size_t>(count));
    } else {
      store(y + o, z, count);
    }
  }
};

// `count` rows from element o on, or the first `length` elements of one.
template <class A, class R, class Y>
void write_rows(const Conv2dInt8Params& p, const Channels<A>& channels, int64_t o, int64_t count,
                int64_t length) {
  const A *acc = static_cast<const A*>(p.acc), *units = channels.units.get();
  const float *multiplier = channels.multiplier.get(), *bias = channels.bias.get();
  const R residual(p);
  const Output<Y> out(p);
  for (int64_t row = 0; row < count; ++row, o += length) {
    for_each_vector<float>(
        length, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          auto sums = load_lanes(acc + o + i, lanes);
          if constexpr (out.kQuantizes) sums += load_lanes(units + i, kLanes<float>);
          Vec<float> z = __builtin_convertvector(sums, Vec<float>) * load(multiplier + i);
          if constexpr (!out.kQuantizes) z += load(bias + i);
          out.write(residual.add_to(z, o + i, lanes), o + i, lanes);
        });
  }
}

template <class A, class R, class Y>
void run(const Conv2dInt8Params& p) {
  const WideRows rows({1, p.c, p.pixels, true}, sizeof(A), kLanes<float>);
  const Channels<A> channels(p, rows.wide);
  const auto task = [&](int64_t t) {
    const int64_t first = rows.first(t), count = rows.last(t) - first;
    write_rows<A, R, Y>(p, channels, first * rows.wide, count, rows.wide);
  };
  parallel_for(rows.tasks, rows.grain, task);
  write_rows<A, R, Y>(p, channels, rows.rows * rows.wide, 1, rows.rest);
}

template <class A, class Y>
void run(const Conv2dInt8Params& p) {
  switch (p.residual_kind) {
    case ResidualKind::kNone:
      return run<A, NoResidual, Y>(p);
    case ResidualKind::kUint8:
      return run<A, Residual<uint8_t>, Y>(p);
    case ResidualKind::kInt8:
      return run<A, Residual<int8_t>, Y>(p);
    case ResidualKind::kOutput:
      if constexpr (sizeof(Y) > 1) return run<A, Residual<Y>, Y>(p);
  }
}

template <class A>
void run(const Conv2dInt8Params& p) {
  if (p.quantizes) return run<A, uint8_t>(p);
  dispatch_half_or_float(p.dtype, [&](auto element) { run<A, decltype(element)>(p); });
}

}  // namespace

void conv2d_int8_epilogue_cpu(const Conv2dInt8Params& p) {
  p.acc_is_float ? run<float>(p) : run<int32_t>(p);
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
