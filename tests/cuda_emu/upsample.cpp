// Runs the launchers of csrc/cuda/upsample.cu on cases from tests/ops/upsample/test_cuda.py.
// Numbers and tensors have the names of the params structs; sm_count is the device's.
#include "upsample.h"

#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "driver.h"

namespace fastcnn {
namespace {

using cuda_emu::Case;

UpsampleShape shape_of(Case& c) {
  UpsampleShape s{};
  s.n = c.integer("n");
  s.c = c.integer("c");
  s.rows = {c.integer("h_in"), c.integer("h_out"), c.number("scale_h")};
  s.columns = {c.integer("w_in"), c.integer("w_out"), c.number("scale_w")};
  s.sampling = static_cast<Sampling>(c.integer("sampling"));
  s.channels_last = c.integer("channels_last") != 0;
  s.image = c.integer("image");
  s.pixel = c.integer("pixel");
  return s;
}

template <class Params, class Launch>
void run_with_workspace(Case& c, const Params& p, Launch launch) {
  const CudaDevice device{static_cast<int>(c.integer("sm_count")), nullptr};
  const int64_t count = upsample_workspace(p.shape);
  const auto workspace = std::make_unique<float[]>(count);
  c.run([&] {
    std::fill_n(workspace.get(), count, NAN);  // nothing may come from the call before
    return launch(p, workspace.get(), device);
  });
}

// Quotients and remainders of numerators that no test has memory for.
__global__ void divide_kernel(Divisor divisor, const int64_t* n, int64_t* quotient,
                              int64_t* remainder, int count) {
  for (int i = 0; i < count; ++i) {
    remainder[i] = n[i];
    quotient[i] = divisor.divide(remainder[i]);
  }
}

void run_divide(Case& c) {
  const Divisor divisor(c.integer("divisor"));
  const auto* n = static_cast<const int64_t*>(c.tensor("n"));
  auto* quotient = static_cast<int64_t*>(c.tensor("quotient"));
  auto* remainder = static_cast<int64_t*>(c.tensor("remainder"));
  const int count = static_cast<int>(c.integer("count"));
  c.run([&] {
    return launch({1, nullptr}, dim3(1), 1, 0, divide_kernel, divisor, n, quotient, remainder,
                  count);
  });
}

void run_op(Case& c) {
  if (c.op() == "fwd") {
    UpsampleFwdParams p{};
    p.shape = shape_of(c);
    p.dtype = static_cast<DType>(c.integer("dtype"));
    p.c_skip = c.integer("c_skip");
    p.x_at = c.integer("x_at");
    p.skip_at = c.integer("skip_at");
    p.x = c.tensor("x");
    p.skip = c.tensor("skip");
    p.y = c.tensor("y");
    run_with_workspace(c, p, launch_upsample_fwd);
  } else if (c.op() == "bwd") {
    UpsampleBwdParams p{};
    p.shape = shape_of(c);
    p.dtype = static_cast<DType>(c.integer("dtype"));
    p.dy = static_cast<const char*>(c.tensor("dy")) + c.integer("offset");
    p.dx = c.tensor("dx");
    run_with_workspace(c, p, launch_upsample_bwd);
  } else if (c.op() == "divide") {
    run_divide(c);
  } else {
    cuda_emu::fail("no op is called '%s'", c.op().c_str());
  }
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
