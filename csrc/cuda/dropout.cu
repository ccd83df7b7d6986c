// dropout on CUDA.
//
// Data movement: x (and residual) are read and y is written once, 2T or 3T; a mask exists in
// registers only. Which thread owns which elements, so that one Philox serves eight of them:
//   flat           NCHW, and where images have one pixel or one channel. A warp owns tiles of 256
//                  elements, 32 blocks: each lane draws one block, and each element's bit comes
//                  from the lane that drew it by a shuffle. So accesses stay neighbouring whatever
//                  their width.
//   channels_last  A thread owns one vector of channels and walks down the pixels of an image, by
//                  eights: it draws one block a channel, or the two that its eight elements
//                  straddle, of which the second is the first of the next step.
//   planes         NCHW, one draw a channel: threads share planes, each draws its plane's bit.
//   channels       channels_last, one draw a channel: as channels_last, with bits drawn once.
#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "dropout.h"

namespace fastcnn {
namespace {

constexpr int kWarp = 32;
constexpr int kTile = kWarp * kKeepBlock;

__device__ Keep keep_of(const DropoutParams& p) {
  return Keep(static_cast<uint64_t>(*p.seed), p.threshold);  // one word, from the cache
}

__device__ float scale_of(const DropoutParams& p) { return static_cast<float>(p.scale); }

// y = x * (bit ? scale : 0) + residual for one vector, whose element v has bit v. A multiplication,
// not a selection: as in PyTorch, a NaN that is dropped stays a NaN.
template <bool kAdd, int kVector, class T>
__device__ void apply(T* y, const Word<T, kVector>& x, const Word<T, kVector>& residual,
                      uint32_t bits, float scale) {
  float out[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    out[v] = element<T, kVector>(x, v) * (bits >> v & 1 ? scale : 0.f);
    if constexpr (kAdd) out[v] += element<T, kVector>(residual, v);
  }
  store(y, out);
}

// kCount vectors, the offsets of which are at(u), where wanted(u); bits(drawn) is called when all
// are on their way. Until then they stay as they came: half types in half the registers.
template <class T, int kVector, bool kAdd, int kCount, class At, class Wanted, class Bits>
__device__ void apply_many(const DropoutParams& p, float scale, At at, Wanted wanted, Bits bits) {
  const auto load = [&](const void* base, int u) {
    return load_word<kVector>(static_cast<const T*>(base) + at(u));
  };
  Word<T, kVector> values[kCount], added[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    if (wanted(u)) values[u] = load(p.x, u);
  }
  if constexpr (kAdd) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (wanted(u)) added[u] = load(p.residual, u);
    }
  }
  uint32_t drawn[kCount];
  bits(drawn);
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    if (!wanted(u)) continue;
    apply<kAdd, kVector>(static_cast<T*>(p.y) + at(u), values[u], added[u], drawn[u], scale);
  }
}

// ---- one draw an element -----------------------------------------------------------------------

template <class T, int kVector, bool kAdd>
__global__ void __launch_bounds__(kThreads) dropout_flat_kernel(DropoutParams p) {
  constexpr int kSteps = kKeepBlock / kVector;  // vectors of a lane in one tile
  constexpr int kTiles = kSteps < kUnroll ? kUnroll / kSteps : 1;
  constexpr int kCount = kTiles * kSteps;
  const Keep keep = keep_of(p);
  const int lane = threadIdx.x % kWarp;
  const int64_t numel = p.shape.numel();
  const int64_t warp = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarp;
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads / kWarp) * kTiles * kTile;
  for (int64_t first = warp * kTiles * kTile; first < numel; first += step) {
    const auto at = [&](int u) { return first + (u * kWarp + lane) * kVector; };
    const auto bits = [&](uint32_t(&drawn)[kCount]) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint64_t block = static_cast<uint64_t>(first) / kKeepBlock + tile * kWarp + lane;
        const uint32_t own = keep_block(keep, block);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int element = (s * kWarp + lane) * kVector;  // of the tile
          const uint32_t bits = __shfl_sync(0xffffffff, own, element / kKeepBlock);
          drawn[tile * kSteps + s] = bits >> element % kKeepBlock;
        }
      }
    };
    if (first + kTiles * kTile <= numel) {
      apply_many<T, kVector, kAdd, kCount>(p, scale_of(p), at, [](int) { return true; }, bits);
    } else {
      apply_many<T, kVector, kAdd, kCount>(
          p, scale_of(p), at, [&](int u) { return at(u) < numel; }, bits);
    }
  }
}

// A thread's vector of channels, its image, and its pixels [first, last).
template <int kVector>
struct Column {
  int64_t channel, image, first, last;
  bool active;

  // `pixels` a thread, in `parts` parts of an image.
  __device__ Column(const ImageShape& s, int64_t pixels, int64_t parts) {
    const int64_t columns = s.c / kVector;
    const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    const int64_t run = index / columns;
    channel = index % columns * kVector;
    image = run / parts;
    first = run % parts * pixels;
    last = first + pixels < s.hw ? first + pixels : s.hw;
    active = image < s.n;
  }
};

// Bit j of byte i becomes bit i of byte j: blocks of 1, 2 and 4 bits are exchanged across the
// diagonal. Source: Warren, "Hacker's Delight", 2nd edition, section 7-3.
__device__ uint64_t transposed(uint64_t bits) {
  const auto exchange = [&](int apart, uint64_t mask) {
    const uint64_t differ = (bits ^ bits >> apart) & mask;
    bits ^= differ ^ differ << apart;
  };
  exchange(7, 0x00aa00aa00aa00aaull);
  exchange(14, 0x0000cccc0000ccccull);
  exchange(28, 0x00000000f0f0f0f0ull);
  return bits;
}

template <class T, int kVector, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    dropout_channels_last_kernel(DropoutParams p, int64_t pixels, int64_t parts) {
  const Column<kVector> own(p.shape, pixels, parts);
  if (!own.active) return;
  const Keep keep = keep_of(p);
  const int64_t c = p.shape.c, hw = p.shape.hw;
  const uint64_t plane = static_cast<uint64_t>(own.image * c + own.channel);
  // Where planes are whole blocks no channel's eight elements straddle two of them.
  const int ahead = hw % kKeepBlock == 0 ? 0 : kKeepBlock;
  uint64_t blocks = 0;  // byte v: the block that channel v's next element lies in
  // Byte v: the bits of channel v's eight elements from `pixel` on.
  const auto draw = [&](int64_t pixel) {
    uint64_t aligned = 0, next = 0;
#pragma unroll 1
    for (int v = 0; v < kVector; ++v) {  // a loop, for the sake of the instruction cache
      const uint64_t index = (plane + v) * hw + static_cast<uint64_t>(pixel + ahead);
      const uint64_t drawn = keep_block(keep, index / kKeepBlock);
      const uint64_t window = (blocks >> 8 * v & 0xff) | drawn << kKeepBlock;
      const int phase = ahead == 0 ? kKeepBlock : static_cast<int>(index % kKeepBlock);
      aligned |= (window >> phase & 0xff) << 8 * v;
      next |= drawn << 8 * v;
    }
    blocks = next;
    return aligned;
  };
  if (ahead != 0) draw(own.first - kKeepBlock);
  for (int64_t pixel = own.first; pixel < own.last; pixel += kKeepBlock) {
    const int64_t offset = (own.image * hw + pixel) * c + own.channel;
    const auto at = [&](int row) { return offset + row * c; };
    const auto bits = [&](uint32_t(&drawn)[kKeepBlock]) {
      const uint64_t of_rows = transposed(draw(pixel));
#pragma unroll
      for (int row = 0; row < kKeepBlock; ++row) {
        drawn[row] = static_cast<uint32_t>(of_rows >> 8 * row);
      }
    };
    if (pixel + kKeepBlock <= own.last) {
      apply_many<T, kVector, kAdd, kKeepBlock>(p, scale_of(p), at, [](int) { return true; }, bits);
    } else {
      apply_many<T, kVector, kAdd, kKeepBlock>(
          p, scale_of(p), at, [&](int row) { return pixel + row < own.last; }, bits);
    }
  }
}

// ---- one draw a channel ------------------------------------------------------------------------

// `count` vectors that lie `step` elements apart, all with the same bits.
template <class T, int kVector, bool kAdd>
__device__ void apply_run(const DropoutParams& p, int64_t offset, int64_t step, int64_t count,
                          uint32_t bits, float scale) {
  const auto at = [&](int u) { return offset + u * step; };
  int64_t left = count;
#pragma unroll 1
  for (; left >= kUnroll; left -= kUnroll, offset += kUnroll * step) {
    apply_many<T, kVector, kAdd, kUnroll>(
        p, scale, at, [](int) { return true; },
        [&](uint32_t(&drawn)[kUnroll]) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) drawn[u] = bits;
        });
  }
#pragma unroll 1
  for (; left > 0; --left, offset += step) {
    apply_many<T, kVector, kAdd, 1>(
        p, scale, at, [](int) { return true; }, [&](uint32_t(&drawn)[1]) { drawn[0] = bits; });
  }
}

// sharing: threads of a plane, a power of two.
template <class T, int kVector, bool kAdd>
__global__ void __launch_bounds__(kThreads) dropout_planes_kernel(DropoutParams p, int sharing) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t plane = index / sharing, lane = index % sharing;
  const int64_t vectors = p.shape.hw / kVector;
  if (plane >= p.shape.n * p.shape.c || lane >= vectors) return;
  const uint32_t block = keep_block(keep_of(p), static_cast<uint64_t>(plane) / kKeepBlock);
  const float scale = block >> plane % kKeepBlock & 1 ? scale_of(p) : 0.f;
  apply_run<T, kVector, kAdd>(p, plane * p.shape.hw + lane * kVector, sharing * kVector,
                              (vectors - lane + sharing - 1) / sharing, 0xff, scale);
}

template <class T, int kVector, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    dropout_channels_kernel(DropoutParams p, int64_t pixels, int64_t parts) {
  const Column<kVector> own(p.shape, pixels, parts);
  if (!own.active) return;
  const int64_t c = p.shape.c;
  const uint64_t draw = static_cast<uint64_t>(own.image * c + own.channel);
  apply_run<T, kVector, kAdd>(p, (own.image * p.shape.hw + own.first) * c + own.channel, c,
                              own.last - own.first, keep_from(keep_of(p), draw), scale_of(p));
}

// ---- the cut -----------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

constexpr int64_t kMaxPixels = 64;  // of a thread: eight steps, for one block drawn ahead

// Pixels of a thread, whole steps of eight: as many as leave `threads` threads to the GPU.
int64_t pixels_of(const ImageShape& s, int64_t columns, int64_t threads) {
  const int64_t share = s.n * columns * s.hw / threads / kKeepBlock * kKeepBlock;
  return clamp(share, kKeepBlock, kMaxPixels);
}

}  // namespace

int launch_dropout_apply(const DropoutParams& p, const CudaDevice& device) {
  const ImageShape& s = p.shape;
  const bool flat = s.hw == 1 || (!p.per_channel && (!s.channels_last || s.c == 1));
  const int64_t row = flat ? s.numel() : (s.channels_last ? s.c : s.hw);  // must be whole vectors
  const int wide = 16 / element_bytes(p.dtype);
  const int vector = aligned({p.x, p.residual, p.y}) && row % wide == 0 ? wide : 1;
  const int64_t threads = int64_t{8} * kThreads * device.sm_count;  // what fills the GPU
  const auto blocks = [](int64_t threads) {
    return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)));
  };
  const auto run = [&](auto element, auto width, auto add) {
    using T = decltype(element);
    constexpr int kVector = width.value;
    constexpr bool kAdd = add.value;
    if (flat) {
      const int64_t useful = ceil_div(s.numel(), kKeepBlock);
      return launch(device, blocks(useful < threads ? useful : threads), kThreads, 0,
                    dropout_flat_kernel<T, kVector, kAdd>, p);
    }
    const int64_t columns = s.channels_last ? s.c / kVector : 0;
    if (!s.channels_last) {
      const int64_t vectors = s.hw / kVector;
      int sharing = 1;
      while (sharing < kThreads && sharing * kUnroll < vectors) sharing *= 2;
      return launch(device, blocks(s.n * s.c * sharing), kThreads, 0,
                    dropout_planes_kernel<T, kVector, kAdd>, p, sharing);
    }
    const int64_t pixels = pixels_of(s, columns, threads), parts = ceil_div(s.hw, pixels);
    return launch(device, blocks(s.n * parts * columns), kThreads, 0,
                  p.per_channel ? dropout_channels_kernel<T, kVector, kAdd>
                                : dropout_channels_last_kernel<T, kVector, kAdd>,
                  p, pixels, parts);
  };
  return dispatch(p.dtype, vector, false, [&](auto element, auto width, auto) {
    return p.residual != nullptr ? run(element, width, std::true_type{})
                                 : run(element, width, std::false_type{});
  });
}

}  // namespace fastcnn
