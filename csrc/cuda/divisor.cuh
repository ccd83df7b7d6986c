// Division by a number that is the same for a whole launch. A 64-bit division is a function call on
// the device, of about a hundred instructions, whose registers the compiler then saves to memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastcnn {

struct Divisor {
  int64_t value;
  uint64_t inverse;  // (2^64 - 1) / value

  Divisor() = default;
  explicit Divisor(int64_t value)
      : value(value), inverse(UINT64_MAX / static_cast<uint64_t>(value)) {}

  // The quotient of n >= 0; n becomes the remainder. n * inverse / 2^64 lies less than 1 below
  // n / value, so the quotient is right or 1 too small.
  __device__ int64_t divide(int64_t& n) const {
    int64_t quotient = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), inverse));
    n -= quotient * value;
    if (n >= value) {
      n -= value;
      ++quotient;
    }
    return quotient;
  }
};

}  // namespace fastcnn
