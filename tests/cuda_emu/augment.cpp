// Runs the launchers of csrc/cuda/augment.cu on cases from tests/ops/augment/test_cuda.py.
// Numbers and tensors have the names of the params structs; sm_count is the device's.
#include "augment.h"

#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

AugmentParams image_params(Case& c) {
  AugmentParams p{};
  p.n = c.integer("n");
  p.c = c.integer("c");
  p.h_in = c.integer("h_in");
  p.w_in = c.integer("w_in");
  p.h = c.integer("h");
  p.w = c.integer("w");
  p.in_channels_last = c.integer("in_channels_last") != 0;
  p.channels_last = c.integer("channels_last") != 0;
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.images = static_cast<const uint8_t*>(c.tensor("images"));
  p.samples = static_cast<const AugmentSample*>(c.tensor("reals"));
  p.integers = static_cast<const AugmentIntegers*>(c.tensor("integers"));
  p.channels = static_cast<const AugmentChannel*>(c.tensor("channels"));
  p.y = c.tensor("y");
  return p;
}

AugmentMaskParams mask_params(Case& c) {
  AugmentMaskParams p{};
  p.n = c.integer("n");
  p.h_in = c.integer("h_in");
  p.w_in = c.integer("w_in");
  p.h = c.integer("h");
  p.w = c.integer("w");
  p.wide = c.integer("wide") != 0;
  p.fill = c.integer("fill");
  p.masks = c.tensor("masks");
  p.samples = static_cast<const AugmentSample*>(c.tensor("reals"));
  p.y = c.tensor("y");
  return p;
}

void run_op(Case& c) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  if (c.op() == "augment") {
    const AugmentParams p = image_params(c);
    const int64_t count = augment_workspace(p);
    const auto workspace = std::make_unique<float[]>(count);
    c.run([&] {
      std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
      return launch_augment(p, workspace.get(), device);
    });
  } else if (c.op() == "mask") {
    const AugmentMaskParams p = mask_params(c);
    c.run([&] { return launch_augment_mask(p, device); });
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
