// Runs the launchers of csrc/cuda/depthwise_conv2d.cu on cases from
// tests/ops/depthwise_conv2d/test_cuda.py. Numbers and tensors have the names of the params
// structs.
#include "depthwise_conv2d.h"

#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

WindowAxis axis_of(Case& c, const std::string& of) {
  return {c.integer("size" + of),   c.integer("size_out" + of), c.integer("kernel" + of),
          c.integer("stride" + of), c.integer("padding" + of),  c.integer("dilation" + of)};
}

template <class Params, class Launch>
void run_with_workspace(Case& c, Params p, int64_t (*floats)(const DepthwiseShape&),
                        Launch launch) {
  p.shape = {c.integer("n"), c.integer("c"), axis_of(c, "_h"), axis_of(c, "_w"),
             c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  const int64_t count = floats(p.shape);
  const auto workspace = std::make_unique<float[]>(count);
  c.run([&] {
    std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
    return launch(p, workspace.get(), device);
  });
}

void run_op(Case& c) {
  if (c.op() == "fwd") {
    DepthwiseConv2dFwdParams p{};
    p.act = static_cast<Act>(c.integer("act"));
    p.x = c.tensor("x");
    p.weight = c.tensor("weight");
    p.bias = c.tensor("bias");
    p.dy = c.tensor("dy");
    p.y = c.tensor("y");
    run_with_workspace(c, p, depthwise_conv2d_workspace, launch_depthwise_conv2d_fwd);
  } else if (c.op() == "bwd_data") {
    DepthwiseConv2dBwdDataParams p{};
    p.dy = c.tensor("dy");
    p.weight = c.tensor("weight");
    p.dx = c.tensor("dx");
    run_with_workspace(c, p, depthwise_conv2d_workspace, launch_depthwise_conv2d_bwd_data);
  } else if (c.op() == "bwd_weight") {
    DepthwiseConv2dBwdWeightParams p{};
    p.dy = c.tensor("dy");
    p.x = c.tensor("x");
    p.dweight = c.tensor("dweight");
    p.dbias = c.tensor("dbias");
    run_with_workspace(c, p, depthwise_conv2d_bwd_weight_workspace,
                       launch_depthwise_conv2d_bwd_weight);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
