// From runtime values to template arguments, for CPU kernels: one lambda, one instantiation a
// value.
#pragma once

#include "common/activation.h"
#include "common/types.h"
#include "cpu/simd/vec.h"
#include "cpu/simd/vec_math.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

// An activation as a loop over vectors calls it. Those that are little more than a comparison are
// part of the loop, compiled once for each: one loop for all of them, with bounds known at run
// time, took 4 to 9 % longer in the caches with ReLU (AMD EPYC, Zen 3). The others are called and
// share one loop: with all vectors of a block at once, which lie in the L1 cache meanwhile, as
// their constants are loaded and the activation is looked up once a call.
template <Act act>
struct InlineAct {
  static constexpr int kVectors = 1;

  explicit InlineAct(Act) {}

  static constexpr bool derivative_needs_only_y() { return fastcnn::derivative_needs_only_y(act); }
  template <class V, int kCount>
  void fwd(V (&z)[kCount]) const {
    EachAct<V>::template fwd<act>(z);
  }
  template <class V, int kCount>
  void bwd(V (&dy)[kCount], const V (&z)[kCount]) const {
    EachAct<V>::template bwd<act>(dy, z);
  }
};

template <class V, int kCount>
__attribute__((noinline)) void called_act_fwd(Act act, V (&z)[kCount]) {
  act_fwd(act, z);
}

template <class V, int kCount>
__attribute__((noinline)) void called_act_bwd(Act act, V (&dy)[kCount], const V (&z)[kCount]) {
  act_bwd(act, dy, z);
}

class CalledAct {
 public:
  static constexpr int kVectors = 4;

  explicit CalledAct(Act act) : act_(act) {}

  bool derivative_needs_only_y() const { return fastcnn::derivative_needs_only_y(act_); }
  template <class V, int kCount>
  void fwd(V (&z)[kCount]) const {
    called_act_fwd(act_, z);
  }
  template <class V, int kCount>
  void bwd(V (&dy)[kCount], const V (&z)[kCount]) const {
    called_act_bwd(act_, dy, z);
  }

 private:
  Act act_;
};

// The same of one vector.
template <class A, class V>
inline __attribute__((always_inline)) V act_fwd_one(A act, V z) {
  V values[] = {z};
  act.fwd(values);
  return values[0];
}

template <class A, class V>
inline __attribute__((always_inline)) V act_bwd_one(A act, V dy, V z) {
  V values[] = {dy};
  const V at[] = {z};
  act.bwd(values, at);
  return values[0];
}

template <bool flag>
struct BoolTag {
  static constexpr bool value = flag;
};

// body(T{}) for the types that images are read and written in by ops without float64.
template <class Body>
inline void dispatch_half_or_float(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    default:
      return body(float{});
  }
}

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

template <class A>
struct TypeTag {
  using type = A;
};

// Returns body(TypeTag<A>{}), where A(act) is the activation on vectors of S. Doubles, which are
// there for gradient checks, have one loop.
template <class S, class Body>
inline auto dispatch_act(Act act, Body body) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (act == Act::kNone) return body(TypeTag<InlineAct<Act::kNone>>{});
    if (act == Act::kRelu) return body(TypeTag<InlineAct<Act::kRelu>>{});
    if (act == Act::kRelu6) return body(TypeTag<InlineAct<Act::kRelu6>>{});
  }
  return body(TypeTag<CalledAct>{});
}

// Returns body(BoolTag<flag>{}).
template <class Body>
inline auto dispatch_bool(bool flag, Body body) {
  return flag ? body(BoolTag<true>{}) : body(BoolTag<false>{});
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
