// conv2d_winograd between torch and the kernels: what fastcnn/ops/conv2d/winograd.py declares, here
// checked, allocated and called, with torch's products of matrices between the transforms.
#include "conv2d_winograd.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "bindings/check.h"

namespace fastcnn {
namespace {

// Of tiles that are transformed, multiplied and transformed back before the next ones are: their
// numbers stay in a cache. 4 to 16 MiB made no difference beyond the noise (Xeon, model 207, with
// 2 MiB L2 caches).
constexpr int64_t kChunkBytes = int64_t{8} << 20;
// The numbers of each point lie apart by no power of two, of which a cache's sets would hold few.
constexpr int64_t kApart = 16;

int64_t chunk_of(const WinogradTiles& s, int64_t numbers, int64_t least_bytes = 0) {
  const int64_t tile_bytes = kWinogradPoints * numbers * static_cast<int64_t>(sizeof(float));
  const int64_t tiles = s.n * s.down * s.across;
  const int64_t bytes = kChunkBytes < least_bytes ? least_bytes : kChunkBytes;
  const int64_t chunk = bytes / tile_bytes < 16 ? 16 : bytes / tile_bytes;
  const int64_t chunks = (tiles + chunk - 1) / chunk;
  return (tiles + chunks - 1) / chunks;
}

// to = a * b, matrix by matrix. The operator with an `out`, which autocast does not cast.
void multiply(const Tensor& a, const Tensor& b, const Tensor& to) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `to` once more, whose reference is let go here
}

// u's memory without what autograd knows of it: an `out` may not depend on what requires a
// gradient.
Tensor plain(const Tensor& u) {
  const int64_t sizes[] = {u.size(0), u.size(1), u.size(2)};
  const int64_t strides[] = {u.stride(0), u.stride(1), u.stride(2)};
  return torch::stable::from_blob(const_cast<void*>(u.const_data_ptr()), {sizes, 3}, {strides, 3},
                                  u.device(), ScalarType::Float);
}

// Points of `count` tiles as matrices, one a point: [36, count, c].
Tensor matrices(const Tensor& points, int64_t count, int64_t c, int64_t stride, bool transposed) {
  const int64_t sizes[] = {kWinogradPoints, transposed ? c : count, transposed ? count : c};
  const int64_t strides[] = {stride, transposed ? 1 : c, transposed ? c : 1};
  return torch::stable::from_blob(points.mutable_data_ptr(), {sizes, 3}, {strides, 3},
                                  points.device(), ScalarType::Float);
}

Tensor floats(const Tensor& like, int64_t count) {
  return torch::stable::empty({&count, 1}, ScalarType::Float, std::nullopt, like.device());
}

DType image_dtype(const char* op, const Tensor& x) {
  const DType dtype = dtype_of(op, "x", x);
  if (dtype == DType::kFloat64) fail(op, "x: expected float32, bfloat16 or float16, got float64");
  return dtype;
}

// The tiles of a convolution of x, for y's image or with x's.
WinogradTiles tiles_of(const char* op, const Tensor& x, int64_t padding_h, int64_t padding_w) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (x.dim() != 4) fail(op, "x: expected 4 dimensions [n, c, h, w], got sizes ", sizes_of(x));
  WinogradTiles s{x.size(0), x.size(1), x.size(2), x.size(3), padding_h, padding_w, 0, 0, 0, 0};
  if (padding_h < 0 || padding_h > 2 || padding_w < 0 || padding_w > 2) {
    fail(op, "padding: expected 0 to 2, got ", padding_h, " and ", padding_w);
  }
  const int64_t h = s.h + 2 * padding_h - 2, w = s.w + 2 * padding_w - 2;
  if (h < 1 || w < 1 || s.h > kMost || s.w > kMost || s.c > INT32_MAX) {
    fail(op, "x: expected 1 to 2^30 pixels and up to 2^31 - 1 channels, and an output, got sizes ",
         sizes_of(x));
  }
  s.down = (h + kWinogradStep - 1) / kWinogradStep;
  s.across = (w + kWinogradStep - 1) / kWinogradStep;
  return s;
}

// The same tiles in the image that they give, or its gradient.
WinogradTiles tiles_of_output(WinogradTiles s, int64_t c) {
  s.h += 2 * s.top - 2, s.w += 2 * s.left - 2;
  s.top = s.left = 0, s.c = c;
  return s;
}

void read(const WinogradTiles& tiles, DType dtype, bool is_gradient, const void* image,
          const Tensor& points, int64_t stride) {
  conv2d_winograd_read_cpu(WinogradReadParams{
      tiles, dtype, is_gradient, image, static_cast<float*>(points.mutable_data_ptr()), stride});
}

Tensor conv2d_winograd_fwd(const Tensor& x, const Tensor& u, const OptionalTensor& bias,
                           const OptionalTensor& residual, int64_t padding_h, int64_t padding_w,
                           int64_t act) {
  constexpr const char* kOp = "conv2d_winograd_fwd";
  WinogradTiles s = tiles_of(kOp, x, padding_h, padding_w);
  const Check check(kOp, x);
  const DType dtype = image_dtype(kOp, x);
  const void* image = image_of(kOp, "x", x, x, s.n, s.c, s.h, s.w, true);
  const bool sound = u.dim() == 3 && u.size(0) == kWinogradPoints && u.size(1) == s.c &&
                     u.scalar_type() == ScalarType::Float && u.device() == x.device();
  if (!sound) {
    fail(kOp, "u: expected float32 of sizes [36, ", s.c, ", c_out], got sizes ", sizes_of(u),
         " of ", torch::headeronly::toString(u.scalar_type()), " and ", device_of(u));
  }
  check_storage(kOp, "u", u);
  const int64_t c_out = u.size(2);
  WinogradTiles out = tiles_of_output(s, c_out);
  Tensor y = empty_image(x, x.scalar_type(), s.n, c_out, out.h, out.w, /*channels_last=*/true);
  WinogradWriteParams p{out, dtype, check.act(act), nullptr, 0, nullptr, nullptr, nullptr};
  if (bias) {
    if (bias->dim() != 1 || bias->size(0) != c_out || bias->scalar_type() != ScalarType::Float ||
        bias->device() != x.device() || (c_out > 1 && bias->stride(0) != 1)) {
      fail(kOp, "bias: expected a dense vector of ", c_out, " float32 on the CPU, got sizes ",
           sizes_of(*bias), " of ", torch::headeronly::toString(bias->scalar_type()));
    }
    check_storage(kOp, "bias", *bias);
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (residual) {
    p.residual = image_of(kOp, "residual", *residual, x, s.n, c_out, out.h, out.w, true);
  }
  if (y.numel() == 0) return y;
  p.image = y.mutable_data_ptr();
  const int64_t tiles = s.n * s.down * s.across, chunk = chunk_of(s, s.c + c_out);
  const int64_t stride = chunk * s.c + kApart;
  const Tensor points = floats(x, kWinogradPoints * stride);
  const Tensor weight = plain(u);
  const Tensor products = floats(x, kWinogradPoints * chunk * c_out);
  p.points = static_cast<const float*>(products.const_data_ptr());
  for (int64_t first = 0; first < tiles; first += chunk) {
    const int64_t count = first + chunk < tiles ? chunk : tiles - first;
    s.first = p.tiles.first = first, s.count = p.tiles.count = count;
    read(s, dtype, false, image, points, stride);
    p.stride = count * c_out;
    multiply(matrices(points, count, s.c, stride, false), weight,
             matrices(products, count, c_out, p.stride, false));
    conv2d_winograd_write_cpu(p);
  }
  return y;
}

Tensor conv2d_winograd_bwd_weight(const Tensor& dy, const Tensor& x, int64_t padding_h,
                                  int64_t padding_w) {
  constexpr const char* kOp = "conv2d_winograd_bwd_weight";
  WinogradTiles s = tiles_of(kOp, x, padding_h, padding_w);
  const DType dtype = image_dtype(kOp, x);
  const void* image = image_of(kOp, "x", x, x, s.n, s.c, s.h, s.w, true);
  if (dy.dim() != 4) fail(kOp, "dy: expected 4 dimensions, got sizes ", sizes_of(dy));
  const int64_t c_out = dy.size(1);
  WinogradTiles out = tiles_of_output(s, c_out);
  const void* gradient = image_of(kOp, "dy", dy, x, s.n, c_out, out.h, out.w, true);
  const int64_t sizes[] = {kWinogradPoints, s.c, c_out};
  const auto sums = [&] {
    return torch::stable::empty({sizes, 3}, ScalarType::Float, std::nullopt, x.device());
  };
  Tensor sum = sums();
  if (x.numel() == 0 || dy.numel() == 0) return torch::stable::zero_(sum);
  const int64_t tiles = s.n * s.down * s.across;
  // Where the sums are large, more tiles at once: each chunk reads and writes them.
  const int64_t chunk = chunk_of(s, s.c + c_out, 2 * kWinogradPoints * s.c * c_out * sizeof(float));
  const int64_t stride = chunk * s.c + kApart, stride_out = chunk * c_out + kApart;
  const Tensor points = floats(x, kWinogradPoints * stride);
  const Tensor points_out = floats(x, kWinogradPoints * stride_out);
  const std::optional<Tensor> more = chunk < tiles ? std::optional(sums()) : std::nullopt;
  for (int64_t first = 0; first < tiles; first += chunk) {
    const int64_t count = first + chunk < tiles ? chunk : tiles - first;
    s.first = out.first = first, s.count = out.count = count;
    read(s, dtype, false, image, points, stride);
    read(out, dtype, true, gradient, points_out, stride_out);
    multiply(matrices(points, count, s.c, stride, true),
             matrices(points_out, count, c_out, stride_out, false), first == 0 ? sum : *more);
    if (first == 0) continue;
    conv2d_winograd_add_cpu({sum.numel(), static_cast<const float*>(more->const_data_ptr()),
                             static_cast<float*>(sum.mutable_data_ptr())});
  }
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("conv2d_winograd_fwd", TORCH_BOX((&conv2d_winograd_fwd)));
  m.impl("conv2d_winograd_bwd_weight", TORCH_BOX((&conv2d_winograd_bwd_weight)));
}

}  // namespace fastcnn
