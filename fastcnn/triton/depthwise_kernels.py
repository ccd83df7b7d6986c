"""Depthwise convolutions: a channel of the output has one channel of the input, o // MULTIPLIER.

    y[p, o]  = sum over taps t of a[pixel(p, t), o // MULTIPLIER] * w[o, t]
    dx[q, i] = sum over taps t and the outputs o of i of g[pixel(q, t), o] * w[o, t]
    dw[o, t] = sum over output pixels p of g[p, o] * a[pixel(p, t), o // MULTIPLIER]

No matrix, so no matrix instructions: a program makes BLOCK_M pixels of BLOCK_N channels in
registers. Prologues, epilogues and names are those of conv2d_kernels.py and conv2d_bwd_kernels.py,
floors too: a tap beyond the first finds its pixels in a cache.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.conv2d_bwd_kernels import gradient, gradient_per_channel, write_gradient
from fastcnn.triton.conv2d_kernels import (
    apply_prologue,
    load_float32,
    load_taps,
    per_channel,
    windows_of,
    write_tile,
)


@triton.jit(do_not_specialize=["n"])
def depthwise_kernel(
    x_ptr, w_ptr, y_ptr, pre_norm, norm, bias_ptr, residual_ptr, mean_ptr, square_ptr,
    n, h, w, c_in, h_out, w_out, c_out,
    MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PRE_ACT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Make y. Grid: tiles of pixels, blocks of channels."""
    pixels, tile_m = n * h_out * w_out, tl.program_id(0)
    p = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_o, i = p < pixels, o < c_out, o // MULTIPLIER
    windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
    at_channels = None
    if pre_norm is not None:
        at_channels = per_channel(pre_norm, i, in_o)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        a, inside = load_taps(
            x_ptr, windows, tap, in_p, i, in_o, h, w, c_in, 0.0,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        if pre_norm is not None:
            a = apply_prologue(a, inside, at_channels, PRE_ACT)
        weights = load_float32(w_ptr, o * (KERNEL_H * KERNEL_W) + tap, in_o)
        acc += a.to(tl.float32) * weights[None, :]
    write_tile(
        acc, tile_m, p, in_p, o, in_o, c_out,
        y_ptr, norm, bias_ptr, residual_ptr, mean_ptr, square_ptr, ACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def depthwise_bwd_input_kernel(
    dy_ptr, w_ptr, dx_ptr, dy_raw_ptr, dy_norm, dy_sums, share,
    add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr,
    n, h, w, c_in, h_out, w_out, c_out,
    MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DY_ACT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Make dx. Grid: tiles of pixels, blocks of channels. Taps between strides are masked."""
    tile_m = tl.program_id(0)
    q = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q, in_i = q < n * h * w, i < c_in
    image, row, column = (q // (h * w)).to(tl.int64), q // w % h + PADDING_H, q % w + PADDING_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        y = row - tap // KERNEL_W * DILATION_H
        x = column - tap % KERNEL_W * DILATION_W
        inside = (y >= 0) & (x >= 0) & (y % STRIDE_H == 0) & (x % STRIDE_W == 0)
        y, x = y // STRIDE_H, x // STRIDE_W
        inside = (in_q & inside & (y < h_out) & (x < w_out))[:, None] & in_i[None, :]
        pixel = ((image * h_out + y) * w_out + x)[:, None] * c_out
        for j in range(MULTIPLIER):
            o = i * MULTIPLIER + j
            at_channels = None
            if dy_norm is not None:
                at_channels = gradient_per_channel(dy_norm, dy_sums, share, o, in_i)
            at = pixel + o[None, :]
            g = gradient(dy_ptr, dy_raw_ptr, dy_sums, at, inside, at_channels, DY_ACT)
            weights = load_float32(w_ptr, o * (KERNEL_H * KERNEL_W) + tap, in_i)
            acc += g.to(tl.float32) * weights[None, :]
    write_gradient(
        acc, tile_m, q.to(tl.int64)[:, None] * c_in + i[None, :], in_q, i, in_i, c_in, dx_ptr,
        add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr, ACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "pixels_a_part"])
def depthwise_bwd_weight_kernel(
    dy_ptr, x_ptr, parts_ptr, dy_raw_ptr, dy_norm, dy_sums, share, pre_norm,
    n, h, w, c_in, h_out, w_out, c_out, pixels_a_part,
    MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    DY_ACT: tl.constexpr, PRE_ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of dw, in float32 [parts, c_out, taps]. Grid: blocks of channels, taps, parts."""
    o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, part = tl.program_id(1), tl.program_id(2)
    in_o, i = o < c_out, o // MULTIPLIER
    first = part * pixels_a_part
    last = tl.minimum(first + pixels_a_part, n * h_out * w_out)
    g_coefficients, a_coefficients = None, None
    if dy_norm is not None:
        g_coefficients = gradient_per_channel(dy_norm, dy_sums, share, o, in_o)
    if pre_norm is not None:
        a_coefficients = per_channel(pre_norm, i, in_o)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        p = start + tl.arange(0, BLOCK_M)
        in_p = p < last
        windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
        a, inside = load_taps(
            x_ptr, windows, tap, in_p, i, in_o, h, w, c_in, 0.0,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        if pre_norm is not None:
            a = apply_prologue(a, inside, a_coefficients, PRE_ACT)
        at = p.to(tl.int64)[:, None] * c_out + o[None, :]
        g = gradient(dy_ptr, dy_raw_ptr, dy_sums, at, inside, g_coefficients, DY_ACT)
        acc += a.to(tl.float32) * g.to(tl.float32)
    at = (part.to(tl.int64) * c_out + o) * (KERNEL_H * KERNEL_W) + tap
    tl.store(parts_ptr + at, tl.sum(acc, 0), mask=in_o)
