// Which of the compiled instruction sets the CPU kernels use, decided once.
#pragma once

#include "common/types.h"

namespace fastcnn {

enum class CpuLevel { kBaseline, kAvx2, kAvx512 };

inline const char* name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The best level of this processor.
CpuLevel supported_cpu_level();

// The level in use: the supported one, or the lower one that FASTCNN_CPU_CAPABILITY names
// (baseline, avx2, avx512). Throws std::runtime_error for a name that is none of these and for a
// level this processor lacks.
CpuLevel cpu_level();

// Whether the level in use is kAvx512 on a processor that also has AVX512-BF16, and not the matrix
// unit (AMX), for which oneDNN has kernels of its own.
bool has_bf16_dot();

// Whether products in bfloat16 take less time than in float32: with AMX, and with AVX512-BF16 on
// AMD. On Intel oneDNN's convolutions by AVX512-BF16 take 1.5 to 2.3 times as long as in float32
// (Xeon, model 207), and 2 to 5 times where it has to emulate them (the same, AVX-512 alone).
// Elsewhere than on x86 nothing was measured: there PyTorch is left to it.
bool has_fast_bf16();

// The level of a call: float64 runs at the baseline, see below.
template <class Params>
inline CpuLevel cpu_level_for(const Params& p) {
  if constexpr (requires { p.dtype; }) {
    if (p.dtype == DType::kFloat64) return CpuLevel::kBaseline;
  }
  return cpu_level();
}

// Declares a CPU kernel once per level, and the function that calls the level in use. float64 is
// there for gradient checks and always runs at the baseline: one type of four less to compile for
// each higher level.
#if defined(__x86_64__)
#define FASTCNN_CPU_KERNEL(function, Params) \
  namespace baseline {                       \
  void function(const Params&);              \
  }                                          \
  namespace avx2 {                           \
  void function(const Params&);              \
  }                                          \
  namespace avx512 {                         \
  void function(const Params&);              \
  }                                          \
  inline void function(const Params& p) {    \
    switch (cpu_level_for(p)) {              \
      case CpuLevel::kAvx512:                \
        return avx512::function(p);          \
      case CpuLevel::kAvx2:                  \
        return avx2::function(p);            \
      default:                               \
        return baseline::function(p);        \
    }                                        \
  }
#else
#define FASTCNN_CPU_KERNEL(function, Params) \
  namespace baseline {                       \
  void function(const Params&);              \
  }                                          \
  inline void function(const Params& p) { baseline::function(p); }
#endif

}  // namespace fastcnn
