// The calls of group_norm_act's and pixel_norm_act's launchers.
#pragma once

#include "group_norm_act.h"
#include "norm_params.h"

namespace fastcnn {

template <class Params>
Params group_norm_params(Case& c) {
  auto p = norm_params<Params>(c);
  p.groups = c.integer("groups");
  return p;
}

// op "fwd" or "bwd", with that op's launchers.
template <class Workspace, class Fwd, class Bwd>
void run_norm(Case& c, Workspace workspace_floats, Fwd fwd, Bwd bwd) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  if (c.op() == "fwd") {
    auto p = group_norm_params<GroupNormActFwdParams>(c);
    p.y = c.tensor("y");
    run_with_workspace(c, p, device, workspace_floats, fwd);
  } else if (c.op() == "bwd") {
    auto p = group_norm_params<GroupNormActBwdParams>(c);
    p.dy = c.tensor("dy");
    p.dx = c.tensor("dx");
    p.dweight = c.tensor("dweight");
    p.dbias = c.tensor("dbias");
    run_with_workspace(c, p, device, workspace_floats, bwd);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace fastcnn
