#include "cpu/capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastcnn {

CpuLevel supported_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) return CpuLevel::kAvx512;
  if (avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kBaseline;
}

static CpuLevel requested_cpu_level() {
  const CpuLevel supported = supported_cpu_level();
  const char* requested = std::getenv("FASTCNN_CPU_CAPABILITY");
  if (requested == nullptr || *requested == '\0') return supported;
  for (CpuLevel level : {CpuLevel::kBaseline, CpuLevel::kAvx2, CpuLevel::kAvx512}) {
    if (std::string(requested) != name(level)) continue;
    if (level > supported) {
      throw std::runtime_error(std::string("FASTCNN_CPU_CAPABILITY: expected at most ") +
                               name(supported) + ", the best of this processor, got " + requested);
    }
    return level;
  }
  throw std::runtime_error(
      std::string("FASTCNN_CPU_CAPABILITY: expected baseline, avx2 or avx512, got ") + requested);
}

CpuLevel cpu_level() {
  static const CpuLevel level = requested_cpu_level();
  return level;
}

namespace {

struct Bf16Instructions {
  bool dot = false, matrix = false, dot_is_fast = false;  // AVX512-BF16, AMX, and the maker is AMD
};

#if defined(__x86_64__)
Bf16Instructions bf16_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Bf16Instructions found;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  found.matrix = (d >> 22) & 1;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  found.dot = (a >> 5) & 1;
  __get_cpuid(0, &a, &b, &c, &d);
  const unsigned maker[] = {b, d, c};
  found.dot_is_fast = found.dot && std::memcmp(maker, "AuthenticAMD", sizeof(maker)) == 0;
  return found;
}
#endif

}  // namespace

bool has_bf16_dot() {
#if defined(__x86_64__)
  static const Bf16Instructions found = bf16_instructions();
  return found.dot && !found.matrix && cpu_level() == CpuLevel::kAvx512;
#else
  return false;
#endif
}

bool has_fast_bf16() {
#if defined(__x86_64__)
  static const Bf16Instructions found = bf16_instructions();
  return found.matrix || found.dot_is_fast;
#else
  return true;
#endif
}

}  // namespace fastcnn
