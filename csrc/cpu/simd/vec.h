// CPU vectors: S (float or double) in registers of the widest kind this file is compiled for.
//
// Each CPU kernel file is compiled once per instruction set, with FASTCNN_CPU_LEVEL naming the
// namespace. Everything here lives in that namespace and nothing of the standard library's
// templates is used: one shared inline function compiled for AVX-512 would be picked by the
// linker for all levels and crash an AVX2 machine. tests/tools/test_build.py looks at the symbols.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTCNN_CPU_LEVEL
#error "compile CPU kernels with -DFASTCNN_CPU_LEVEL=<baseline|avx2|avx512>"
#endif

namespace fastcnn::FASTCNN_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage types. Arithmetic happens in Acc<T>: float, and double for double.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class S, int kBytes = kVectorBytes>
struct VecOf {
  typedef S type __attribute__((vector_size(kBytes)));
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

// The integer of S's size.
template <class S>
struct IntOf {
  using type = uint32_t;
};
template <>
struct IntOf<double> {
  using type = uint64_t;
};

template <class S>
inline Vec<S> splat(S value) {
  return value - Vec<S>{};  // is the value itself, where adding 0 is an addition: -0 becomes 0
}

// x, or the bound that it is beyond; a NaN comes through. One instruction, where GCC 12 makes two
// of a comparison; they give the second operand if one is NaN.
inline Vec<float> at_least(Vec<float> low, Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(low), reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(
      _mm256_max_ps(reinterpret_cast<__m256>(low), reinterpret_cast<__m256>(x)));
#else
  return x < low ? low : x;
#endif
}

inline Vec<float> at_most(Vec<float> high, Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(
      _mm256_min_ps(reinterpret_cast<__m256>(high), reinterpret_cast<__m256>(x)));
#else
  return x > high ? high : x;
#endif
}

// In halves: four dependent additions for sixteen lanes, not sixteen.
template <class S, int kBytes = kVectorBytes>
inline S horizontal_sum(typename VecOf<S, kBytes>::type v) {
  if constexpr (kBytes == sizeof(S)) {
    return v[0];
  } else {
    typename VecOf<S, kBytes / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof v);
    return horizontal_sum<S, kBytes / 2>(halves[0] + halves[1]);
  }
}

// As many doubles as a vector of S has lanes, where many vectors are added up.
template <class S>
using Wide = typename VecOf<double, kLanes<S> * 8>::type;

template <class S>
inline Wide<S> widen(Vec<S> v) {
  return __builtin_convertvector(v, Wide<S>);
}

// 16-bit lanes beside one vector of floats.
using Bits16 = typename VecOf<uint16_t, kVectorBytes / 2>::type;
using Bits32 = Vec<uint32_t>;

inline Vec<float> to_float(Bits16 bits, BFloat16) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

// Round to nearest even; a NaN becomes the quiet NaN that PyTorch writes.
inline Bits16 from_float(Vec<float> v, BFloat16) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits32 high = v != v ? splat<uint32_t>(0x7fc00000u) : rounded;
#if defined(__AVX512BW__)
  // The high halves by one shuffle, where a shift and a conversion take three of its kind.
  const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27,
                                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_maskz_permutexvar_epi16(~0u, odd, reinterpret_cast<__m512i>(high));
  Bits16 low;
  std::memcpy(&low, &halves, sizeof low);
  return low;
#else
  return __builtin_convertvector(high >> 16, Bits16);
#endif
}

inline Vec<float> to_float(Bits16 bits, Float16) {
#if defined(__AVX512F__)
  // The masked form, all lanes on: gcc 12 warns of an uninitialised value inside the plain one.
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) {
    _Float16 half;
    const uint16_t lane = bits[i];
    std::memcpy(&half, &lane, sizeof half);
    v[i] = static_cast<float>(half);
  }
  return v;
#endif
}

inline Bits16 from_float(Vec<float> v, Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Bits16>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  Bits16 bits;
  for (int i = 0; i < kLanes<float>; ++i) {
    const _Float16 half = static_cast<_Float16>(v[i]);
    uint16_t lane;
    std::memcpy(&lane, &half, sizeof half);
    bits[i] = lane;
  }
  return bits;
#endif
}

// The first `count` lanes of a vector: its own kind of mask where the instruction set has one.
#if defined(__AVX512F__)
inline uint32_t lane_mask(int64_t count) { return (1u << count) - 1; }
#endif

// The first `count` elements of at most kMost, piece by piece: a copy whose size is known at run
// time alone is a call of the C library.
template <int kMost, class T>
inline __attribute__((always_inline)) void copy_some(T* to, const T* from, int64_t count) {
  if constexpr (kMost > 0) {
    const bool taken = (count & kMost) != 0;
    if (taken) std::memcpy(to, from, kMost * sizeof(T));
    const int64_t step = taken ? kMost : 0;
    copy_some<kMost / 2>(to + step, from + step, count);
  }
}

// A whole vector. By the function below, which asks whether a count is known, GCC 12 sends values
// through the stack that several multiply-adds use: depthwise convolutions with AVX2 took 1.1
// to 1.4 times as long.
template <class T>
inline __attribute__((always_inline)) Vec<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    Bits16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return to_float(bits, T{});
  }
}

// `count` elements, the remaining lanes zero. Full-width calls, whose count the compiler knows, are
// plain unaligned loads and stores; the others touch no memory beyond the count.
template <class T>
inline Vec<Acc<T>> load(const T* p, int64_t count) {
  const bool full = __builtin_constant_p(count) && count == kLanes<Acc<T>>;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    Vec<T> v{};
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      if (!full) return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(lane_mask(count), p));
    }
#endif
    if (full) {
      std::memcpy(&v, p, sizeof v);
    } else {
      copy_some<kLanes<T>>(reinterpret_cast<T*>(&v), p, count);
    }
    return v;
  } else {
    Bits16 bits{};
#if defined(__AVX512F__)
    if (!full) {
      bits = reinterpret_cast<Bits16>(_mm256_maskz_loadu_epi16(lane_mask(count), p));
      return to_float(bits, T{});
    }
#endif
    if (full) {
      std::memcpy(&bits, p, sizeof bits);
    } else {
      copy_some<kLanes<Acc<T>>>(reinterpret_cast<T*>(&bits), p, count);
    }
    return to_float(bits, T{});
  }
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    std::memcpy(p, &v, sizeof v);
  } else {
    const Bits16 bits = from_float(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

template <class T>
inline void store(T* p, Vec<Acc<T>> v, int64_t count) {
  const bool full = __builtin_constant_p(count) && count == kLanes<Acc<T>>;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      if (!full) {
        return _mm512_mask_storeu_ps(p, lane_mask(count), reinterpret_cast<__m512>(v));
      }
    }
#endif
    if (full) {
      std::memcpy(p, &v, sizeof v);
    } else {
      copy_some<kLanes<T>>(p, reinterpret_cast<const T*>(&v), count);
    }
  } else {
    const Bits16 bits = from_float(v, T{});
#if defined(__AVX512F__)
    if (!full) {
      return _mm256_mask_storeu_epi16(p, lane_mask(count), reinterpret_cast<__m256i>(bits));
    }
#endif
    if (full) {
      std::memcpy(p, &bits, sizeof bits);
    } else {
      copy_some<kLanes<Acc<T>>>(p, reinterpret_cast<const T*>(&bits), count);
    }
  }
}

// An output that is large beside the last-level cache is stored past all caches: that saves reading
// its lines before they are overwritten, and leaves the inputs there for a second pass. Measured on
// 2 cores of an AMD EPYC (AVX-512, 32 MiB L3), bf16 batch norms, with a reader of the output behind
// it: 25.7 MB 1 to 18 % faster, 12.8 MB even, smaller ones mostly slower.
constexpr int64_t kPastCachesBytes = int64_t{1} << 24;

// Whether rows of vectors from p on, `stride` elements apart, may be stored by store_past_caches.
template <class T>
inline bool can_store_past_caches(const T* p, int64_t stride) {
#if defined(__x86_64__)
  constexpr uintptr_t kBytes = kLanes<Acc<T>> * sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0 &&
         static_cast<uintptr_t>(stride) * sizeof(T) % kBytes == 0;
#else
  return p == nullptr && stride < 0;  // never
#endif
}

// Bits of 8 to 64 bytes to memory, to an address that is a multiple of their size, without reading
// the cache lines that they fill and without keeping them. The thread calls fence_stores() behind
// its last ones.
template <class Bits>
inline void stream_bits(void* p, const Bits& bits) {
#if defined(__x86_64__)
  constexpr int kBytes = sizeof bits;
  static_assert(kBytes == 8 || kBytes == 16 || (kBytes <= kVectorBytes && kBytes % 32 == 0));
  const auto* from = reinterpret_cast<const char*>(&bits);
  auto* to = static_cast<char*>(p);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return;
  }
#endif
  if constexpr (kBytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  } else if constexpr (kBytes == 8) {
    long long word;
    std::memcpy(&word, from, sizeof word);
    _mm_stream_si64(reinterpret_cast<long long*>(to), word);
  }
#else
  std::memcpy(p, &bits, sizeof bits);
#endif
}

// A whole vector, as stream_bits.
template <class T>
inline void store_past_caches(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    stream_bits(p, v);
  } else {
    stream_bits(p, from_float(v, T{}));
  }
}

// Prefetches a line that is read or written soon; any address will do. Always inline: GCC takes a
// function of nothing else for one without effect, and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p); }
inline __attribute__((always_inline)) void prefetch_to_write(const void* p) {
  __builtin_prefetch(p, 1);
}

inline void fence_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// v in the first `count` lanes, 0 in the others.
template <class S>
inline Vec<S> first_lanes(Vec<S> v, int64_t count) {
  Vec<S> lane{};
  for (int i = 0; i < kLanes<S>; ++i) lane[i] = static_cast<S>(i);
  return lane < splat(static_cast<S>(count)) ? v : Vec<S>{};
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
