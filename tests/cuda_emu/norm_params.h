// What the drivers of the normalisations share: parameters from a case, whose numbers and tensors
// have the names of the params structs (sm_count is the device's), and a call with a workspace.
#pragma once

#include "common/cuda_device.h"
#include "common/types.h"
#include "driver.h"

namespace fastcnn {

using cuda_emu::Case;

template <class Params>
Params norm_params(Case& c) {
  Params p{};
  p.shape = {c.integer("n"), c.integer("c"), c.integer("hw"), c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.act = static_cast<Act>(c.integer("act"));
  p.eps = c.number("eps");
  p.x = c.tensor("x");
  p.weight = c.tensor("weight");
  p.bias = c.tensor("bias");
  p.mean = c.tensor("mean");
  p.var = c.tensor("var");
  return p;
}

template <class Params, class Workspace, class Launch>
void run_with_workspace(Case& c, const Params& p, const CudaDevice& device,
                        Workspace workspace_floats, Launch launch) {
  // A call without data is one that must be refused, of a size that no machine has memory for.
  const int64_t count = p.x == nullptr ? 0 : workspace_floats(p.shape, p.dtype, device);
  const auto workspace = std::make_unique<float[]>(count);
  c.run([&] {
    std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
    return launch(p, workspace.get(), device);
  });
}

}  // namespace fastcnn
