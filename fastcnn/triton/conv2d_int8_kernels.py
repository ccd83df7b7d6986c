"""Convolutions of 8-bit integers, by the formula of fastcnn/ops/conv2d_int8/interface.py.

    acc[p, o] = sum over taps and channels of (x - x_zero_point) * w        int32, exact

x is signed by taking 128 from unsigned ones and their zero point. The zero point is not taken from
each x: outside the image x is the zero point, and what is added to a channel's sum holds minus the
zero point times the sum of its weights, and the bias if y is quantised. A copy from global to
shared memory that passes by the registers fills with 0 alone: a border of another zero point takes
twice the instructions (ZERO_FILL).

Then, in float32 and the formula's order, each operation rounded by itself (launches have
enable_fp_fusion=False): scale, bias (floating y), residual, act, rounding to nearest even, zero
point.

The product is of the weights times x, [o, p], and is turned over for the epilogue. Unsigned x pass
through registers to become signed; as the left operand of a wgmma they would stay there, which is
not safe (conv2d_kernels.py), and the right one is always read from shared memory.

The walk over tiles, taps and channels is conv2d_kernels.py's. Floor: x, w, residual, y once.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.conv2d_kernels import load_taps, taps_of, tile_of, windows_of

# Added to a float32 below 2^22, it leaves the nearest even integer in the lowest bits.
ROUND = tl.constexpr(1.5 * 2.0**23)
# All float32 from here on are integers.
INTEGERS = tl.constexpr(2.0**23)
# Triton would compile anew for a 1, and for the multiples of 16.
ZERO_POINTS = ["x_zero_point", "residual_zero_point", "out_zero_point"]


@triton.jit
def _signed(x):
    """Return int8: x, or x - 128 of an unsigned one."""
    return x if x.dtype == tl.int8 else (x.to(tl.int16) - 128).to(tl.int8)


@triton.jit
def _signed_zero(x_ptr, x_zero_point):
    return x_zero_point if x_ptr.dtype.element_ty == tl.int8 else x_zero_point - 128


@triton.jit
def _nearest(z):
    """Return the nearest integer, of two the even one, of any float32 that int32 holds."""
    size = tl.abs(z)
    size = tl.where(size < INTEGERS, (size + INTEGERS) - INTEGERS, size).to(tl.int32)
    return tl.where(z < 0, -size, size)


@triton.jit
def _quantised(z, six, zero_point, ACT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Return y in the lowest byte of int32. Bounds of integers are bounds of what is rounded."""
    z = tl.maximum(z, 0.0 if ACT >= 1 else (LEAST - zero_point).to(tl.float32))
    z = tl.minimum(z, (MOST - zero_point).to(tl.float32))
    if ACT == 2:
        z = tl.minimum(z, six)
    return (z + ROUND).to(tl.int32, bitcast=True) + zero_point


@triton.jit
def _of_channels(
    channels, in_o, sum_ptr, weight_scale_ptr, bias_ptr, x_scale, out_scale, zero,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    """Return what is added to each channel's sums, and what they are multiplied by then."""
    start = -zero * tl.load(sum_ptr + channels, mask=in_o, other=0)
    scale = tl.full(channels.shape, 1.0, tl.float32)
    if weight_scale_ptr is not None:
        scale = tl.load(weight_scale_ptr + channels, mask=in_o, other=1.0)
    scale = scale * x_scale
    if QUANTISED:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + channels, mask=in_o, other=0.0)
            start += _nearest(tl.div_rn(bias, scale))
        scale = tl.div_rn(scale, out_scale)
    return start, scale


@triton.jit
def write_int8_tile(
    acc, at, in_p, channels, in_o, y_ptr, sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr,
    x_scale, out_scale, residual_scale, six, zero, residual_zero_point, out_zero_point,
    ACT: tl.constexpr, QUANTISED: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Write a tile of y. ACT: 0 none, 1 relu, 2 relu6. zero: x's zero point, as x is signed."""
    mask = in_p[:, None] & in_o[None, :]
    start, scale = _of_channels(
        channels, in_o, sum_ptr, weight_scale_ptr, bias_ptr, x_scale, out_scale, zero, QUANTISED
    )
    z = (acc + start[None, :]).to(tl.float32) * scale[None, :]
    if bias_ptr is not None and not QUANTISED:
        z += tl.load(bias_ptr + channels, mask=in_o, other=0.0)[None, :]
    if residual_ptr is not None:
        r = tl.load(residual_ptr + at, mask=mask, other=0)
        z += (r.to(tl.float32) - residual_zero_point) * residual_scale
    if QUANTISED:
        y = _quantised(z, six, out_zero_point, ACT, LEAST, MOST)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        if ACT >= 1:
            z = tl.where(z < 0, 0.0, z)
        if ACT == 2:
            z = tl.where(z > six, six, z)
        tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=ZERO_POINTS)
def conv2d_int8_kernel(
    x_ptr, w_ptr, y_ptr, sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr,
    x_scale, out_scale, residual_scale, six, x_zero_point, residual_zero_point, out_zero_point,
    n, h, w, c_in, h_out, w_out, c_out, c_in_group, c_out_group,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, ACT: tl.constexpr, QUANTISED: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, ZERO_FILL: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Any convolution but depthwise ones. Grid: the tiles of a group, the groups.

    ZERO_FILL: outside the image x is 0, or nothing is read there.
    """
    pixels = n * h_out * w_out
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tiles_n, GROUP_M)
    group = tl.program_id(1)
    p = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_o = p < pixels, o < c_out_group
    windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
    channels = group * c_out_group + o
    taps = KERNEL_H * KERNEL_W
    weights = w_ptr + channels.to(tl.int64)[None, :] * (taps * c_in_group)
    steps = tl.cdiv(taps * c_in_group if FLAT else c_in_group, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(steps if FLAT else taps * steps):
        tap, i, k, in_k = taps_of(step, steps, c_in_group, taps, BLOCK_K, FLAT)
        a = load_taps(
            x_ptr, windows, tap, in_p, group * c_in_group + i, in_k, h, w, c_in,
            0 if ZERO_FILL else x_zero_point, KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        b = tl.load(weights + k[:, None], mask=in_k[:, None] & in_o[None, :], other=0)
        acc = tl.dot(b.T, _signed(a).T, acc, out_dtype=tl.int32)
    write_int8_tile(
        acc.T, p.to(tl.int64)[:, None] * c_out + channels[None, :], in_p, channels, in_o,
        y_ptr, sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr, x_scale, out_scale,
        residual_scale, six, _signed_zero(x_ptr, x_zero_point), residual_zero_point,
        out_zero_point, ACT, QUANTISED, LEAST, MOST,
    )  # fmt: skip


@triton.jit(do_not_specialize=ZERO_POINTS)
def depthwise_int8_kernel(
    x_ptr, w_ptr, y_ptr, sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr,
    x_scale, out_scale, residual_scale, six, x_zero_point, residual_zero_point, out_zero_point,
    n, h, w, c_in, h_out, w_out, c_out,
    MULTIPLIER: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACT: tl.constexpr, QUANTISED: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A channel of the output has one of the input. Grid: tiles of pixels, blocks of channels."""
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p, in_o, i = p < n * h_out * w_out, o < c_out, o // MULTIPLIER
    windows = windows_of(p, h_out, w_out, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(KERNEL_H * KERNEL_W):
        a = load_taps(
            x_ptr, windows, tap, in_p, i, in_o, h, w, c_in, x_zero_point,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        weights = tl.load(w_ptr + o.to(tl.int64) * (KERNEL_H * KERNEL_W) + tap, mask=in_o, other=0)
        acc += _signed(a).to(tl.int32) * weights.to(tl.int32)[None, :]
    write_int8_tile(
        acc, p.to(tl.int64)[:, None] * c_out + o[None, :], in_p, o, in_o,
        y_ptr, sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr, x_scale, out_scale,
        residual_scale, six, _signed_zero(x_ptr, x_zero_point), residual_zero_point,
        out_zero_point, ACT, QUANTISED, LEAST, MOST,
    )  # fmt: skip
