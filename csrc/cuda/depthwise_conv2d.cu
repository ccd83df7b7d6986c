// depthwise_conv2d on CUDA.
//
// A call first writes the weights as [taps, c] to a workspace, so that a vector of channels reads
// its own as vectors. Then, T being one pass over the image:
//   forward, dx   read T, write T. A thread owns a strip: kStrip neighbouring columns of a row, of
//   a
//                 vector of channels (16 bytes). For kernels of 3, 5 and 7 with stride 1 and 2 each
//                 vector of x that it loads serves the columns that it is a part of; any other
//                 window, and NCHW, take one column a thread. dx of stride 1 is a forward with the
//                 flipped kernel; of others each pixel gathers from dy what it was a part of.
//   dweight       a block has some vectors of channels, a part of dy's pixels (a split) and a row
//   of
//                 the kernel; its threads' sums are merged in shared memory, splits by a second
//                 kernel, both in a fixed order. dy is read kernel_h times, x as often.
// Rows and columns that neighbouring threads share come from the L1 or L2 cache.
#include "cuda/activation.cuh"
#include "cuda/columns.cuh"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "depthwise_conv2d.h"

namespace fastcnn {
namespace {

constexpr int kStrip = 4;            // columns that a thread makes
constexpr int64_t kMostSplits = 64;  // of dweight
constexpr int64_t kSplitPixels = 512;

__host__ __device__ int64_t taps_of(const DepthwiseShape& s) {
  return s.rows.kernel * s.columns.kernel;
}

dim3 grid_for(int64_t count) {
  return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
}

__device__ int64_t thread_index() {
  return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
}

// weight [c, taps] to [taps, c]; flipped: the taps from the last to the first.
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_pack_kernel(const float* weight, float* packed, int64_t c, Divisor taps,
                                 bool flipped) {
  const int64_t at = thread_index();
  if (at >= c * taps.value) return;
  int64_t tap = at;
  const int64_t channel = taps.divide(tap);
  packed[(flipped ? taps.value - 1 - tap : tap) * c + channel] = weight[at];
}

// What a pass makes, and of what. of_input: the result is the convolution's input.
struct Pass {
  int64_t n, c;
  WindowAxis rows, columns;
  bool of_input, channels_last;
  const void* from;
  const float* weight;  // [taps, c]
  const float* bias;    // [c]; null: 0
  const void* dy;       // of the result's sizes, or null
  void* to;
  Act act;

  FASTCNN_HOST_DEVICE int64_t height() const { return of_input ? rows.size : rows.size_out; }
  FASTCNN_HOST_DEVICE int64_t width() const { return of_input ? columns.size : columns.size_out; }
  FASTCNN_HOST_DEVICE int64_t read_height() const { return of_input ? rows.size_out : rows.size; }
  FASTCNN_HOST_DEVICE int64_t read_width() const {
    return of_input ? columns.size_out : columns.size;
  }
};

// How threads are dealt out, the fastest index first: vectors of channels, strips of a row, rows,
// images; in NCHW strips, rows, channels, images.
struct ThreadPlan {
  int64_t threads;
  Divisor vectors, strips, rows, channels, row_stride, column_stride;
};

struct Place {
  int64_t image, channel, row, column;

  __device__ Place(const ThreadPlan& plan, bool channels_last, int vector, int strip) {
    int64_t at = thread_index();
    if (channels_last) {
      const int64_t rest = plan.vectors.divide(at);
      channel = at * vector;
      at = rest;
    }
    int64_t rest = plan.strips.divide(at);
    column = at * strip;
    image = plan.rows.divide(rest);
    row = rest;
    if (!channels_last) {
      int64_t planes = image;
      image = plan.channels.divide(planes);
      channel = planes;
    }
  }
};

// The sums through the activation, to `to` + at.
template <class T, int kVector>
__device__ void finish(const Pass& p, float (&z)[kVector], int64_t at) {
  T* y = static_cast<T*>(p.to) + at;
  with_act<T>(p.act, [&](auto act) {
    if (p.dy == nullptr) {
      act.fwd_each(z);
      store(y, z);
    } else {
      float dy[kVector];
      load(static_cast<const T*>(p.dy) + at, dy);
      act.bwd_each(dy, z);
      store(y, dy);
    }
  });
}

template <int kVector>
__device__ void load_weight(const float* p, float (&out)[kVector]) {
  constexpr int kWide = kVector < 4 ? kVector : 4;
#pragma unroll
  for (int v = 0; v < kVector; v += kWide) {
    float part[kWide];
    load(p + v, part);
#pragma unroll
    for (int i = 0; i < kWide; ++i) out[v + i] = part[i];
  }
}

// channels_last, a known kernel width and stride, no dilation.
template <class T, int kVector, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads) depthwise_conv2d_strip_kernel(Pass p, ThreadPlan plan) {
  if (thread_index() >= plan.threads) return;
  const Place place(plan, true, kVector, kStrip);
  const int64_t width = p.read_width(), c = p.c;
  float sums[kStrip][kVector];
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[q][v] = 0;
    if (p.bias != nullptr) load_weight(p.bias + place.channel, sums[q]);
  }
  const int64_t first = place.column * kStride - p.columns.padding;
  for (int64_t a = 0; a < p.rows.kernel; ++a) {
    const int64_t row = place.row * p.rows.stride + a * p.rows.dilation - p.rows.padding;
    if (row < 0 || row >= p.rows.size) continue;
    float weights[kKernel][kVector];
#pragma unroll
    for (int b = 0; b < kKernel; ++b) {
      load_weight(p.weight + (a * kKernel + b) * c + place.channel, weights[b]);
    }
    const T* x = static_cast<const T*>(p.from) +
                 ((place.image * p.rows.size + row) * width + first) * c + place.channel;
#pragma unroll
    for (int j = 0; j < (kStrip - 1) * kStride + kKernel; ++j) {
      if (first + j < 0 || first + j >= width) continue;
      float values[kVector];
      load(x + j * c, values);
#pragma unroll
      for (int b = 0; b < kKernel; ++b) {
        if (j < b || (j - b) % kStride != 0 || (j - b) / kStride >= kStrip) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[(j - b) / kStride][v] += values[v] * weights[b][v];
      }
    }
  }
  const int64_t at =
      ((place.image * p.rows.size_out + place.row) * p.columns.size_out + place.column) * c +
      place.channel;
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    if (place.column + q < p.columns.size_out) finish<T>(p, sums[q], at + q * c);
  }
}

// The place in one direction that tap k of a result's place reads, or -1.
__device__ int64_t read_place(const WindowAxis& axis, const Divisor& stride, int64_t at, int64_t k,
                              bool of_input) {
  if (!of_input) {
    const int64_t place = at * axis.stride + k * axis.dilation - axis.padding;
    return place < axis.size ? place : -1;  // negative stays so
  }
  int64_t rest = at + axis.padding - k * axis.dilation;
  if (rest < 0) return -1;
  const int64_t place = stride.divide(rest);
  return rest == 0 && place < axis.size_out ? place : -1;
}

// Any window; one column a thread.
template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) depthwise_conv2d_pixel_kernel(Pass p, ThreadPlan plan) {
  if (thread_index() >= plan.threads) return;
  const bool channels_last = kVector == 1 ? p.channels_last : kChannelsLast;
  const Place place(plan, channels_last, kVector, 1);
  const int64_t width = p.read_width(), step = channels_last ? p.c : 1;
  const int64_t plane = p.read_height() * width, result = p.height() * p.width();
  const T* x =
      static_cast<const T*>(p.from) + (channels_last ? place.image * plane * p.c + place.channel
                                                     : (place.image * p.c + place.channel) * plane);
  float sums[kVector] = {};
  if (p.bias != nullptr) load_weight(p.bias + place.channel, sums);
  for (int64_t a = 0; a < p.rows.kernel; ++a) {
    const int64_t row = read_place(p.rows, plan.row_stride, place.row, a, p.of_input);
    if (row < 0) continue;
    for (int64_t b = 0; b < p.columns.kernel; ++b) {
      const int64_t column = read_place(p.columns, plan.column_stride, place.column, b, p.of_input);
      if (column < 0) continue;
      float weight[kVector], values[kVector];
      load_weight(p.weight + (a * p.columns.kernel + b) * p.c + place.channel, weight);
      load(x + (row * width + column) * step, values);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[v] += values[v] * weight[v];
    }
  }
  const int64_t pixel = place.row * p.width() + place.column;
  finish<T>(p, sums,
            channels_last ? (place.image * result + pixel) * p.c + place.channel
                          : (place.image * p.c + place.channel) * result + pixel);
}

// ---- the weight's gradient ---------------------------------------------------------------------

struct SplitPlan {
  int columns, lanes, vector;  // of a block
  int64_t blocks, splits, pixels, per_split;
  Divisor widths, heights, kernel;
};

struct AddFloat {
  __device__ void operator()(float& a, float b) const { a += b; }
};

// partial [splits, taps + 1, c]: the sums of taps blockIdx.z * kTaps and following, all of one row
// of the kernel; behind all taps, of blocks 0, those of dy.
template <class T, int kVector, int kTaps>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_bwd_weight_kernel(DepthwiseConv2dBwdWeightParams p, SplitPlan plan,
                                       float* partial) {
  const DepthwiseShape& s = p.shape;
  const int column = threadIdx.x % plan.columns, lane = threadIdx.x / plan.columns;
  const int64_t channel = (blockIdx.x * static_cast<int64_t>(plan.columns) + column) * kVector;
  const bool active = channel < s.c;
  const int64_t tap = static_cast<int64_t>(blockIdx.z) * kTaps;
  int64_t b = tap;
  const int64_t a = plan.kernel.divide(b);
  const int64_t step = s.channels_last ? s.c : 1;
  const int64_t x_plane = s.rows.size * s.columns.size;
  const int64_t dy_plane = s.rows.size_out * s.columns.size_out;
  float sums[kTaps + 1][kVector] = {};
  const int64_t begin = blockIdx.y * plan.per_split;
  const int64_t limit = begin + plan.per_split;
  const int64_t end = !active ? begin : limit < plan.pixels ? limit : plan.pixels;
  for (int64_t at = begin + lane; at < end; at += plan.lanes) {
    int64_t q = at;
    int64_t i = plan.widths.divide(q);
    const int64_t image = plan.heights.divide(i);
    const int64_t plane = s.channels_last ? image * s.c : image * s.c + channel;
    const int64_t offset = s.channels_last ? channel : 0;
    float dy[kVector];
    load(static_cast<const T*>(p.dy) + plane * dy_plane + (i * s.columns.size_out + q) * step +
             offset,
         dy);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[kTaps][v] += dy[v];
    const int64_t row = i * s.rows.stride + a * s.rows.dilation - s.rows.padding;
    if (row < 0 || row >= s.rows.size) continue;
    const int64_t first = q * s.columns.stride + b * s.columns.dilation - s.columns.padding;
    const T* x =
        static_cast<const T*>(p.x) + plane * x_plane + row * s.columns.size * step + offset;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int64_t place = first + k * s.columns.dilation;
      if (place < 0 || place >= s.columns.size) continue;
      float values[kVector];
      load(x + place * step, values);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[k][v] += dy[v] * values[v];
    }
  }
  float* to = partial + blockIdx.y * (taps_of(s) + 1) * s.c + channel;
#pragma unroll
  for (int k = 0; k <= kTaps; ++k) {
    merge_lanes(sums[k], plan.columns, plan.lanes, AddFloat{});
    __syncthreads();  // the next values go where these are read
    if (lane == 0 && active && (k < kTaps || blockIdx.z == 0)) {
      const int64_t row = k < kTaps ? tap + k : taps_of(s);
#pragma unroll
      for (int v = 0; v < kVector; ++v) to[row * s.c + v] = sums[k][v];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_finalize_kernel(const float* partial, int64_t splits, Divisor c, int64_t taps,
                                     float* dweight, float* dbias) {
  const int64_t at = thread_index(), count = (taps + 1) * c.value;
  if (at >= count) return;
  int64_t channel = at;
  const int64_t tap = c.divide(channel);
  float total = 0;
  for (int64_t split = 0; split < splits; ++split) total += partial[split * count + at];
  if (tap < taps) {
    dweight[channel * taps + tap] = total;
  } else {
    dbias[channel] = total;
  }
}

// ---- launching ---------------------------------------------------------------------------------

int vector_of(DType dtype) { return 16 / element_bytes(dtype); }

cudaError_t pack(const void* weight, float* packed, const DepthwiseShape& s, bool flipped,
                 const CudaDevice& device) {
  const int64_t taps = taps_of(s);
  if (!fits_a_grid(s.c * taps / kThreads + 1)) return cudaErrorInvalidValue;
  return launch(device, grid_for(s.c * taps), kThreads, 0, depthwise_conv2d_pack_kernel,
                static_cast<const float*>(weight), packed, s.c, Divisor(taps), flipped);
}

ThreadPlan plan_threads(const Pass& p, int vector, int strip) {
  ThreadPlan plan{};
  plan.vectors = Divisor(p.channels_last ? p.c / vector : 1);
  plan.strips = Divisor((p.width() + strip - 1) / strip);
  plan.rows = Divisor(p.height());
  plan.channels = Divisor(p.c);
  plan.row_stride = Divisor(p.rows.stride);
  plan.column_stride = Divisor(p.columns.stride);
  plan.threads = p.n * p.c / vector * plan.strips.value * p.height();
  return plan;
}

template <class T, int kVector>
cudaError_t launch_strips(const Pass& p, const CudaDevice& device) {
  const ThreadPlan plan = plan_threads(p, kVector, kStrip);
  if (!fits_a_grid(plan.threads / kThreads + 1)) return cudaErrorInvalidValue;
  const auto of_kernel = [&](auto kernel) {
    constexpr int kKernel = decltype(kernel)::value;
    return p.columns.stride == 1
               ? launch(device, grid_for(plan.threads), kThreads, 0,
                        depthwise_conv2d_strip_kernel<T, kVector, kKernel, 1>, p, plan)
               : launch(device, grid_for(plan.threads), kThreads, 0,
                        depthwise_conv2d_strip_kernel<T, kVector, kKernel, 2>, p, plan);
  };
  if (p.columns.kernel == 3) return of_kernel(Constant<3>{});
  if (p.columns.kernel == 5) return of_kernel(Constant<5>{});
  return of_kernel(Constant<7>{});
}

cudaError_t launch_pass(DType dtype, const Pass& p, const CudaDevice& device) {
  const int wide = vector_of(dtype);
  const bool whole =
      p.channels_last && p.c % wide == 0 && aligned({p.from, p.to, p.dy, p.weight, p.bias});
  const WindowAxis& q = p.columns;
  const bool known = (q.kernel == 3 || q.kernel == 5 || q.kernel == 7) && q.stride <= 2 &&
                     q.dilation == 1 && !p.of_input;
  return dispatch(dtype, whole ? wide : 1, p.channels_last, [&](auto t, auto vector, auto cl) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value;
    if constexpr (kVector > 1 && !cl.value) {
      return cudaErrorInvalidValue;
    } else {
      if constexpr (kVector > 1) {
        if (known) return launch_strips<T, kVector>(p, device);
      }
      const ThreadPlan plan = plan_threads(p, kVector, 1);
      if (!fits_a_grid(plan.threads / kThreads + 1)) return cudaErrorInvalidValue;
      return launch(device, grid_for(plan.threads), kThreads, 0,
                    depthwise_conv2d_pixel_kernel<T, kVector, cl.value>, p, plan);
    }
  });
}

// The window that reads dy to make dx where both strides are 1.
WindowAxis flipped(const WindowAxis& axis) {
  const int64_t reach = axis.dilation * (axis.kernel - 1);
  return {axis.size_out, axis.size, axis.kernel, 1, reach - axis.padding, axis.dilation};
}

int64_t splits_of(const DepthwiseShape& s) {
  const int64_t pixels = s.n * s.rows.size_out * s.columns.size_out;
  const int64_t splits = (pixels + kSplitPixels - 1) / kSplitPixels;
  return splits < kMostSplits ? splits : kMostSplits;
}

}  // namespace

int64_t depthwise_conv2d_workspace(const DepthwiseShape& s) { return taps_of(s) * s.c; }

int64_t depthwise_conv2d_bwd_weight_workspace(const DepthwiseShape& s) {
  return splits_of(s) * (taps_of(s) + 1) * s.c;
}

int launch_depthwise_conv2d_fwd(const DepthwiseConv2dFwdParams& p, float* workspace,
                                const CudaDevice& device) {
  if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
  const DepthwiseShape& s = p.shape;
  const cudaError_t error = pack(p.weight, workspace, s, false, device);
  if (error != cudaSuccess) return error;
  const Pass pass{s.n,       s.c,       s.rows,
                  s.columns, false,     s.channels_last,
                  p.x,       workspace, static_cast<const float*>(p.bias),
                  p.dy,      p.y,       p.act};
  return launch_pass(p.dtype, pass, device);
}

int launch_depthwise_conv2d_bwd_data(const DepthwiseConv2dBwdDataParams& p, float* workspace,
                                     const CudaDevice& device) {
  if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
  const DepthwiseShape& s = p.shape;
  const bool steps = s.rows.stride > 1 || s.columns.stride > 1;
  const cudaError_t error = pack(p.weight, workspace, s, !steps, device);
  if (error != cudaSuccess) return error;
  const Pass pass{s.n,
                  s.c,
                  steps ? s.rows : flipped(s.rows),
                  steps ? s.columns : flipped(s.columns),
                  steps,
                  s.channels_last,
                  p.dy,
                  workspace,
                  nullptr,
                  nullptr,
                  p.dx,
                  Act::kNone};
  return launch_pass(p.dtype, pass, device);
}

int launch_depthwise_conv2d_bwd_weight(const DepthwiseConv2dBwdWeightParams& p, float* workspace,
                                       const CudaDevice& device) {
  if (p.dtype == DType::kFloat64) return cudaErrorInvalidValue;
  const DepthwiseShape& s = p.shape;
  const int64_t taps = taps_of(s), k = s.columns.kernel;
  const int wide = vector_of(p.dtype);
  const bool whole = s.channels_last && s.c % wide == 0 && aligned({p.dy, p.x});
  SplitPlan plan{};
  plan.vector = whole ? wide : 1;
  plan.columns = 1;
  while (s.channels_last && plan.columns < 8 && 2 * plan.columns * plan.vector <= s.c) {
    plan.columns *= 2;
  }
  plan.lanes = kThreads / plan.columns;
  plan.blocks = (s.c + plan.columns * plan.vector - 1) / (plan.columns * plan.vector);
  plan.pixels = s.n * s.rows.size_out * s.columns.size_out;
  plan.splits = splits_of(s);
  plan.per_split = (plan.pixels + plan.splits - 1) / plan.splits;
  plan.widths = Divisor(s.columns.size_out);
  plan.heights = Divisor(s.rows.size_out);
  plan.kernel = Divisor(k);
  const auto run = [&](auto t, auto vector, auto of_block) {
    using T = decltype(t);
    constexpr int kVector = decltype(vector)::value, kTaps = decltype(of_block)::value;
    if (!fits_a_grid(plan.blocks, taps / kTaps)) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits),
                    static_cast<unsigned>(taps / kTaps));
    return launch(device, grid, kThreads, kThreads * kVector * sizeof(float),
                  depthwise_conv2d_bwd_weight_kernel<T, kVector, kTaps>, p, plan, workspace);
  };
  const cudaError_t error =
      dispatch(p.dtype, plan.vector, s.channels_last, [&](auto t, auto vector, auto cl) {
        if constexpr (decltype(vector)::value > 1 && !cl.value) {
          return cudaErrorInvalidValue;
        } else {
          if (k == 3) return run(t, vector, Constant<3>{});
          if (k == 5) return run(t, vector, Constant<5>{});
          if (k == 7) return run(t, vector, Constant<7>{});
          return run(t, vector, Constant<1>{});
        }
      });
  if (error != cudaSuccess) return error;
  return launch(device, grid_for((taps + 1) * s.c), kThreads, 0, depthwise_conv2d_finalize_kernel,
                workspace, plan.splits, Divisor(s.c), taps, static_cast<float*>(p.dweight),
                static_cast<float*>(p.dbias));
}

}  // namespace fastcnn
