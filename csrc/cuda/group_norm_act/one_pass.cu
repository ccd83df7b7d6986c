// The forward whose tiles a block holds: cuda/group_norm_act/one_pass.cuh.
#include "cuda/activation.cuh"
#include "cuda/group_norm_act/one_pass.cuh"
#include "cuda/norm_coefficients.cuh"

namespace fastcnn {
namespace {

// A thread's walk over the vectors of its tile: rows of `per_row` vectors side by side, which begin
// `apart` vectors from each other. No division a vector.
struct TileWalk {
  int vector, row, within;
  int64_t place;  // in vectors from the tile's first

  __device__ TileWalk(int lane, int lanes, int per_row, int64_t apart)
      : vector(lane),
        row(lane / per_row),
        within(lane - row * per_row),
        place(row * apart + within),
        step_(lanes),
        rows_(lanes / per_row),
        rest_(lanes - rows_ * per_row),
        per_row_(per_row),
        advance_(rows_ * apart + rest_),
        wrap_(apart - per_row) {}

  __device__ void next() {
    vector += step_;
    row += rows_;
    within += rest_;
    place += advance_;
    if (within >= per_row_) {
      within -= per_row_;
      ++row;
      place += wrap_;
    }
  }

 private:
  int step_, rows_, rest_, per_row_;
  int64_t advance_, wrap_;
};

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kOnePassThreads, 1)
    one_pass_norm_act_fwd_kernel(GroupNormActFwdParams p, OnePassPlan plan) {
  using Vector = Word<T, kVector>;
  constexpr int kCount = kSlots<kVector, kChannelsLast>;
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

  // A row is a pixel's channels of the tile (channels_last), or a channel, the next one behind it.
  const TileWalk first = channels_last ? TileWalk(lane, lanes, plan.per_pixel, p.shape.c / kVector)
                                       : TileWalk(lane, lanes, plan.per_plane, plan.per_plane);
  const auto offset = [&](const TileWalk& at) {
    return (channels_last ? at.place : static_cast<int64_t>(at.vector)) * kVector;
  };
  const auto fetch = [&](const TileWalk& at) { return load_word<kVector>(x + offset(at)); };
  const auto again = [&](const TileWalk& at) { return plan.held ? held[at.vector] : fetch(at); };

  float sum = 0;
  const auto take = [&](int i, const Vector& word) {
    if (plan.held) held[i] = word;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum += element<T, kVector>(word, v);
  };
  TileWalk at = first;
  while (at.vector + (kUnroll - 1) * lanes < vectors) {
    Vector words[kUnroll];
    const int i = at.vector;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, at.next()) words[u] = fetch(at);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) take(i + u * lanes, words[u]);
  }
  for (; at.vector < vectors; at.next()) take(at.vector, fetch(at));
  const float inverse = 1.f / static_cast<float>(per_group * p.shape.hw);
  float center = sum_of_tile(sum, lanes, sums) * inverse;
  if (center - center != 0)
    center = 0;  // the mean is to be the sum over the count: cuda/reduce.cuh

  float deviations = 0, squares = 0;
  for (at = first; at.vector < vectors; at.next()) {
    const Vector word = again(at);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float a = element<T, kVector>(word, v) - center;
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

  with_act<T>(p.act, [&](auto act) {
    for (at = first; at.vector < vectors; at.next()) {
      const Vector word = again(at);
      const int64_t channel = group * per_group + (channels_last ? at.within * kVector : at.row);
      float weight[kCount], bias[kCount], out[kVector];
      load_parameters(p.weight, channel, 1.f, weight);
      load_parameters(p.bias, channel, 0.f, bias);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const int s = kChannelsLast ? v : 0;
        out[v] = (element<T, kVector>(word, v) - mean) * (rstd * weight[s]) + bias[s];
      }
      act.fwd_each(out);
      store(y + offset(at), out);
    }
  });
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
