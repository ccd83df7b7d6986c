// Statistics of batch_norm_act beyond one batch: those of several ranks merged, and the running
// ones. A few numbers a channel, on one thread.
#include "batch_norm_act.h"
#include "cpu/dispatch.h"
#include "cpu/moments.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

void batch_norm_merge_cpu(const BatchNormMergeParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using S = Acc<decltype(element)>;
    const int64_t length = 2 * p.c + 1;  // of a rank's numbers
    const auto of_rank = [&](int64_t rank, int64_t i) {
      return static_cast<double>(static_cast<const S*>(p.gathered)[rank * length + i]);
    };
    double total = 0;
    for (int64_t rank = 0; rank < p.ranks; ++rank) total += of_rank(rank, 2 * p.c);
    *static_cast<S*>(p.total) = static_cast<S>(total);
    for (int64_t j = 0; j < p.c; ++j) {
      Moments<S> moments;
      for (int64_t rank = 0; rank < p.ranks; ++rank) {
        const double count = of_rank(rank, 2 * p.c);
        moments.merge(count, of_rank(rank, j), of_rank(rank, p.c + j) * count);
      }
      if (moments.count == 0) {  // as of an empty batch
        moments.count = moments.m2 = 1;
      }
      moments.write(static_cast<S*>(p.mean) + j, static_cast<S*>(p.var) + j);
    }
  });
}

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
        // Not kept + momentum * (next - kept): that rounds a small next in kept's ulps.
        const S momentum = static_cast<S>(p.momentum);
        store(value, splat((1 - momentum) * kept + momentum * next), 1);
      };
      S unbias = static_cast<S>(p.unbias);
      if (p.total != nullptr) {
        const S total = stat(p.total, 0);
        if (!(total >= 2)) return;  // there is no unbiased variance
        unbias = total / (total - 1);
      }
      for (int64_t j = 0; j < p.c; ++j) {
        blend(static_cast<T*>(p.running_mean) + j, stat(p.mean, j));
        blend(static_cast<T*>(p.running_var) + j, stat(p.var, j) * unbias);
      }
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
