#include "group_norm_act.h"
namespace fastcnn {
int64_t group_norm_act_workspace(const ImageShape&, DType, const CudaDevice&) { return 0; }
int launch_group_norm_act_fwd(const GroupNormActFwdParams&, float*, const CudaDevice&) { return 1; }
int launch_group_norm_act_bwd(const GroupNormActBwdParams&, float*, const CudaDevice&) { return 1; }
}
