// The epilogue of conv2d_int8 on the CPU.
//
// Data movement: reads acc (4 bytes an element, which the caller keeps small enough for the caches)
// and the residual, writes y (1, 2 or 4 bytes). A task is some pixels; per channel numbers are
// brought into the type of the arithmetic once a call: float64 for a quantised y, where every
// product is exact, float32 for the others. This file is compiled without fused multiply-adds:
// they would round float results otherwise than a multiplication and an addition do.
#include "conv2d_int8.h"

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 14;

// What the tasks of one call share. S: the type of the arithmetic.
template <class S>
struct Channels {
  Scratch<S> multiplier, bias;

  explicit Channels(const Conv2dInt8Params& p) : multiplier(p.c), bias(p.c) {
    for (int64_t j = 0; j < p.c; ++j) {
      multiplier[j] = p.multiplier[j];
      if (p.bias == nullptr) continue;
      bias[j] = p.quantizes ? static_cast<S>(static_cast<const int32_t*>(p.bias)[j])
                            : static_cast<S>(static_cast<const float*>(p.bias)[j]);
    }
  }
};

// to[i] = (from[i] - zero) * scale
template <class T, class S>
void dequantize(const T* from, S* to, int64_t count, int32_t zero, S scale) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(from[i] - zero) * scale;
}

// The residual of a pixel, in units of z.
template <class Y, class S>
void residual_row(const Conv2dInt8Params& p, int64_t o, S* row) {
  const int64_t c = p.c;
  const int32_t zero = p.residual_zero_point;
  const S scale = p.residual_scale;
  if (p.residual_kind == ResidualKind::kUint8) {
    dequantize(static_cast<const uint8_t*>(p.residual) + o, row, c, zero, scale);
  } else if (p.residual_kind == ResidualKind::kInt8) {
    dequantize(static_cast<const int8_t*>(p.residual) + o, row, c, zero, scale);
  } else if constexpr (sizeof(S) == 4) {
    const Y* from = static_cast<const Y*>(p.residual) + o;
    for_each_vector<S>(
        c, [&](int64_t i, int64_t count) { store(row + i, load(from + i, count), count); });
  }
}

// kLanes<double> sums.
template <class A>
Vec<double> load_sums(const A* p, int64_t count) {
  typename VecOf<A, kVectorBytes / 2>::type v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(A));
  return __builtin_convertvector(v, Vec<double>);
}

// The lowest byte of each lane. GCC 12 makes a dozen shuffles of the conversion.
inline void store_low_bytes(uint8_t* p, Vec<uint64_t> v, int64_t count) {
#if defined(__AVX512F__)
  const auto bytes = _mm512_maskz_cvtepi64_epi8(0xff, reinterpret_cast<__m512i>(v));
#else
  const auto bytes = __builtin_convertvector(v, VecOf<uint8_t, kLanes<double>>::type);
#endif
  std::memcpy(p, &bytes, static_cast<size_t>(count));
}

// A quantised pixel. Adding 1.5 * 2^52 rounds a double to an integer, to nearest even, and
// leaves it in the lowest bits.
template <class A, bool kAdds>
void quantize_row(const A* acc, const double* multiplier, const double* bias,
                  const double* residual, uint8_t* y, int64_t c, double zero, double low,
                  double high) {
  constexpr double kRounds = 6755399441055744.0;
  const Vec<double> least = splat(low), most = splat(high);
  for_each_vector<double>(
      c, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        Vec<double> z =
            (load_sums(acc + j, count) + load(bias + j, count)) * load(multiplier + j, count);
        if constexpr (kAdds) z += load(residual + j, count);
        z += zero;
        z = z > least ? z : least;
        z = (z < most ? z : most) + kRounds;
        store_low_bytes(y + j, reinterpret_cast<Vec<uint64_t>>(z), count);
      });
}

// A pixel in floating point. A NaN of the residual comes through the comparisons.
template <class A, bool kAdds>
void float_row(const A* acc, const float* multiplier, const float* bias, const float* residual,
               float* z_row, int64_t c, float low, float cap) {
  for (int64_t j = 0; j < c; ++j) {
    float z = static_cast<float>(acc[j]) * multiplier[j] + bias[j];
    if constexpr (kAdds) z += residual[j];
    z = z < low ? low : z;
    z_row[j] = z > cap ? cap : z;
  }
}

template <class Body>
void for_each_pixel(const Conv2dInt8Params& p, const Body& body) {
  const int64_t step = max(1, kTaskElements / p.c), tasks = ceil_div(p.pixels, step);
  const auto pixels = [&](int64_t begin, int64_t end) {
    body(begin * step, min(end * step, p.pixels));
  };
  parallel_ranges(tasks, 1, pixels);
}

template <class A, bool kAdds>
void quantize(const Conv2dInt8Params& p, const A* acc) {
  const Channels<double> k(p);
  // ReLU and ReLU6 are bounds of z. Rounding is monotonic, and the zero point an integer: the
  // bounds may be moved behind the addition of the zero point.
  const double zero = p.zero_point, cap = static_cast<double>(p.cap) + zero;
  const double low = p.relu && zero > p.low ? zero : p.low, high = cap < p.high ? cap : p.high;
  for_each_pixel(p, [&](int64_t begin, int64_t end) {
    const Scratch<double> added(kAdds ? p.c : 0);
    for (int64_t o = begin * p.c; o < end * p.c; o += p.c) {
      if constexpr (kAdds) residual_row<float>(p, o, added.get());
      quantize_row<A, kAdds>(acc + o, k.multiplier.get(), k.bias.get(), added.get(),
                             static_cast<uint8_t*>(p.y) + o, p.c, zero, low, high);
    }
  });
}

template <class A, bool kAdds, class Y>
void to_floats(const Conv2dInt8Params& p, const A* acc, Y* y) {
  const Channels<float> k(p);
  const float low = p.relu ? 0.0f : -__builtin_inff();
  for_each_pixel(p, [&](int64_t begin, int64_t end) {
    const Scratch<float> added(kAdds ? p.c : 0), z(p.c);
    for (int64_t o = begin * p.c; o < end * p.c; o += p.c) {
      if constexpr (kAdds) residual_row<Y>(p, o, added.get());
      float_row<A, kAdds>(acc + o, k.multiplier.get(), k.bias.get(), added.get(), z.get(), p.c, low,
                          p.cap);
      for_each_vector<float>(p.c, [&](int64_t i, int64_t count) {
        store(y + o + i, load(z.get() + i, count), count);
      });
    }
  });
}

template <class A>
void run(const Conv2dInt8Params& p) {
  const A* acc = static_cast<const A*>(p.acc);
  dispatch_bool(p.residual != nullptr, [&](auto adds) {
    if (p.quantizes) return quantize<A, adds.value>(p, acc);
    dispatch_half_or_float(p.dtype, [&](auto element) {
      using Y = decltype(element);
      to_floats<A, adds.value>(p, acc, static_cast<Y*>(p.y));
    });
  });
}

}  // namespace

void conv2d_int8_epilogue_cpu(const Conv2dInt8Params& p) {
  p.acc_is_float ? run<float>(p) : run<int32_t>(p);
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
