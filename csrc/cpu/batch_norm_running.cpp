// The running statistics of batch_norm_act: a few numbers a channel, on one thread.
#include "batch_norm_act.h"
#include "common/dispatch.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

void batch_norm_running_cpu(const BatchNormRunningParams& p) {
  dispatch_dtype(p.dtype, [&](auto running) {
    dispatch_bool(p.stats_dtype == DType::kFloat64, [&](auto wide) {
      using T = decltype(running);
      using S = Acc<T>;
      const auto stat = [&](const void* values, int64_t j) {
        if constexpr (decltype(wide)::value) {
          return static_cast<S>(static_cast<const double*>(values)[j]);
        } else {
          return static_cast<S>(static_cast<const float*>(values)[j]);
        }
      };
      const auto blend = [&](T* value, S next) {
        const S kept = load(value, 1)[0];
        store(value, splat(kept + static_cast<S>(p.momentum) * (next - kept)), 1);
      };
      for (int64_t j = 0; j < p.c; ++j) {
        blend(static_cast<T*>(p.running_mean) + j, stat(p.mean, j));
        blend(static_cast<T*>(p.running_var) + j, stat(p.var, j) * static_cast<S>(p.unbias));
      }
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
