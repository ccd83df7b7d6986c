// conv2d_winograd: 3x3 convolutions of stride 1 by Winograd's F(4, 3), on the CPU.
// What the kernels see: sizes, types and pointers. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/capability.h"

namespace fastcnn {

constexpr int64_t kWinogradStep = 4;     // pixels of y a tile gives, each way
constexpr int64_t kWinogradPoints = 36;  // numbers a tile becomes: 6 x 6

// Some of the tiles that an image [n, c, h, w] is cut into, channels_last. They lie 4 pixels apart,
// the first at (-top, -left); what of them is outside of the image is 0, or not written.
struct WinogradTiles {
  int64_t n, c, h, w, top, left;
  int64_t down, across;  // tiles of an image
  int64_t first, count;  // the tiles that are meant, in the order n, down, across
};

// points[i * stride + t * c + j]: number i, of 36, of tile t and channel j.
struct WinogradReadParams {
  WinogradTiles tiles;
  DType dtype;
  bool is_gradient;  // tiles of 4 x 4 pixels of dy, else of 6 x 6 of x
  const void* image;
  float* points;
  int64_t stride;
};

// image = act(the tiles' 4 x 4 pixels + bias + residual)
struct WinogradWriteParams {
  WinogradTiles tiles;
  DType dtype;
  Act act;
  const float* points;
  int64_t stride;
  const float* bias;     // [c]; null: 0
  const void* residual;  // as the image; null: 0
  void* image;
};

// to[i] += from[i]
struct WinogradAddParams {
  int64_t count;
  const float* from;
  float* to;
};

FASTCNN_CPU_KERNEL(conv2d_winograd_read_cpu, WinogradReadParams)
FASTCNN_CPU_KERNEL(conv2d_winograd_write_cpu, WinogradWriteParams)
FASTCNN_CPU_KERNEL(conv2d_winograd_add_cpu, WinogradAddParams)

}  // namespace fastcnn
