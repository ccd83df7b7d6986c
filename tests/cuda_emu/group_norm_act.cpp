// Runs the launchers of csrc/cuda/group_norm_act/group.cu on cases from
// tests/ops/group_norm_act/test_cuda.py.
#include "group_norm_params.h"

namespace fastcnn {
namespace {

void run_op(Case& c) {
  run_norm(c, group_norm_act_workspace, launch_group_norm_act_fwd, launch_group_norm_act_bwd);
}

}  // namespace
}  // namespace fastcnn

int main(int argc, char** argv) { return cuda_emu::run_cases(argc, argv, fastcnn::run_op); }
