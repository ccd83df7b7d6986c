// The activations, defined once for host and device, for scalars and for the CPU's vectors.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastcnn {

// The numbers are part of the operator schemas: fastcnn/ops/activation.py holds the same table.
enum class Act : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2 };
constexpr int32_t kActCount = 3;

// V is float, double or a vector of them: a comparison then selects lane by lane.
// A NaN fails every comparison and so comes through, as in PyTorch.
template <Act act, class V>
FASTCNN_HOST_DEVICE V act_fwd(V z) {
  const V zero = V{};
  if constexpr (act == Act::kRelu) {
    return z < zero ? zero : z;
  } else if constexpr (act == Act::kRelu6) {
    const V six = zero + 6;
    return z < zero ? zero : (z > six ? six : z);
  } else {
    return z;
  }
}

// d act / dz times dy, from z or equally from y = act(z): for these activations both give the
// same answer. At the kinks the gradient is 0, as in PyTorch.
template <Act act, class V>
FASTCNN_HOST_DEVICE V act_bwd(V dy, V z) {
  const V zero = V{};
  if constexpr (act == Act::kRelu) {
    return z <= zero ? zero : dy;
  } else if constexpr (act == Act::kRelu6) {
    const V six = zero + 6;
    return z <= zero ? zero : (z >= six ? zero : dy);
  } else {
    return dy;
  }
}

// The same with the activation known at run time only: CUDA kernels switch where it costs nothing,
// in the shadow of memory, and are compiled once instead of once an activation.
template <class V>
FASTCNN_HOST_DEVICE V act_fwd(Act act, V z) {
  return act == Act::kRelu    ? act_fwd<Act::kRelu>(z)
         : act == Act::kRelu6 ? act_fwd<Act::kRelu6>(z)
                              : z;
}

template <class V>
FASTCNN_HOST_DEVICE V act_bwd(Act act, V dy, V z) {
  return act == Act::kRelu    ? act_bwd<Act::kRelu>(dy, z)
         : act == Act::kRelu6 ? act_bwd<Act::kRelu6>(dy, z)
                              : dy;
}

}  // namespace fastcnn
