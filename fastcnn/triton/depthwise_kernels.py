"""Depthwise convolutions: a channel of the output has one channel of the input, o // MULTIPLIER.

    y[p, o] = sum over taps t of x[pixel(p, t), o // MULTIPLIER] * w[o, t]

No matrix, so no matrix instructions: a program makes BLOCK_M pixels of BLOCK_N channels in
registers. Epilogue, names and floor are those of conv2d_kernels.py: a tap beyond the first finds
its pixels in a cache.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.conv2d_kernels import load_float32, load_taps, windows_of, write_tile


@triton.jit(do_not_specialize=["n"])
def depthwise_kernel(
    x_ptr, w_ptr, y_ptr, norm, residual_ptr, mean_ptr, square_ptr,
    n, h, w, c_in, h_out, w_out, c_out,
    MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Make y. Grid: tiles of pixels, blocks of channels."""
    pixels, tile_m = n * h_out * w_out, tl.program_id(0)
    p = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_o, i = p < pixels, o < c_out, o // MULTIPLIER
    windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        a = load_taps(
            x_ptr, windows, tap, in_p, i, in_o, h, w, c_in, 0.0,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        weights = load_float32(w_ptr, o * (KERNEL_H * KERNEL_W) + tap, in_o)
        acc += a.to(tl.float32) * weights[None, :]
    write_tile(
        acc, tile_m, p, in_p, o, in_o, c_out,
        y_ptr, norm, residual_ptr, mean_ptr, square_ptr, ACT,
    )  # fmt: skip
