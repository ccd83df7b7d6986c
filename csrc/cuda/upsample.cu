// placeholder
#include "upsample.h"
namespace fastcnn {
int64_t upsample_workspace(const UpsampleShape&) { return 0; }
int launch_upsample_fwd(const UpsampleFwdParams&, float*, const CudaDevice&) { return 1; }
int launch_upsample_bwd(const UpsampleBwdParams&, float*, const CudaDevice&) { return 1; }
}
