// Runs the launchers of csrc/cuda/squeeze_excite.cu on cases from
// tests/ops/squeeze_excite/test_cuda.py. Numbers and tensors have the names of the params structs.
#include "squeeze_excite.h"

#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

template <class Params>
Params params_of(Case& c) {
  Params p{};
  p.shape = {c.integer("n"), c.integer("c"), c.integer("hw"), c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.x = c.tensor("x");
  return p;
}

void run_op(Case& c) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  if (c.op() == "reduce") {
    auto p = params_of<SqueezeExciteReduceParams>(c);
    p.dy = c.tensor("dy");
    p.out = c.tensor("out");
    const int64_t count = squeeze_excite_workspace(p.shape, p.dtype, device);
    const auto workspace = std::make_unique<float[]>(count);
    c.run([&] {
      std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
      return launch_squeeze_excite_reduce(p, workspace.get(), device);
    });
  } else if (c.op() == "scale") {
    auto p = params_of<SqueezeExciteScaleParams>(c);
    p.gate = c.tensor("gate");
    p.dmean = c.tensor("dmean");
    p.y = c.tensor("y");
    c.run([&] { return launch_squeeze_excite_scale(p, device); });
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
