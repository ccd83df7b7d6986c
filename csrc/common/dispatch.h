// From runtime values to template arguments, for CPU kernels: one lambda, one instantiation a
// value.
#pragma once

#include "common/activation.h"
#include "common/types.h"
#include "common/vec.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

template <Act act>
struct ActTag {
  static constexpr Act value = act;
};
template <bool flag>
struct BoolTag {
  static constexpr bool value = flag;
};

// body(T{}) with T the storage type. csrc/<op>.cpp has refused every other dtype before, and
// FASTCNN_CPU_KERNEL sends float64 to the baseline level.
template <class Body>
inline void dispatch_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
#if FASTCNN_CPU_LEVEL_IS_BASELINE
      return body(double{});
#else
      return;
#endif
  }
}

// Returns body(ActTag<act>{}).
template <class Body>
inline auto dispatch_act(Act act, Body body) {
  switch (act) {
    case Act::kRelu:
      return body(ActTag<Act::kRelu>{});
    case Act::kRelu6:
      return body(ActTag<Act::kRelu6>{});
    default:
      return body(ActTag<Act::kNone>{});
  }
}

// Returns body(BoolTag<flag>{}).
template <class Body>
inline auto dispatch_bool(bool flag, Body body) {
  return flag ? body(BoolTag<true>{}) : body(BoolTag<false>{});
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
