// conv2d_int8_epilogue between torch and the kernel: what fastcnn/ops/conv2d_int8/interface.py
// declares, here checked and called.
#include "conv2d_int8.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "bindings/check.h"

namespace fastcnn {
namespace {

constexpr const char* kOp = "conv2d_int8_epilogue";
constexpr int64_t kNone = 0, kRelu = 1, kRelu6 = 2;  // of ACT_NUMBER

// An image of y's sizes.
void check_image(const char* name, const Tensor& t, const Tensor& y) {
  bool same = t.is_cpu() && t.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == y.size(d);
  if (!same) fail(kOp, name, ": expected a CPU tensor of ", sizes_of(y), ", got ", sizes_of(t));
  if (!is_dense(t, true)) fail(kOp, name, ": expected the channels_last layout, got other strides");
  check_storage(kOp, name, t);
}

template <class T>
const T* channels(const char* name, const Tensor& t, int64_t c, ScalarType dtype) {
  if (!t.is_cpu() || t.dim() != 1 || t.size(0) != c || t.scalar_type() != dtype ||
      (c > 1 && t.stride(0) != 1)) {
    fail(kOp, name, ": expected a dense vector of ", c, " ", torch::headeronly::toString(dtype),
         " on the CPU, got sizes ", sizes_of(t), " of ",
         torch::headeronly::toString(t.scalar_type()));
  }
  check_storage(kOp, name, t);
  return static_cast<const T*>(t.const_data_ptr());
}

bool is_int8(ScalarType type) { return type == ScalarType::Char || type == ScalarType::Byte; }

int32_t zero_point(const char* name, int64_t value, ScalarType type) {
  const int64_t low = type == ScalarType::Char ? -128 : 0, high = low + 255;
  const bool has = is_int8(type);
  if (has ? value < low || value > high : value != 0) {
    fail(kOp, name, ": expected ", has ? low : 0, " to ", has ? high : 0, ", got ", value);
  }
  return static_cast<int32_t>(value);
}

// A factor that float32 holds.
float positive(const char* name, double value) {
  const auto number = static_cast<float>(value);
  if (!(number > 0)) fail(kOp, name, ": expected a number above 0, got ", value);
  return number;
}

void conv2d_int8_epilogue(Tensor y, const Tensor& acc, const Tensor& multiplier,
                          const OptionalTensor& bias, const OptionalTensor& residual,
                          double residual_scale, int64_t residual_zero_point, int64_t act,
                          double cap, int64_t y_zero_point) {
  check_image("y", y, y);
  check_image("acc", acc, y);
  const ScalarType type = y.scalar_type(), sums = acc.scalar_type();
  Conv2dInt8Params p{};
  p.quantizes = is_int8(type);
  if (!p.quantizes) p.dtype = dtype_of(kOp, "y", y);
  if (!p.quantizes && p.dtype == DType::kFloat64) fail(kOp, "y: expected no float64");
  if (sums != ScalarType::Float && sums != ScalarType::Int) {
    fail(kOp, "acc: expected float32 or int32, got ", torch::headeronly::toString(sums));
  }
  p.acc_is_float = sums == ScalarType::Float;
  p.c = y.size(1);
  p.pixels = y.size(0) * y.size(2) * y.size(3);
  p.multiplier = channels<float>("multiplier", multiplier, p.c, ScalarType::Float);
  if (bias) {
    const ScalarType expected = p.quantizes ? ScalarType::Int : ScalarType::Float;
    p.bias = channels<void>("bias", *bias, p.c, expected);
  }
  if (residual) {
    const ScalarType from = residual->scalar_type();
    check_image("residual", *residual, y);
    if (!is_int8(from) && from != type) {
      fail(kOp, "residual: expected int8, uint8 or ", torch::headeronly::toString(type), ", got ",
           torch::headeronly::toString(from));
    }
    p.residual_kind = from == ScalarType::Byte   ? ResidualKind::kUint8
                      : from == ScalarType::Char ? ResidualKind::kInt8
                                                 : ResidualKind::kOutput;
    p.residual_zero_point = zero_point("residual_zero_point", residual_zero_point, from);
    p.residual_scale = positive("residual_scale", residual_scale);
    p.residual = residual->const_data_ptr();
  }
  if (act < kNone || act > kRelu6) fail(kOp, "act: expected 0, 1 or 2, got ", act);
  p.relu = act != kNone;
  p.cap = act == kRelu6 ? positive("cap", cap) : std::numeric_limits<float>::infinity();
  p.zero_point = zero_point("zero_point", y_zero_point, type);
  p.low = type == ScalarType::Char ? -128 : 0;
  p.high = p.low + 255;
  p.acc = acc.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (y.numel() > 0) conv2d_int8_epilogue_cpu(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("conv2d_int8_epilogue", TORCH_BOX((&conv2d_int8_epilogue)));
}

}  // namespace fastcnn
