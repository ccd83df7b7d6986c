// Runs the launchers of csrc/cuda/squeeze_excite.cu on cases from
// tests/ops/squeeze_excite/test_cuda.py. Numbers and tensors have the names of the params structs.
#include "squeeze_excite.h"

#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

template <class Params, class Launch>
void run(Case& c, Params& p, Launch launch) {
  p.shape = {c.integer("n"), c.integer("c"), c.integer("hw"), c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.act = static_cast<Act>(c.integer("act"));
  p.gate = static_cast<Gate>(c.integer("gate"));
  p.m = c.integer("m");
  p.x = c.tensor("x");
  p.fc1 = c.tensor("fc1");
  p.fc2 = c.tensor("fc2");
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  const int64_t count = squeeze_excite_workspace(p.shape, p.dtype, device);
  const auto workspace = std::make_unique<float[]>(count);
  c.run([&] {
    std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
    return launch(p, workspace.get(), device);
  });
}

void run_op(Case& c) {
  if (c.op() == "fwd") {
    SqueezeExciteFwdParams p{};
    p.bias1 = c.tensor("bias1");
    p.bias2 = c.tensor("bias2");
    p.mean = c.tensor("mean");
    p.z1 = c.tensor("z1");
    p.z2 = c.tensor("z2");
    p.y = c.tensor("y");
    run(c, p, launch_squeeze_excite_fwd);
  } else if (c.op() == "bwd") {
    SqueezeExciteBwdParams p{};
    p.dy = c.tensor("dy");
    p.z1 = c.tensor("z1");
    p.z2 = c.tensor("z2");
    p.dx = c.tensor("dx");
    p.dz1 = c.tensor("dz1");
    p.dz2 = c.tensor("dz2");
    run(c, p, launch_squeeze_excite_bwd);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
