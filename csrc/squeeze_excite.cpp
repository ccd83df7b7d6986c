// squeeze_excite between torch and the kernels: what fastcnn/ops/squeeze_excite.py declares, here
// checked, allocated and launched.
#include "squeeze_excite.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "bindings/on_device.h"

namespace fastcnn {
namespace {

// A 1x1 convolution's weight [rows, columns, 1, 1] in the accumulate type.
const void* fc(const char* op, const char* name, const Tensor& t, const Tensor& x, ScalarType acc,
               int64_t rows, int64_t columns) {
  if (t.device() != x.device() || t.scalar_type() != acc || t.dim() != 4 || t.size(0) != rows ||
      t.size(1) != columns || t.size(2) != 1 || t.size(3) != 1 || !is_dense(t, false)) {
    fail(op, name, ": expected a dense tensor [", rows, ", ", columns, ", 1, 1] of ",
         torch::headeronly::toString(acc), " and ", device_of(x), ", got sizes ", sizes_of(t),
         " of ", torch::headeronly::toString(t.scalar_type()), " and ", device_of(t));
  }
  check_storage(op, name, t);
  return t.const_data_ptr();
}

// What both directions are given.
template <class Params>
void set_common(const char* op, const Check& check, const Tensor& x, const OptionalTensor& fc1,
                const Tensor& fc2, int64_t act, int64_t gate, Params& p) {
  p.shape = check.shape();
  p.dtype = check.dtype();
  p.act = check.act(act);
  if (gate < 0 || gate >= kGateCount) {
    fail(op, "gate: expected 0 to ", kGateCount - 1, ", got ", gate);
  }
  p.gate = static_cast<Gate>(gate);
  const int64_t c = p.shape.c;
  if (fc1) {
    if (fc1->dim() != 4 || fc1->size(0) < 1) {
      fail(op, "fc1: expected sizes [m, ", c, ", 1, 1], got ", sizes_of(*fc1));
    }
    p.m = fc1->size(0);
    p.fc1 = fc(op, "fc1", *fc1, x, check.acc(), p.m, c);
  }
  p.fc2 = fc(op, "fc2", fc2, x, check.acc(), c, fc1 ? p.m : c);
  p.x = x.const_data_ptr();
}

// -> y, mean, z1, z2
template <auto launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& x, const OptionalTensor& fc1,
                                               const OptionalTensor& bias1, const Tensor& fc2,
                                               const OptionalTensor& bias2, int64_t act,
                                               int64_t gate) {
  constexpr const char* kOp = "squeeze_excite_fwd";
  const Check check(kOp, x);
  SqueezeExciteFwdParams p{};
  set_common(kOp, check, x, fc1, fc2, act, gate, p);
  const int64_t n = p.shape.n, c = p.shape.c;
  if (bias1) p.bias1 = check.numbers("bias1", *bias1, p.m);
  p.bias2 = check.channels("bias2", bias2);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = check.new_matrix(n, c), z1 = check.new_matrix(n, p.m), z2 = check.new_matrix(n, c);
  p.mean = mean.mutable_data_ptr();
  p.z1 = z1.mutable_data_ptr();
  p.z2 = z2.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  if (p.shape.numel() > 0) {
    launch(kOp, p, x);
  } else {  // the mean of nothing
    for (Tensor* t : {&mean, &z1, &z2}) {
      torch::stable::fill_(*t, std::numeric_limits<double>::quiet_NaN());
    }
  }
  return {y, mean, z1, z2};
}

// -> dx, dz1, dz2
template <auto launch>
std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& fc1,
                                       const Tensor& fc2, const Tensor& z1, const Tensor& z2,
                                       int64_t act, int64_t gate) {
  constexpr const char* kOp = "squeeze_excite_bwd";
  const Check check(kOp, x);
  SqueezeExciteBwdParams p{};
  set_common(kOp, check, x, fc1, fc2, act, gate, p);
  const int64_t n = p.shape.n, c = p.shape.c;
  p.dy = check.image("dy", dy);
  if (p.m > 0) p.z1 = check.matrix("z1", z1, n, p.m);
  if (p.m == 0 && (z1.dim() != 2 || z1.size(0) != n || z1.size(1) != 0)) {
    fail(kOp, "z1: expected sizes [", n, ", 0] without an fc1, got ", sizes_of(z1));
  }
  p.z2 = check.matrix("z2", z2, n, c);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dz1 = check.new_matrix(n, p.m), dz2 = check.new_matrix(n, c);
  p.dx = dx.mutable_data_ptr();
  p.dz1 = dz1.mutable_data_ptr();
  p.dz2 = dz2.mutable_data_ptr();
  if (p.shape.numel() > 0) {
    launch(kOp, p, x);
  } else {
    torch::stable::zero_(dz1);
    torch::stable::zero_(dz2);
  }
  return {dx, dz1, dz2};
}

}  // namespace

using FwdParams = SqueezeExciteFwdParams;
using BwdParams = SqueezeExciteBwdParams;

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("squeeze_excite_fwd", TORCH_BOX((&fwd<on_cpu<squeeze_excite_fwd_cpu, FwdParams>>)));
  m.impl("squeeze_excite_bwd", TORCH_BOX((&bwd<on_cpu<squeeze_excite_bwd_cpu, BwdParams>>)));
}

#ifdef FASTCNN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("squeeze_excite_fwd",
         TORCH_BOX((&fwd<on_cuda_with_workspace<launch_squeeze_excite_fwd, squeeze_excite_workspace,
                                                FwdParams>>)));
  m.impl("squeeze_excite_bwd",
         TORCH_BOX((&bwd<on_cuda_with_workspace<launch_squeeze_excite_bwd, squeeze_excite_workspace,
                                                BwdParams>>)));
}
#endif

}  // namespace fastcnn
