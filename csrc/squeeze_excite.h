// squeeze_excite: y = x * gate(z2), with
//   mean[n, c] = sum over h, w of x / hw
//   z1 = mean @ fc1.T + bias1
//   z2 = act(z1) @ fc2.T + bias2
// or, without an fc1, z2 = mean @ fc2.T + bias2.
// What the kernels of every device see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_device.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

// fastcnn/ops/squeeze_excite.py holds the same table.
enum class Gate : int32_t { kSigmoid = 0, kHardsigmoid = 1 };
constexpr int kGateCount = 2;

// Several values in place, each a float or a vector of floats or doubles. A NaN comes through.
template <class V, int kCount>
FASTCNN_HOST_DEVICE void gate_fwd(Gate gate, V (&z)[kCount]) {
  if (gate == Gate::kSigmoid) return EachAct<V>::template fwd<Act::kSigmoid>(z);
  const V zero = V{}, six = zero + 6, three = zero + 3;
  for (int i = 0; i < kCount; ++i) {
    const V moved = z[i] + three;
    z[i] = (moved < zero ? zero : (moved > six ? six : moved)) * constant<V>(1.0 / 6);
  }
}

// d gate / dz times dgate; where it jumps 0, as PyTorch's. A hardsigmoid's is PyTorch's too,
// which has float32's 1 / 6 in float64: a converted network is compared with it to 1e-9.
template <class V>
FASTCNN_HOST_DEVICE V gate_bwd(Gate gate, V dgate, V z) {
  if (gate == Gate::kSigmoid) {
    V values[] = {dgate};
    const V at[] = {z};
    EachAct<V>::template bwd<Act::kSigmoid>(values, at);
    return values[0];
  }
  const V zero = V{}, three = zero + 3;
  return z > -three ? (z < three ? dgate * constant<V>(1.f / 6.f) : zero) : zero;
}

// acc is the accumulate type: float, and double where dtype is kFloat64. m is the number of
// channels between fc1 and fc2, 0 without an fc1; fc2 then has c columns.
struct SqueezeExciteFwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  Gate gate;
  int64_t m;
  const void* x;      // [n, c, h, w] dtype
  const void* fc1;    // [m, c] acc; null: no fc1
  const void* bias1;  // [m] acc; null: 0
  const void* fc2;    // [c, m or c] acc
  const void* bias2;  // [c] acc; null: 0
  void* mean;         // [n, c] acc: written, as z1 and z2
  void* z1;           // [n, m] acc
  void* z2;           // [n, c] acc
  void* y;            // [n, c, h, w] dtype, in x's layout
};

// dz2 = gate'(z2) * (sum over h, w of dy * x)
// dz1 = act'(z1) * (dz2 @ fc2)
// dmean = dz1 @ fc1
// dx = dy * gate(z2) + dmean / hw
struct SqueezeExciteBwdParams {
  ImageShape shape;
  DType dtype;
  Act act;
  Gate gate;
  int64_t m;
  const void* dy;   // [n, c, h, w] dtype, in x's layout
  const void* x;    // [n, c, h, w] dtype
  const void* fc1;  // [m, c] acc; null: no fc1
  const void* fc2;  // [c, m or c] acc
  const void* z1;   // [n, m] acc
  const void* z2;   // [n, c] acc
  void* dx;         // [n, c, h, w] dtype
  void* dz1;        // [n, m] acc: written, as dz2
  void* dz2;        // [n, c] acc
};

FASTCNN_CPU_KERNEL(squeeze_excite_fwd_cpu, SqueezeExciteFwdParams)
FASTCNN_CPU_KERNEL(squeeze_excite_bwd_cpu, SqueezeExciteBwdParams)

// The CUDA launchers return a cudaError_t. float64 is the CPU's: they refuse it.
// workspace: the function's number of floats, uninitialised.
int64_t squeeze_excite_workspace(const ImageShape& shape, DType dtype, const CudaDevice& device);
int launch_squeeze_excite_fwd(const SqueezeExciteFwdParams& p, float* workspace,
                              const CudaDevice& device);
int launch_squeeze_excite_bwd(const SqueezeExciteBwdParams& p, float* workspace,
                              const CudaDevice& device);

}  // namespace fastcnn
