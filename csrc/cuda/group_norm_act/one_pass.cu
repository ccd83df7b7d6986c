// The forward whose tiles a block holds: cuda/group_norm_act/one_pass.cuh.
#include "cuda/group_norm_act/one_pass.cuh"

namespace fastcnn {
namespace {

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kOnePassThreads, 1)
    one_pass_norm_act_fwd_kernel(GroupNormActFwdParams p, OnePassPlan plan) {
  using Vector = Pack<T, kVector>;
  const int lanes = plan.lanes, lane = threadIdx.x % lanes, own = threadIdx.x / lanes;
  const int64_t tile = blockIdx.x * static_cast<int64_t>(plan.per_block) + own;
  const bool active = tile < plan.tiles;
  const int vectors = active ? plan.vectors : 0;
  const int64_t per_group = p.shape.c / p.groups, group = tile % p.groups;
  const bool channels_last = is_channels_last<kVector, kChannelsLast>(p.shape);
  const int64_t begin = channels_last ? tile / p.groups * p.shape.hw * p.shape.c + group * per_group
                                      : tile * per_group * p.shape.hw;
  float* sums = shared_memory<float>();
  Vector* held =
      reinterpret_cast<Vector*>(sums + blockDim.x) + static_cast<int64_t>(own) * plan.vectors;
  const T* x = static_cast<const T*>(p.x) + begin;
  T* y = static_cast<T*>(p.y) + begin;

  const auto offset = [&](int i) {  // of the tile's vector i
    if (channels_last) {
      const int pixel = i / plan.per_pixel;
      return pixel * p.shape.c + (i - pixel * plan.per_pixel) * kVector;
    }
    return static_cast<int64_t>(i) * kVector;
  };
  const auto fetch = [&](int i) { return *reinterpret_cast<const Vector*>(x + offset(i)); };
  const auto again = [&](int i) { return plan.held ? held[i] : fetch(i); };

  float sum = 0;
  const auto take = [&](int i, const Vector& values) {
    if (plan.held) held[i] = values;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum += to_float(values.values[v]);
  };
  int i = lane;
  for (; i + (kUnroll - 1) * lanes < vectors; i += kUnroll * lanes) {
    Vector values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = fetch(i + u * lanes);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) take(i + u * lanes, values[u]);
  }
  for (; i < vectors; i += lanes) take(i, fetch(i));
  const float inverse = 1.f / static_cast<float>(per_group * p.shape.hw);
  float center = sum_of_tile(sum, lanes, sums) * inverse;
  if (center - center != 0)
    center = 0;  // the mean is to be the sum over the count: cuda/reduce.cuh

  float deviations = 0, squares = 0;
  for (i = lane; i < vectors; i += lanes) {
    const Vector values = again(i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float a = to_float(values.values[v]) - center;
      deviations += a;
      squares += a * a;
    }
  }
  deviations = sum_of_tile(deviations, lanes, sums);
  const float drift = deviations * inverse;
  const float mean = center + drift;
  const float var =
      variance_of(mean, (sum_of_tile(squares, lanes, sums) - deviations * drift) * inverse);
  const float rstd = rstd_of(var, p.eps);
  if (active && lane == 0) {
    static_cast<float*>(p.mean)[tile] = mean;
    static_cast<float*>(p.var)[tile] = var;
  }

  const float *weight = static_cast<const float*>(p.weight),
              *bias = static_cast<const float*>(p.bias);
  for (i = lane; i < vectors; i += lanes) {
    const Vector values = again(i);
    // Of the vector's first element, or of all (NCHW).
    const int64_t channel =
        group * per_group + (channels_last ? i % plan.per_pixel * kVector : i / plan.per_plane);
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int64_t c = channel + (kChannelsLast ? v : 0);
      const float scale = weight == nullptr ? rstd : rstd * weight[c];
      const float added = bias == nullptr ? 0.f : bias[c];
      out[v] = (to_float(values.values[v]) - mean) * scale + added;
    }
    act_fwd(p.act, out);
    store(y + offset(i), out);
  }
}

}  // namespace

cudaError_t launch_one_pass_norm_act_fwd(const GroupNormActFwdParams& p, const OnePassPlan& plan,
                                         const CudaDevice& device) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const int64_t blocks = (plan.tiles + plan.per_block - 1) / plan.per_block;
  if (!fits_a_grid(blocks)) return cudaErrorInvalidValue;
  return dispatch(p.dtype, plan.vector, p.shape.channels_last, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    const auto kernel = one_pass_norm_act_fwd_kernel<decltype(t), kVector, cl.value>;
    const int threads = plan.lanes * plan.per_block;
    const int64_t held =
        plan.held ? int64_t{plan.per_block} * plan.vectors * kVector * sizeof(t) : 0;
    const int bytes = static_cast<int>(threads * sizeof(float) + held);
    return launch(device, dim3(static_cast<unsigned>(blocks)), threads, bytes, kernel, p, plan);
  });
}

}  // namespace fastcnn
