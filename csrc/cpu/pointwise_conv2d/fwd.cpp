// pointwise_conv2d on the CPU: rows.h's products, a block of rows at a time that stays in the L2
// cache while all panels of the weight pass it. Memory sees x read and y written once, and a block
// reads the weight once. Half types become float a block at a time.
#include "cpu/pointwise_conv2d/rows.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kTileVectors = 2;

// Rows of a tile at most: they leave registers for its weights and the number that these are
// multiplied by, and are enough sums to hide how long one multiply-add takes.
template <int kVectors>
constexpr int kTileRows = kVectors == 1 ? 8 : (kManyRegisters ? 24 : 12) / kVectors;

// Activations that are a lower and an upper bound, of which there need not be one.
template <class S>
struct Bounds {
  S low, high;

  explicit Bounds(Act act)
      : low(act == Act::kRelu || act == Act::kRelu6 ? S(0) : -static_cast<S>(__builtin_inf())),
        high(act == Act::kRelu6 ? S(6) : static_cast<S>(__builtin_inf())) {}
  static bool fit(Act act) { return act == Act::kNone || act == Act::kRelu || act == Act::kRelu6; }
  Vec<S> of(Vec<S> z) const {
    if constexpr (sizeof(S) == sizeof(float)) {
      return at_most(splat(high), at_least(splat(low), z));
    } else {
      const Vec<S> above = z < splat(low) ? splat(low) : z;
      return above > splat(high) ? splat(high) : above;
    }
  }
};

// Any other activation. Not a part of the tile: its constants would take the registers of the
// tile's sums.
template <class S>
__attribute__((noinline)) void activate(Act act, Vec<S>* z, int count) {
  int i = 0;
  for (; i + 4 <= count; i += 4) act_fwd(act, *reinterpret_cast<Vec<S>(*)[4]>(z + i));
  for (; i < count; ++i) act_fwd(act, *reinterpret_cast<Vec<S>(*)[1]>(z + i));
}

template <int kRows, int kVectors, class T>
void multiply_tile(const Weights<Acc<T>>& w, int64_t vector, const Rows<T>& rows) {
  using S = Acc<T>;
  constexpr int64_t kWide = kLanes<S>;
  Vec<S> sums[kRows][kVectors];
  const S* weight[kVectors];
  unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
    weight[v.value] = w.panel(vector + v.value);
    const Vec<S> bias = w.bias(vector + v.value);
    unrolled<0, kRows>([&](auto r)
                           __attribute__((always_inline)) { sums[r.value][v.value] = bias; });
  });
  T* const y = rows.y + vector * kWide;
  // What y overwrites is on its way while the sums are made.
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    prefetch_to_write(y + r.value * rows.y_stride);
    prefetch_to_write(y + r.value * rows.y_stride + kVectors * kWide - 1);
  });
  const S* const x = rows.x;
  for (int64_t k = 0; k < w.c_in; ++k) {
    Vec<S> of_k[kVectors];
    unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      of_k[v.value] = in_register(load(weight[v.value] + k * kPanel));
    });
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      const Vec<S> value = in_register(splat(x[r.value * rows.x_stride + k]));
      unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
        sums[r.value][v.value] += value * of_k[v.value];
      });
    });
  }
  const int64_t lanes = min(kWide, w.c_out - (vector + kVectors - 1) * kWide);
  const T* residual = rows.residual == nullptr ? nullptr : rows.residual + vector * kWide;
  const auto for_each = [&](auto body) __attribute__((always_inline)) {
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
        const int64_t at = r.value * rows.y_stride + v.value * kWide;
        body(sums[r.value][v.value], r.value * kVectors + v.value, at, v.value + 1 == kVectors);
      });
    });
  };
  if (residual != nullptr) {
    for_each([&](Vec<S> & sum, int, int64_t at, bool last) __attribute__((always_inline)) {
      sum += !last || lanes == kWide ? load(residual + at) : load(residual + at, lanes);
    });
  }
  if (!Bounds<S>::fit(w.act)) {
    Vec<S> values[kRows * kVectors];  // the sums themselves stay in registers
    for_each([&](Vec<S> & sum, int i, int64_t, bool)
                 __attribute__((always_inline)) { values[i] = sum; });
    activate<S>(w.act, values, kRows * kVectors);
    for_each([&](Vec<S> & sum, int i, int64_t, bool)
                 __attribute__((always_inline)) { sum = values[i]; });
  }
  const Bounds<S> bounds(w.act);
  for_each([&](Vec<S> & sum, int, int64_t at, bool last) __attribute__((always_inline)) {
    if (!last || lanes == kWide) {
      store(y + at, bounds.of(sum));
    } else {
      store(y + at, bounds.of(sum), lanes);
    }
  });
}

template <class T>
using MultiplyTile = void (*)(const Weights<Acc<T>>&, int64_t, const Rows<T>&);

// The tile of so many rows.
template <int kVectors, class T, int kRows = kTileRows<kVectors>>
MultiplyTile<T> tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kVectors, T, kRows - 1>(rows);
  }
  return multiply_tile<kRows, kVectors, T>;
}

// In tiles of nearly equal heights: 14 rows are two of 7, where one of 12 and one of 2 took longer.
template <int kVectors, class T>
void multiply_tiles(const Weights<Acc<T>>& w, int64_t vector, Rows<T> rows) {
  int64_t tiles = ceil_div(rows.count, kTileRows<kVectors>);
  const int64_t low = rows.count / tiles, taller = rows.count % tiles;
  const auto run = [&](int64_t height, int64_t count) {
    const MultiplyTile<T> tile = tile_of<kVectors, T>(height);
    for (; count > 0; --count, rows = rows.from(height)) tile(w, vector, rows);
  };
  run(low + 1, taller);
  run(low, tiles - taller);
}

}  // namespace

template <class T>
void multiply_rows(const Weights<Acc<T>>& w, const Rows<T>& rows, int64_t first, int64_t last) {
  if (rows.count == 0) return;
  for (; last - first > 3 || last - first == 2; first += 2) multiply_tiles<2>(w, first, rows);
  if (last - first == 3) multiply_tiles<3>(w, first, rows);
  if (last - first == 1) multiply_tiles<1>(w, first, rows);
}

template void multiply_rows(const Weights<float>&, const Rows<float>&, int64_t, int64_t);
template void multiply_rows(const Weights<float>&, const Rows<BFloat16>&, int64_t, int64_t);
template void multiply_rows(const Weights<float>&, const Rows<Float16>&, int64_t, int64_t);
#if FASTCNN_CPU_LEVEL_IS_BASELINE
template void multiply_rows(const Weights<double>&, const Rows<double>&, int64_t, int64_t);
#endif

namespace {

constexpr int64_t kBlockElements = 1 << 15;  // of x: 128 KiB as float
constexpr int64_t kLeastRows = 48;           // of a block: four of the tallest tiles

template <class T>
class PointwiseConv2d {
  using S = Acc<T>;

 public:
  explicit PointwiseConv2d(const PointwiseConv2dFwdParams& p)
      : p_(p),
        height_(min(p.rows, max(kLeastRows, kBlockElements / (p.c_in + p.c_out) / 12 * 12))),
        blocks_(ceil_div(p.rows, height_)),
        // Few rows are shared by tasks that have a part of the columns each.
        parts_(min(ceil_div(p.c_out, 2 * kPanel), ceil_div(kTasks / 4, blocks_))),
        weights_(p.weight, p.bias, p.c_in, p.c_out, p.act) {}

  void run() const {
    const int64_t tasks = blocks_ * parts_;
    const auto body = [&](int64_t begin, int64_t end) {
      const Scratch<S> x(sizeof(T) == sizeof(S) ? 0 : height_ * p_.c_in, Fill::kNothing);
      int64_t converted = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / parts_, part = task % parts_;
        Rows<T> rows = rows_of(block);
        if constexpr (sizeof(T) != sizeof(S)) {
          if (block != converted)
            convert_rows(x_of(block), p_.x_stride, rows.count, p_.c_in, x.get());
          converted = block;
          rows.x = x.get();
          rows.x_stride = p_.c_in;
        }
        multiply_rows(weights_, rows, first_vector(part), first_vector(part + 1));
      }
    };
    parallel_ranges(tasks, task_grain(tasks, p_.rows * (p_.c_in + p_.c_out)), body);
  }

 private:
  int64_t first_vector(int64_t part) const {
    const int64_t tiles = ceil_div(weights_.vectors(), kTileVectors);
    return min(weights_.vectors(), tiles * part / parts_ * kTileVectors);
  }
  const T* x_of(int64_t block) const {
    return static_cast<const T*>(p_.x) + block * height_ * p_.x_stride;
  }
  Rows<T> rows_of(int64_t block) const {
    const int64_t at = block * height_ * p_.c_out, count = min(height_, p_.rows - block * height_);
    const auto* residual = static_cast<const T*>(p_.residual);
    const S* x = nullptr;
    if constexpr (sizeof(T) == sizeof(S)) x = x_of(block);
    return {x,
            p_.x_stride,
            count,
            residual == nullptr ? nullptr : residual + at,
            static_cast<T*>(p_.y) + at,
            p_.c_out};
  }
  const PointwiseConv2dFwdParams& p_;
  const int64_t height_, blocks_, parts_;
  const Weights<S> weights_;
};

}  // namespace

void pointwise_conv2d_fwd_cpu(const PointwiseConv2dFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) { PointwiseConv2d<decltype(tag)>(p).run(); });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
