// upsample on CUDA.
//
// A call first writes the tables of both axes (common/resample.h) to a workspace: 12 bytes for
// each row and column, so that no inner loop has coordinate arithmetic. Then, T being one pass:
//   forward   reads x once and writes y. A thread owns a strip: kVector neighbouring outputs (of a
//             row in NCHW, of a pixel's channels in channels_last) of a band of rows. It walks
//             down, keeps the two input rows between which it is, blended along the row already,
//             in registers, and loads the next one when it gets there.
//   backward  reads dy once and writes dx. A strip is an input column (NCHW; of kVector channels in
//             channels_last) of a band of input rows. Each dy row is gathered along the row, once,
//             and its two shares go to the input row at hand and to the one that follows: a sum in
//             a fixed order, without atomics.
// Neighbouring threads share input columns, and bands one row: those come from the L1 or L2 cache.
#include "cuda/columns.cuh"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "upsample.h"

namespace fastcnn {
namespace {

constexpr int kMaxBand = 32, kMinBand = 4;  // rows; a band's first row is loaded once more
constexpr int kNear = 4;                    // outputs that an input column is in when doubled

struct Tables {
  Source<float>*rows, *columns;       // [rows.out], [columns.out]
  int32_t *row_first, *column_first;  // [rows.in + 1], [columns.in + 1]: Sampler::first
};

Tables tables_in(float* workspace, const UpsampleShape& s) {
  Tables t{};
  t.rows = reinterpret_cast<Source<float>*>(workspace);
  t.columns = t.rows + s.rows.out;
  t.row_first = reinterpret_cast<int32_t*>(t.columns + s.columns.out);
  t.column_first = t.row_first + s.rows.in + 1;
  return t;
}

__device__ void write_axis(const Axis& axis, Sampling sampling, Source<float>* sources,
                           int32_t* first, bool backward) {
  const Sampler<float> sampler(axis, sampling);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < sampler.out) sources[i] = sampler.at(static_cast<int32_t>(i));
  if (backward && i <= sampler.in) first[i] = sampler.first(static_cast<int32_t>(i));
}

// blockIdx.y: 0 for rows, 1 for columns.
__global__ void __launch_bounds__(kThreads)
    upsample_tables_kernel(UpsampleShape s, Tables t, bool backward) {
  if (blockIdx.y == 0) {
    write_axis(s.rows, s.sampling, t.rows, t.row_first, backward);
  } else {
    write_axis(s.columns, s.sampling, t.columns, t.column_first, backward);
  }
}

// How a call is cut into strips, the fastest index first: vectors of a pixel's channels
// (channels_last), columns (NCHW: vectors of them), bands of rows, planes.
struct StripPlan {
  int vector;
  int64_t rows, band, strips;
  Divisor vectors, columns, bands, channels;
};

struct Strip {
  int64_t image, plane, channel, column, first_row, last_row;

  // channel: of an image's planes in NCHW, the first of the vector in channels_last.
  __device__ Strip(const StripPlan& plan, int vector, bool channels_last) {
    int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    int64_t rest = plan.vectors.divide(at);
    channel = at * vector;
    at = plan.columns.divide(rest);
    column = rest * (channels_last ? 1 : vector);
    image = plane = plan.bands.divide(at);
    first_row = at * plan.band;
    last_row = least(plan.rows, first_row + plan.band);
    if (!channels_last) {
      channel = plane;
      image = plan.channels.divide(channel);
    }
  }
};

// Element 0 of a strip's plane, on the larger and the smaller side.
__device__ int64_t large_plane(const UpsampleShape& s, const Strip& strip, bool channels_last) {
  return strip.image * s.image + strip.channel * (channels_last ? 1 : s.rows.out * s.columns.out);
}

__device__ int64_t small_plane(const UpsampleShape& s, const Strip& strip, bool channels_last) {
  const int64_t hw = s.rows.in * s.columns.in;
  return channels_last ? strip.image * hw * s.c + strip.channel : strip.plane * hw;
}

// ---- forward -----------------------------------------------------------------------------------

// low * (1 - weight) + high * weight, or low alone: 0 * inf is not 0.
__device__ float blend(float low, float high, float weight, bool linear) {
  return linear ? low * (1.f - weight) + high * weight : low;
}

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    upsample_fwd_kernel(UpsampleFwdParams p, StripPlan plan, Tables tables) {
  if (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x >= plan.strips) return;
  constexpr int kSources = kChannelsLast ? 1 : kVector;
  const UpsampleShape& s = p.shape;
  const bool rows_linear = Sampler<float>(s.rows, s.sampling).linear;
  const bool columns_linear = Sampler<float>(s.columns, s.sampling).linear;
  const bool channels_last = kVector == 1 ? s.channels_last : kChannelsLast;
  const Strip strip(plan, kVector, channels_last);
  const int64_t k = channels_last ? s.c : 1;
  const T* x = static_cast<const T*>(p.x) + small_plane(s, strip, channels_last);
  T* y = static_cast<T*>(p.y) + large_plane(s, strip, channels_last) + strip.column * s.pixel;
  y += p.x_at * (channels_last ? 1 : s.rows.out * s.columns.out);
  Source<float> sources[kSources];
#pragma unroll
  for (int v = 0; v < kSources; ++v) sources[v] = tables.columns[strip.column + v];

  const auto fetch = [&](int64_t i, float(&out)[kVector]) {
    const T* row = x + i * s.columns.in * k;
    float low[kVector], high[kVector] = {};
    if constexpr (kChannelsLast) {
      load(row + sources[0].index * k, low);
      if (columns_linear) load(row + sources[0].next * k, high);
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        low[v] = to_float(row[sources[v].index * k]);
        if (columns_linear) high[v] = to_float(row[sources[v].next * k]);
      }
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      out[v] = blend(low[v], high[v], sources[kChannelsLast ? 0 : v].weight, columns_linear);
    }
  };

  float low[kVector] = {}, high[kVector] = {};
  int32_t low_row = -1, high_row = -1;
  for (int64_t o = strip.first_row; o < strip.last_row; ++o) {
    const Source<float> source = tables.rows[o];
    if (source.index != low_row) {
      if (source.index == high_row) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) low[v] = high[v];
      } else {
        fetch(source.index, low);
      }
      low_row = source.index;
    }
    if (rows_linear && source.next != high_row) {
      if (source.next == low_row) {  // the last row
#pragma unroll
        for (int v = 0; v < kVector; ++v) high[v] = low[v];
      } else {
        fetch(source.next, high);
      }
      high_row = source.next;
    }
    float out[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = blend(low[v], high[v], source.weight, rows_linear);
    store(y + o * s.columns.out * s.pixel, out);
  }
}

// skip's channels, to theirs in y: `runs` times `run` elements, y's beginning `step` apart.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    upsample_skip_kernel(const T* skip, T* y, Divisor run, int64_t step, int64_t count) {
  using Vector = std::conditional_t<kVector == 1, T, uint4>;
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads * kUnroll) + threadIdx.x;
  const auto load_at = [&](int64_t at) { return *reinterpret_cast<const Vector*>(skip + at); };
  const auto store_at = [&](int64_t at, Vector vector) {
    int64_t within = at;
    const int64_t offset = run.divide(within) * step + within;
    __stcg(reinterpret_cast<Vector*>(y + offset), vector);
  };
  if ((first + (kUnroll - 1) * kThreads) * kVector < count) {
    Vector vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_at((first + u * kThreads) * kVector);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store_at((first + u * kThreads) * kVector, vectors[u]);
    return;
  }
  for (int64_t at = first * kVector; at < count; at += kThreads * kVector)
    store_at(at, load_at(at));
}

// ---- backward ----------------------------------------------------------------------------------

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    upsample_bwd_kernel(UpsampleBwdParams p, StripPlan plan, Tables tables) {
  if (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x >= plan.strips) return;
  const UpsampleShape& s = p.shape;
  const int row_reach = Sampler<float>(s.rows, s.sampling).reach();
  const int column_reach = Sampler<float>(s.columns, s.sampling).reach();
  const bool channels_last = kVector == 1 ? s.channels_last : kChannelsLast;
  const Strip strip(plan, kVector, channels_last);
  const int64_t k = channels_last ? s.c : 1;
  const int32_t j = static_cast<int32_t>(strip.column);
  const int32_t begin = tables.column_first[j < column_reach ? 0 : j - column_reach];
  const int32_t length = tables.column_first[j + 1] - begin;
  const T* dy = static_cast<const T*>(p.dy) + large_plane(s, strip, channels_last);
  T* dx = static_cast<T*>(p.dx) + small_plane(s, strip, channels_last) + strip.column * k;
  dy += begin * s.pixel;
  float shares[kNear];
#pragma unroll
  for (int t = 0; t < kNear; ++t) {
    shares[t] = t < length ? share_of(tables.columns[begin + t], j) : 0.f;
  }

  // One dy row, gathered for this column.
  const auto gather = [&](int64_t o, float(&sum)[kVector]) {
    const T* row = dy + o * s.columns.out * s.pixel;
    float values[kNear][kVector];
    // The same place again behind the end: all loads are in flight together, without branches.
#pragma unroll
    for (int t = 0; t < kNear; ++t) load(row + min(t, length - 1) * s.pixel, values[t]);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sum[v] = shares[0] * values[0][v];
#pragma unroll
      for (int t = 1; t < kNear; ++t) sum[v] += t < length ? shares[t] * values[t][v] : 0.f;
    }
    for (int32_t t = kNear; t < length; ++t) {
      const float share = share_of(tables.columns[begin + t], j);
      load(row + t * s.pixel, values[0]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += share * values[0][v];
    }
  };

  float next[kVector] = {};  // what rows so far give to the row that follows
  const int64_t before = strip.first_row < row_reach ? 0 : strip.first_row - row_reach;
  for (int64_t i = before; i < strip.last_row; ++i) {
    const int32_t first = tables.row_first[i], last = length > 0 ? tables.row_first[i + 1] : first;
    float sum[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sum[v] = next[v];
      next[v] = 0;
    }
    for (int32_t o = first; o < last; ++o) {
      const Source<float> source = tables.rows[o];
      const float share = share_of(source, static_cast<int32_t>(i));
      const float rest = source.next == source.index ? 0.f : source.weight;
      float gathered[kVector];
      gather(o, gathered);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        sum[v] += share * gathered[v];
        if (row_reach > 0) next[v] += rest * gathered[v];
      }
    }
    if (i >= strip.first_row) store(dx + i * s.columns.in * k, sum);
  }
}

// ---- launching ---------------------------------------------------------------------------------

StripPlan plan_strips(const UpsampleShape& s, int vector, int64_t columns, int64_t rows,
                      const CudaDevice& device) {
  StripPlan plan{};
  plan.vector = vector;
  plan.vectors = Divisor(s.channels_last ? s.c / vector : 1);
  plan.columns = Divisor(s.channels_last ? columns : columns / vector);
  plan.channels = Divisor(s.c);
  plan.rows = rows;
  const int64_t planes = s.channels_last ? s.n : s.n * s.c;
  const int64_t of_a_row = planes * plan.vectors.value * plan.columns.value;
  // Twice the threads that the GPU runs at a time: a short last wave costs less.
  const int64_t wanted = 2 * 2048 * static_cast<int64_t>(device.sm_count);
  plan.band = kMaxBand;
  while (plan.band > kMinBand && of_a_row * (rows / plan.band) < wanted) plan.band /= 2;
  plan.bands = Divisor((rows + plan.band - 1) / plan.band);
  plan.strips = of_a_row * plan.bands.value;
  return plan;
}

dim3 grid_for(int64_t count, int64_t of_a_block) {
  return dim3(static_cast<unsigned>((count + of_a_block - 1) / of_a_block));
}

int vector_of(DType dtype) { return 16 / element_bytes(dtype); }

cudaError_t write_tables(const UpsampleShape& s, const Tables& tables, bool backward,
                         const CudaDevice& device) {
  int64_t longest = most(s.rows.out, s.columns.out);
  if (backward) longest = most(longest, most(s.rows.in, s.columns.in) + 1);
  dim3 grid = grid_for(longest, kThreads);
  grid.y = 2;
  return launch(device, grid, kThreads, 0, upsample_tables_kernel, s, tables, backward);
}

cudaError_t copy_skip(const UpsampleFwdParams& p, const CudaDevice& device) {
  const UpsampleShape& s = p.shape;
  const int64_t hw = s.rows.out * s.columns.out;
  const int64_t channel = s.channels_last ? 1 : hw;
  const int64_t run = p.c_skip * channel;
  const int64_t step = s.channels_last ? s.pixel : s.image;
  const int64_t count = s.n * p.c_skip * hw;
  const int wide = vector_of(p.dtype);
  const bool whole = run % wide == 0 && step % wide == 0 && aligned({p.skip, p.y});
  return dispatch(p.dtype, whole ? wide : 1, false, [&](auto t, auto vector, auto) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    return launch(device, grid_for(count, kThreads * kUnroll * kVector), kThreads, 0,
                  upsample_skip_kernel<T, kVector>, static_cast<const T*>(p.skip),
                  static_cast<T*>(p.y) + p.skip_at * channel, Divisor(run), step, count);
  });
}

}  // namespace

int64_t upsample_workspace(const UpsampleShape& s) {
  return 3 * (s.rows.out + s.columns.out) + s.rows.in + 1 + s.columns.in + 1;
}

int launch_upsample_fwd(const UpsampleFwdParams& p, float* workspace, const CudaDevice& device) {
  if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
  const UpsampleShape& s = p.shape;
  if (p.c_skip > 0) {
    const cudaError_t error = copy_skip(p, device);
    if (error != cudaSuccess || s.c == 0) return error;
  }
  const Tables tables = tables_in(workspace, s);
  const cudaError_t error = write_tables(s, tables, false, device);
  if (error != cudaSuccess) return error;
  const int wide = vector_of(p.dtype);
  const bool whole = s.channels_last
                         ? s.c % wide == 0 && p.c_skip % wide == 0 && aligned({p.x, p.y})
                         : s.columns.out % wide == 0 && aligned({p.y});
  const StripPlan plan = plan_strips(s, whole ? wide : 1, s.columns.out, s.rows.out, device);
  return dispatch(p.dtype, plan.vector, s.channels_last, [&](auto t, auto vector, auto cl) {
    return launch(device, grid_for(plan.strips, kThreads), kThreads, 0,
                  upsample_fwd_kernel<decltype(t), decltype(vector)::value, cl.value>, p, plan,
                  tables);
  });
}

int launch_upsample_bwd(const UpsampleBwdParams& p, float* workspace, const CudaDevice& device) {
  if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
  const UpsampleShape& s = p.shape;
  const Tables tables = tables_in(workspace, s);
  const cudaError_t error = write_tables(s, tables, true, device);
  if (error != cudaSuccess) return error;
  // NCHW: a vector of input columns would read dy at a stride of as many outputs.
  const int wide = vector_of(p.dtype);
  const bool whole = s.channels_last && s.c % wide == 0 && s.pixel % wide == 0 &&
                     s.image % wide == 0 && aligned({p.dy, p.dx});
  const StripPlan plan = plan_strips(s, whole ? wide : 1, s.columns.in, s.rows.in, device);
  return dispatch(p.dtype, plan.vector, s.channels_last, [&](auto t, auto vector, auto cl) {
    constexpr int kVector = decltype(vector)::value;
    if constexpr (kVector > 1 && !cl.value) {
      return cudaErrorInvalidValue;
    } else {
      return launch(device, grid_for(plan.strips, kThreads), kThreads, 0,
                    upsample_bwd_kernel<decltype(t), kVector, cl.value>, p, plan, tables);
    }
  });
}

}  // namespace fastcnn
