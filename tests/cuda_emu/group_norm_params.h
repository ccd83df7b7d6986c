// The parameters of group_norm_act's and pixel_norm_act's launchers from a case: numbers and
// tensors have the names of the params structs; sm_count is the device's.
#pragma once

#include "driver.h"
#include "group_norm_act.h"

namespace fastcnn {

using cuda_emu::Case;

template <class Params>
Params norm_params(Case& c) {
  Params p{};
  p.shape = {c.integer("n"), c.integer("c"), c.integer("hw"), c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.act = static_cast<Act>(c.integer("act"));
  p.groups = c.integer("groups");
  p.eps = c.number("eps");
  p.x = c.tensor("x");
  p.weight = c.tensor("weight");
  p.bias = c.tensor("bias");
  p.mean = c.tensor("mean");
  p.var = c.tensor("var");
  return p;
}

// op "fwd" or "bwd", with that op's launchers.
template <class Workspace, class Fwd, class Bwd>
void run_norm(Case& c, Workspace workspace_floats, Fwd fwd, Bwd bwd) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  const auto run = [&](const auto& p, auto launch) {
    const int64_t count = workspace_floats(p.shape, p.dtype, device);
    const auto workspace = std::make_unique<float[]>(count);
    c.run([&] {
      std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
      return launch(p, workspace.get(), device);
    });
  };
  if (c.op() == "fwd") {
    auto p = norm_params<GroupNormActFwdParams>(c);
    p.y = c.tensor("y");
    run(p, fwd);
  } else if (c.op() == "bwd") {
    auto p = norm_params<GroupNormActBwdParams>(c);
    p.dy = c.tensor("dy");
    p.dx = c.tensor("dx");
    p.dweight = c.tensor("dweight");
    p.dbias = c.tensor("dbias");
    run(p, bwd);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace fastcnn
