"""The gradients of a convolution as products of matrices; every tensor is channels_last.

    dx[q, i]    = sum over taps t and channels o of g[pixel(q, t), o] * w[o, t, i]
    dw[o, t, i] = sum over output pixels p of g[p, o] * a[pixel(p, t), i]

g is the gradient of the convolution's output: dy, or where a batch norm and its act stand behind
the convolution what their backward makes of dy and of the output `raw`, so that it is not written:

    dz = dy * act'(norm(raw))                                      xhat = (raw - mean[o]) * rstd[o]
    g  = scale[o] * (dz - (sum of dz + xhat * (sum of dz * xhat)) / count)

with sums over the batch's `count` pixels; without them (fixed statistics) g = scale[o] * dz. norm,
scale and a, the convolution's input with its prologue, are as in conv2d_kernels.py.

dx with a stride: an input pixel meets only the taps that lie a multiple of the stride from it. The
pixels of one phase, (row + padding) modulo the stride, meet the same ones, so a program's pixels
are of one phase, and no tap is walked in vain: see _taps.

dx's epilogue, in float32, each part optional, in this order: plus `add`, the gradient that comes by
another way; times the derivative of the activation that made the input, at norm(raw); and the two
sums that batch norm's backward needs of the result d, for each tile and channel: d and d * xhat.
sum_tiles adds the tiles up in a fixed order.

dw: each program sums a part of the pixels; sum_tiles adds the parts.

Floors: dx reads g and w and writes dx; dw reads g and a and writes dw. A tap beyond the first finds
its pixels in a cache.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.activation import NONE, act_bwd
from fastcnn.triton.conv2d_kernels import (
    apply_prologue,
    load_float32,
    load_taps,
    per_channel,
    tile_of,
    windows_of,
)


@triton.jit
def gradient_per_channel(norm, sums, share, channels, mask):
    """Return mean, scale and bias of norm, and the offset and factor of g: see gradient()."""
    mean, rstd, scale, bias = per_channel(norm, channels, mask)
    offset, factor = tl.zeros_like(mean), tl.zeros_like(mean)
    if sums is not None:
        offset = scale * (load_float32(sums.gradient, channels, mask) * share)
        factor = scale * rstd * (load_float32(sums.times_xhat, channels, mask) * share)
    return mean, scale, bias, offset, factor


@triton.jit
def gradient(dy_ptr, raw_ptr, sums, at, inside, at_channels, ACT: tl.constexpr):
    """Return g at [pixels, channels], 0 where not inside.

    at_channels is gradient_per_channel's, or None where g is dy. raw is read where it is needed.
    """
    g = tl.load(dy_ptr + at, mask=inside, other=0.0)
    if at_channels is not None:
        raw = None
        if ACT != NONE or sums is not None:
            raw = tl.load(raw_ptr + at, mask=inside, other=0.0)
        g = through_norm(g, raw, sums, inside, at_channels, ACT)
    return g


@triton.jit
def through_norm(dy, raw, sums, inside, at_channels, ACT: tl.constexpr):
    """Return g of dy and, where it is needed, raw; in dy's type, 0 where not inside."""
    mean, scale, bias, offset, factor = at_channels
    dz = dy.to(tl.float32)
    if raw is not None:
        apart = raw.to(tl.float32) - mean[None, :]
        dz = act_bwd(dz, apart * scale[None, :] + bias[None, :], ACT)
    dz *= scale[None, :]
    if sums is not None:
        dz -= offset[None, :] + apart * factor[None, :]
    return tl.where(inside, dz, 0.0).to(dy.dtype)


@triton.jit
def write_gradient(
    acc, tile, at, in_q, channels, in_c, c, dx_ptr, add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Write a tile of dx at `at`, and its sums: the epilogue."""
    mask = in_q[:, None] & in_c[None, :]
    if add_ptr is not None:
        acc += load_float32(add_ptr, at, mask)
    if norm is not None:
        mean, rstd, scale, bias = per_channel(norm, channels, in_c)
        apart = load_float32(raw_ptr, at, mask) - mean[None, :]
        acc = act_bwd(acc, apart * scale[None, :] + bias[None, :], ACT)
        # Summed as the next kernel will read it.
        d = tl.where(mask, acc, 0.0).to(dx_ptr.dtype.element_ty).to(tl.float32)
        partial = (tl.zeros_like(channels).to(tl.int64) + tile) * c + channels
        tl.store(sum_ptr + partial, tl.sum(d, 0), mask=in_c)
        tl.store(sum_xhat_ptr + partial, tl.sum(d * (apart * rstd[None, :]), 0), mask=in_c)
    tl.store(dx_ptr + at, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _taps(
    phase, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, GCD: tl.constexpr,
):  # fmt: skip
    """Return a phase's first tap and their number, its first pixel and their number.

    The taps are every (STRIDE / GCD)-th, GCD that of stride and dilation.
    """
    STEP: tl.constexpr = STRIDE // GCD
    first_tap = KERNEL
    for tap in tl.static_range(min(STEP, KERNEL)):
        first_tap = tl.where(tap * DILATION % STRIDE == phase, tap, first_tap)
    first = (phase + PADDING * (STRIDE - 1)) % STRIDE
    pixels = tl.maximum(size - first + STRIDE - 1, 0) // STRIDE
    return first_tap, (KERNEL - first_tap + STEP - 1) // STEP, first, pixels


@triton.jit(do_not_specialize=["n", "tiles"])
def conv2d_bwd_input_kernel(
    dy_ptr, w_ptr, dx_ptr, dy_raw_ptr, dy_norm, dy_sums, share,
    add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr,
    n, h, w, c_in, h_out, w_out, c_out, c_in_group, c_out_group, tiles,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    DY_ACT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Dx. Grid: a phase's tiles (tiles of pixels times tiles of channels), groups, phases."""
    group, phase = tl.program_id(1), tl.program_id(2)
    tap_y, taps_y, first_y, rows = _taps(
        phase // STRIDE_W, h, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, GCD_H
    )
    tap_x, taps_x, first_x, columns = _taps(
        phase % STRIDE_W, w, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, GCD_W
    )
    tile_m, tile_n = tile_of(tl.program_id(0), tiles, tl.cdiv(c_in_group, BLOCK_N), GROUP_M)
    q = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_q, in_i = q < n * rows * columns, i < c_in_group
    # A phase without pixels divides by 1: all its q are outside.
    rows, columns = tl.maximum(rows, 1), tl.maximum(columns, 1)
    image = q // (rows * columns)
    row = first_y + q // columns % rows * STRIDE_H
    column = first_x + q % columns * STRIDE_W
    top = (row + PADDING_H - tap_y * DILATION_H) // STRIDE_H
    left = (column + PADDING_W - tap_x * DILATION_W) // STRIDE_W
    steps = tl.cdiv(c_out_group, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps_y * taps_x * steps):
        place = step // steps
        y, x = place // taps_x, place % taps_x
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < c_out_group
        o = group * c_out_group + k
        row_out, column_out = top - y * (DILATION_H // GCD_H), left - x * (DILATION_W // GCD_W)
        inside = (row_out >= 0) & (row_out < h_out) & (column_out >= 0) & (column_out < w_out)
        inside = (in_q & inside)[:, None] & in_k[None, :]
        pixel = (image.to(tl.int64) * h_out + row_out) * w_out + column_out
        at_channels = None
        if dy_norm is not None:
            at_channels = gradient_per_channel(dy_norm, dy_sums, share, o, in_k)
        at = pixel[:, None] * c_out + o[None, :]
        g = gradient(dy_ptr, dy_raw_ptr, dy_sums, at, inside, at_channels, DY_ACT)
        tap = (tap_y + y * (STRIDE_H // GCD_H)) * KERNEL_W + tap_x + x * (STRIDE_W // GCD_W)
        w_at = (o.to(tl.int64) * (KERNEL_H * KERNEL_W) + tap) * c_in_group
        weights = tl.load(
            w_ptr + w_at[:, None] + i[None, :], mask=in_k[:, None] & in_i[None, :], other=0.0
        )
        acc = tl.dot(g, weights, acc, input_precision=PRECISION)

    channels = group * c_in_group + i
    at = ((image.to(tl.int64) * h + row) * w + column)[:, None] * c_in + channels[None, :]
    write_gradient(
        acc, phase * tiles + tile_m, at, in_q, channels, in_i, c_in, dx_ptr,
        add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr, ACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "pixels_a_part"])
def conv2d_bwd_weight_kernel(
    dy_ptr, x_ptr, parts_ptr, dy_raw_ptr, dy_norm, dy_sums, share, pre_norm,
    n, h, w, c_in, h_out, w_out, c_out, c_in_group, c_out_group, pixels_a_part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, DY_ACT: tl.constexpr, PRE_ACT: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of dw, in float32 [parts, c_out, taps, c_in_group].

    Grid: tiles of one part (of output channels, times of taps and channels), groups, parts. With
    FLAT a tile's columns are of several taps.
    """
    taps = KERNEL_H * KERNEL_W
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    group, part = tl.program_id(1), tl.program_id(2)
    o = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_o, o = o < c_out_group, group * c_out_group + o
    if FLAT:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_i = column < taps * c_in_group
        tap, i = (column // c_in_group)[None, :], column % c_in_group
    else:
        tiles_i = tl.cdiv(c_in_group, BLOCK_N)
        tap, i = tile_n // tiles_i, tile_n % tiles_i * BLOCK_N + tl.arange(0, BLOCK_N)
        in_i = i < c_in_group
        column = tap * c_in_group + i
    channels = group * c_in_group + i
    g_coefficients, a_coefficients = None, None
    if dy_norm is not None:
        g_coefficients = gradient_per_channel(dy_norm, dy_sums, share, o, in_o)
    if pre_norm is not None:
        a_coefficients = per_channel(pre_norm, channels, in_i)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * pixels_a_part
    last = tl.minimum(first + pixels_a_part, n * h_out * w_out)
    for start in range(first, last, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        in_p = p < last
        at = p.to(tl.int64)[:, None] * c_out + o[None, :]
        g = gradient(
            dy_ptr, dy_raw_ptr, dy_sums, at, in_p[:, None] & in_o[None, :], g_coefficients, DY_ACT
        )
        windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
        a, inside = load_taps(
            x_ptr, windows, tap, in_p, channels, in_i, h, w, c_in, 0.0,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        if pre_norm is not None:
            a = apply_prologue(a, inside, a_coefficients, PRE_ACT)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
    at = (part.to(tl.int64) * c_out + o)[:, None] * (taps * c_in_group) + column[None, :]
    tl.store(parts_ptr + at, acc, mask=in_o[:, None] & in_i[None, :])


@triton.jit(do_not_specialize=["parts"])
def sum_tiles_kernel(
    sum_ptr, parts_ptr, parts, count, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """sum[c] = sum over t of parts[t, c], in a fixed order. Grid: blocks of c."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < parts)[:, None] & (c < count)[None, :]
        total += load_float32(parts_ptr, t.to(tl.int64)[:, None] * count + c[None, :], mask)
    total = tl.sum(total, 0)
    tl.store(sum_ptr + c, total.to(sum_ptr.dtype.element_ty), mask=c < count)
