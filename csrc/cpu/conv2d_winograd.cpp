// conv2d_winograd on the CPU: the transforms around its products. With the points 0, a, -a, b, -b
// and infinity, a = 3/4, b = 4/3, of one direction:
//   x   -> 6 numbers: d0 + d4 - s d2, e(b) + o(b), e(b) - o(b), e(a) + o(a), e(a) - o(a),
//          d1 + d5 - s d3           e(q) = d4 - q^2 d2, o(q) = d3 / q - q d1, s = a^2 + b^2
//   dy  -> 6 numbers: d0, f(a) (d0 + a d1 + a^2 d2 + a^3 d3), the same of -a, b and -b, d3
//          f(a) = 1 / (2 a^2 (a^2 - b^2))
//   y   <- 4 numbers: the sums over all points q of q^k m(q), k = 0 to 3; infinity's is of k = 3
// in each direction one behind the other. ab = 1 is in x's rows: a product of the polynomial
// without q's factor. Of these points come smaller errors than of 1 and 2:
// fastcnn/ops/conv2d/winograd.py.
//
// Channels lie side by side: all lanes do the same. A tile's pixels are read by 36 pointers, those
// outside of the image to zeros, and its numbers written as 36 streams. Bytes: x and y once, 2.25
// times as many floats as x has, and as y.
#include "conv2d_winograd.h"

#include "cpu/dispatch.h"
#include "cpu/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int kPoints = 6, kStep = static_cast<int>(kWinogradStep);
constexpr float kA = 0.75f, kB = 1 / kA;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kSum = kA2 + kB2;
constexpr float kFactorA = 1 / (2 * kA2 * (kA2 - kB2)), kFactorB = 1 / (2 * kB2 * (kB2 - kA2));

using V = Vec<float>;

inline __attribute__((always_inline)) void forward(const V (&d)[6], V (&v)[kPoints]) {
  v[0] = d[0] + d[4] - d[2] * kSum;
  const V even_a = d[4] - d[2] * kB2, odd_a = d[3] * kA - d[1] * kB;
  v[1] = even_a + odd_a, v[2] = even_a - odd_a;
  const V even_b = d[4] - d[2] * kA2, odd_b = d[3] * kB - d[1] * kA;
  v[3] = even_b + odd_b, v[4] = even_b - odd_b;
  v[5] = d[1] + d[5] - d[3] * kSum;
}

inline __attribute__((always_inline)) void forward(const V (&d)[4], V (&v)[kPoints]) {
  v[0] = d[0];
  const V even_a = (d[0] + d[2] * kA2) * kFactorA, odd_a = (d[1] * kA + d[3] * kA3) * kFactorA;
  v[1] = even_a + odd_a, v[2] = even_a - odd_a;
  const V even_b = (d[0] + d[2] * kB2) * kFactorB, odd_b = (d[1] * kB + d[3] * kB3) * kFactorB;
  v[3] = even_b + odd_b, v[4] = even_b - odd_b;
  v[5] = d[3];
}

inline __attribute__((always_inline)) void backward(const V (&m)[kPoints], V (&y)[kStep]) {
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a * kA + odd_b * kB;
  y[2] = even_a * kA2 + even_b * kB2;
  y[3] = odd_a * kA3 + odd_b * kB3 + m[5];
}

// Tile t of an image batch: where its first pixel is.
struct Place {
  int64_t image, y, x;

  Place(const WinogradTiles& s, int64_t t)
      : image(t / (s.down * s.across)),
        y(t / s.across % s.down * kWinogradStep - s.top),
        x(t % s.across * kWinogradStep - s.left) {}
};

// body(r, q, p) for the pixels of a tile: p is null outside of the image.
template <int kSize, class T, class Body>
inline void for_each_pixel(const WinogradTiles& s, int64_t t, T* image, Body body) {
  const Place at(s, t);
  for (int r = 0; r < kSize; ++r) {
    for (int q = 0; q < kSize; ++q) {
      const int64_t y = at.y + r, x = at.x + q;
      const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
      body(r, q, inside ? image + ((at.image * s.h + y) * s.w + x) * s.c : nullptr);
    }
  }
}

int64_t grain_of(const WinogradTiles& s) { return task_grain(s.count, s.count * s.c * 36); }

template <int kSize, class T>
void read(const WinogradReadParams& p) {
  const WinogradTiles& s = p.tiles;
  const Scratch<T> zeros(s.c);
  parallel_for(s.count, grain_of(s), [&](int64_t t) {
    const T* pixels[kSize][kSize];
    for_each_pixel<kSize>(s, s.first + t, static_cast<const T*>(p.image),
                          [&](int r, int q, const T* pixel) {
                            pixels[r][q] = pixel == nullptr ? zeros.get() : pixel;
                          });
    float* to = p.points + t * s.c;
    for_each_vector<float>(
        s.c, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          V rows[kSize][kPoints];
#pragma GCC unroll 6
          for (int r = 0; r < kSize; ++r) {
            V d[kSize];
#pragma GCC unroll 6
            for (int q = 0; q < kSize; ++q) d[q] = load(pixels[r][q] + j, count);
            forward(d, rows[r]);
          }
#pragma GCC unroll 6
          for (int l = 0; l < kPoints; ++l) {
            V d[kSize], v[kPoints];
#pragma GCC unroll 6
            for (int r = 0; r < kSize; ++r) d[r] = rows[r][l];
            forward(d, v);
#pragma GCC unroll 6
            for (int i = 0; i < kPoints; ++i)
              store(to + (i * kPoints + l) * p.stride + j, v[i], count);
          }
        });
  });
}

template <class A, class T>
void write(const WinogradWriteParams& p) {
  const WinogradTiles& s = p.tiles;
  const A act(p.act);
  const auto* residual = static_cast<const T*>(p.residual);
  auto* image = static_cast<T*>(p.image);
  parallel_for(s.count, grain_of(s), [&](int64_t t) {
    T* pixels[kStep][kStep];
    for_each_pixel<kStep>(s, s.first + t, image,
                          [&](int r, int q, T* pixel) { pixels[r][q] = pixel; });
    const float* from = p.points + t * s.c;
    for_each_vector<float>(
        s.c, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          V rows[kPoints][kStep];
#pragma GCC unroll 6
          for (int i = 0; i < kPoints; ++i) {
            V m[kPoints];
#pragma GCC unroll 6
            for (int l = 0; l < kPoints; ++l) {
              m[l] = load(from + (i * kPoints + l) * p.stride + j, count);
            }
            backward(m, rows[i]);
          }
          const V bias = p.bias == nullptr ? V{} : load(p.bias + j, count);
#pragma GCC unroll 4
          for (int q = 0; q < kStep; ++q) {
            V m[kPoints], y[kStep];
#pragma GCC unroll 6
            for (int i = 0; i < kPoints; ++i) m[i] = rows[i][q];
            backward(m, y);
            for (int r = 0; r < kStep; ++r) {
              y[r] += bias;
              if (residual != nullptr && pixels[r][q] != nullptr) {
                y[r] += load(residual + (pixels[r][q] - image) + j, count);
              }
            }
            act.fwd(y);
            for (int r = 0; r < kStep; ++r) {
              if (pixels[r][q] != nullptr) store(pixels[r][q] + j, y[r], count);
            }
          }
        });
  });
}

}  // namespace

void conv2d_winograd_read_cpu(const WinogradReadParams& p) {
  dispatch_half_or_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    p.is_gradient ? read<4, T>(p) : read<6, T>(p);
  });
}

void conv2d_winograd_write_cpu(const WinogradWriteParams& p) {
  dispatch_half_or_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    dispatch_act<float>(p.act, [&](auto act) { write<typename decltype(act)::type, T>(p); });
  });
}

void conv2d_winograd_add_cpu(const WinogradAddParams& p) {
  constexpr int64_t kPart = 1 << 14;
  parallel_for(ceil_div(p.count, kPart), 1, [&](int64_t part) {
    const int64_t first = part * kPart;
    for_each_vector<float>(min(kPart, p.count - first), [&](int64_t i, int64_t count) {
      float* to = p.to + first + i;
      store(to, load(to, count) + load(p.from + first + i, count), count);
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
