// depthwise_conv2d forward on the CPU: y = act(conv2d(x, weight) + bias), or with a dy instead
// dy * act'(z), of which backward begins. sweep.h has channels_last, blocks.h NCHW, with how each
// moves data. Floor: x is read and y written once; kernel_h * kernel_w multiply-adds a value.
#include "cpu/depthwise_conv2d/blocks.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

void depthwise_conv2d_fwd_cpu(const DepthwiseConv2dFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using S = Acc<T>;
    const DepthwiseShape& s = p.shape;
    const auto* x = static_cast<const T*>(p.x);
    const auto* weight = static_cast<const S*>(p.weight);
    const auto* bias = static_cast<const S*>(p.bias);
    const auto* dy = static_cast<const T*>(p.dy);
    auto* y = static_cast<T*>(p.y);
    if (!s.channels_last) {
      Sweep<S> block = block_sweep<S>(s.rows, s.columns, false, false);
      choose_window_sums(block);
      return sweep_blocks(block, s.n, s.c, x, weight, bias, dy, y, p.act);
    }
    Sweep<T> sweep{s.n, s.c, s.rows, s.columns, false, false, x, weight, bias, dy, y, p.act};
    choose_window_sums(sweep);
    sweep.finish = choose_finish<T>(p.act, dy != nullptr);
    sweep.run();
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
