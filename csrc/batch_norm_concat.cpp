// batch_norm_act of a concatenation, between torch and the kernels: what
// fastcnn/ops/batch_norm_act/concat.py declares, here checked, allocated and called.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "batch_norm_act.h"
#include "bindings/batch_norm_glue.h"

namespace fastcnn {
namespace {

// The tensors of a concatenation [n, c, h, w], each dense, all in one layout.
class Concat {
 public:
  Concat(const char* op, const std::vector<Tensor>& xs) : op_(op), xs_(xs) {
    if (xs.empty()) fail(op, "xs: expected at least one tensor, got none");
    bool nchw = true, nhwc = true;
    for (const Tensor& x : xs) {
      if (x.dim() != 4) fail(op, "xs: expected 4 dimensions [n, c, h, w], got ", sizes_of(x));
      if (!x.is_cpu()) fail(op, "xs: expected CPU tensors, got ", device_of(x));
      nchw &= is_dense(x, false);
      nhwc &= is_dense(x, true);
    }
    if (!nchw && !nhwc) {
      fail(op, "xs: expected dense tensors, all NCHW or all channels_last, got other strides");
    }
    channels_last_ = nhwc && !nchw;
    const Tensor& x = xs[0];
    for (const Tensor& t : xs) {
      const int64_t c = t.size(1);
      image_of(op, "xs", t, x, x.size(0), c, x.size(2), x.size(3), channels_last_);
      if (c > 0) pieces_.push_back({c_, c, t.const_data_ptr(), nullptr});
      if (__builtin_add_overflow(c_, c, &c_)) fail(op, "xs: expected less than 2^63 channels");
    }
  }

  Tensor new_image() const {
    const Tensor& x = xs_[0];
    return empty_image(x, x.scalar_type(), x.size(0), c_, x.size(2), x.size(3), channels_last_);
  }

  // Checks that an image has the concatenation's sizes, type and layout.
  void is_like(const char* name, const Tensor& t) const {
    const Tensor& x = xs_[0];
    image_of(op_, name, t, x, x.size(0), c_, x.size(2), x.size(3), channels_last_);
  }

  // Gives params where x lies.
  void point(auto& p) const {
    p.pieces = pieces_.data();
    p.piece_count = static_cast<int64_t>(pieces_.size());
  }

  // New tensors like the pieces, for dx to be written to.
  std::vector<Tensor> new_pieces() {
    std::vector<Tensor> dxs;
    auto piece = pieces_.begin();
    for (const Tensor& x : xs_) {
      dxs.push_back(torch::stable::empty_like(x));
      if (x.size(1) > 0) (piece++)->dx = dxs.back().mutable_data_ptr();
    }
    return dxs;
  }

 private:
  const char* op_;
  const std::vector<Tensor>& xs_;
  std::vector<BatchNormPiece> pieces_;
  int64_t c_ = 0;
  bool channels_last_ = false;
};

// -> y, mean, var
std::tuple<Tensor, Tensor, Tensor> fwd(const std::vector<Tensor>& xs,
                                       const OptionalTensor& residual, const OptionalTensor& weight,
                                       const OptionalTensor& bias, double eps, int64_t act) {
  constexpr const char* kOp = "batch_norm_act_concat_fwd";
  const Concat concat(kOp, xs);
  Tensor y = concat.new_image();
  const Check check(kOp, y);
  Tensor mean = check.new_channels(), var = check.new_channels();
  BatchNormActFwdParams p = fwd_params(check, y, residual, weight, bias, mean, var, eps, act, y);
  concat.point(p);
  if (p.shape.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::fill_(var, 1.0);
  } else {
    batch_norm_act_fwd_cpu(p);
  }
  return {y, mean, var};
}

Tensor apply(const std::vector<Tensor>& xs, const OptionalTensor& residual,
             const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
             const Tensor& var, double eps, int64_t act) {
  constexpr const char* kOp = "batch_norm_act_concat_apply";
  const Concat concat(kOp, xs);
  Tensor y = concat.new_image();
  const Check check(kOp, y);
  BatchNormActFwdParams p = fwd_params(check, y, residual, weight, bias, mean, var, eps, act, y);
  concat.point(p);
  if (p.shape.numel() > 0) batch_norm_act_apply_cpu(p);
  return y;
}

// -> dxs, dresidual (empty if not wanted), dweight, dbias
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> bwd(
    const Tensor& dy, const std::vector<Tensor>& xs, const OptionalTensor& saved,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    double eps, int64_t act, bool training, bool want_dresidual) {
  constexpr const char* kOp = "batch_norm_act_concat_bwd";
  Concat concat(kOp, xs);
  concat.is_like("dy", dy);
  const Check check(kOp, dy);
  BatchNormActBwdParams p = bwd_params(check, dy, dy, saved, weight, bias, mean, var, eps, act);
  std::vector<Tensor> dxs = concat.new_pieces();
  concat.point(p);
  p.training = training;
  auto [dresidual, dweight, dbias] = sum_up<on_cpu<batch_norm_act_bwd_cpu, BatchNormActBwdParams>>(
      kOp, check, dy, p, want_dresidual);
  return {dxs, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("batch_norm_act_concat_fwd", TORCH_BOX(&fwd));
  m.impl("batch_norm_act_concat_apply", TORCH_BOX(&apply));
  m.impl("batch_norm_act_concat_bwd", TORCH_BOX(&bwd));
}

}  // namespace fastcnn
