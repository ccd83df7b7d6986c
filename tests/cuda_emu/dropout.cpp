// Runs the launcher of csrc/cuda/dropout.cu on cases from tests/ops/dropout/test_cuda.py. Numbers
// and tensors have the names of the params struct, and p stands for threshold and scale; sm_count
// is the device's.
#include "dropout.h"

#include "cuda/launch.cuh"
#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

void run_apply(Case& c, const CudaDevice& device) {
  DropoutParams p{};
  p.shape = {c.integer("n"), c.integer("c"), c.integer("hw"), c.integer("channels_last") != 0};
  p.dtype = static_cast<DType>(c.integer("dtype"));
  p.per_channel = c.integer("per_channel") != 0;
  p.threshold = keep_threshold(c.number("p"));
  p.scale = keep_scale(p.threshold);
  p.seed = static_cast<const int64_t*>(c.tensor("seed"));
  p.x = c.tensor("x");
  p.residual = c.tensor("residual");
  p.y = c.tensor("y");
  if (p.y == nullptr) p.y = const_cast<void*>(p.x);  // in place
  c.run([&] { return launch_dropout_apply(p, device); });
}

// The bits of blocks that no test has memory for the elements of.
__global__ void keep_kernel(Keep keep, const int64_t* first, int32_t* bits, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < count) bits[i] = static_cast<int32_t>(keep_from(keep, static_cast<uint64_t>(first[i])));
}

void run_keep(Case& c, const CudaDevice& device) {
  const Keep keep(static_cast<uint64_t>(c.integer("seed")), keep_threshold(c.number("p")));
  const auto* first = static_cast<const int64_t*>(c.tensor("first"));
  auto* bits = static_cast<int32_t*>(c.tensor("bits"));
  const int64_t count = c.integer("count");
  c.run([&] { return launch(device, dim3(1), 64, 0, keep_kernel, keep, first, bits, count); });
}

void run_op(Case& c) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  if (c.op() == "apply") {
    run_apply(c, device);
  } else if (c.op() == "keep") {
    run_keep(c, device);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
