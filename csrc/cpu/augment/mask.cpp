// augment_mask on the CPU: the nearest element of each mask where the image is sampled.
//
// Data movement: reads what of the masks is seen, writes y once. A task is a band of one mask's
// rows; coordinates are computed a vector at a time, as the images' are, and elements read one by
// one.
#include "augment.h"
#include "cpu/parallel.h"
#include "cpu/simd/gather.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kLane = kLanes<float>;

template <class T>
void row(const AugmentMaskParams& p, const AugmentSample& sample, const T* mask, int64_t y,
         T* out) {
  const float v = sample.v(static_cast<float>(y));
  const Ints lane = lane_numbers();
  const T fill = static_cast<T>(p.fill);
  const float width = static_cast<float>(p.w_in), height = static_cast<float>(p.h_in);
  for (int64_t i = 0; i < p.w; i += kLane) {
    const Floats u = sample.u(to_float(lane + static_cast<int32_t>(i)));
    // Halves go up, as in PyTorch's nearest-exact. Clamped before it becomes an integer: what is
    // outside stays outside.
    const Floats x = AugmentSample::clamp(sample.x(u, v) + 0.5f, -1.f, width);
    const Floats t = AugmentSample::clamp(sample.y(u, v) + 0.5f, -1.f, height);
    const Ints inside = (x >= 0.f) & (x < width) & (t >= 0.f) & (t < height);
    const Ints offset = inside & (to_int(t) * static_cast<int32_t>(p.w_in) + to_int(x));
    const int64_t count = min(kLane, p.w - i);
    for (int64_t k = 0; k < count; ++k) out[i + k] = inside[k] != 0 ? mask[offset[k]] : fill;
  }
}

template <class T>
void masks(const AugmentMaskParams& p) {
  const int64_t band = min(p.h, ceil_div(p.n * p.h, kTasks)), bands = ceil_div(p.h, band);
  parallel_for(p.n * bands, task_grain(p.n * bands, p.n * p.h * p.w), [&](int64_t task) {
    const int64_t i = task / bands, first = task % bands * band;
    const T* mask = static_cast<const T*>(p.masks) + i * p.h_in * p.w_in;
    for (int64_t y = first; y < min(p.h, first + band); ++y) {
      row(p, p.samples[i], mask, y, static_cast<T*>(p.y) + (i * p.h + y) * p.w);
    }
  });
}

}  // namespace

void augment_mask_cpu(const AugmentMaskParams& p) {
  p.wide ? masks<int64_t>(p) : masks<uint8_t>(p);
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
