"""Convolution as one product of matrices, for NVIDIA GPUs; every tensor is channels_last.

    product[p, o] = sum over taps t and channels i of x[pixel(p, t), i] * w[o, t, i]

p counts the output's pixels, n * h_out * w_out of them; a tap is one place of the kernel window,
and where it lies outside the image x is 0. Both operands go from memory to shared memory and from
there to the matrix unit, never through registers: what is computed with x on its way costs more of
the tensor cores' time than a pass over x (docs/gpu-notes.md), and ptxas before 13.3 may reuse the
registers of an asynchronous product too early (Triton's issue 9433).

A program makes a tile of BLOCK_M pixels and BLOCK_N channels of one group. It walks the taps, and
for each the channels in steps of BLOCK_K; with few channels (FLAT) it walks both as one range, so
that 3 channels do not fill a step of 16 alone. Neighbouring programs share rows of x or of w in the
L2 cache: GROUP_M tiles below each other, then the next column.

Floor: x, w and the residual read once, y written once. A tap beyond the first finds x in a cache.

Epilogue, in float32, each part optional, in this order: the product is rounded to y's type, as the
next kernel will read it, and its statistics taken; norm; plus residual; act. The
statistics are a mean and centred squares for each tile and channel, two passes over registers, so
nothing cancels; merge_statistics merges the tiles in a fixed order. The norm is

    norm(t) = (t - mean[c]) * scale[c] + bias[c]                   scale = weight / sqrt(var + eps)

in float32, centred first; scale is made in the kernel, of vectors. Kernels take it as
fastcnn/common/batch_norm_params.py has it, with a weight and a bias.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.activation import act_fwd


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the program's tile: GROUP_M rows of tiles are done before the next."""
    in_group = GROUP_M * tiles_n
    first = program // in_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + program % in_group % height, program % in_group // height


@triton.jit
def windows_of(
    p, h_out, w_out, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
):  # fmt: skip
    """Return output pixels' images, and the rows and columns where their windows begin, [p, 1]."""
    image = (p // (h_out * w_out)).to(tl.int64)
    top = p // w_out % h_out * STRIDE_H - PADDING_H
    left = p % w_out * STRIDE_W - PADDING_W
    return image[:, None], top[:, None], left[:, None]


@triton.jit
def taps_of(step, steps, c_in_group, taps, BLOCK_K: tl.constexpr, FLAT: tl.constexpr):
    """Return a step's tap (FLAT: [1, k] of them), channels within the group, columns of w, mask."""
    if FLAT:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap, i, in_k = (k // c_in_group)[None, :], k % c_in_group, k < taps * c_in_group
    else:
        tap, i = step // steps, step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        k, in_k = tap * c_in_group + i, i < c_in_group
    return tap, i, k, in_k


@triton.jit
def load_taps(
    x_ptr, windows, tap, in_p, channels, in_i, h, w, c_in, other,
    KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """Return x at a tap of each window, `other` outside the image: [p, i]."""
    image, top, left = windows
    row = top + tap // KERNEL_W * DILATION_H
    column = left + tap % KERNEL_W * DILATION_W
    inside = in_p[:, None] & (row >= 0) & (row < h) & (column >= 0) & (column < w)
    inside = inside & in_i[None, :]
    at = ((image * h + row) * w + column) * c_in + channels[None, :]
    return tl.load(x_ptr + at, mask=inside, other=other)


@triton.jit
def load_float32(pointer, at, mask):
    """Return pointer[at] in float32, 0 where not in the mask."""
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def per_channel(norm, channels, mask):
    """Return a norm's mean, scale and bias at the channels, in float32.

    rsqrt, to 2^-22.9, as PyTorch's batch norm takes it on a GPU: IEEE root and division branch,
    and on sm_100, where a thread has a row of the tile, they spilled 152 bytes.
    """
    mean = load_float32(norm.mean, channels, mask)
    var = tl.load(norm.var + channels, mask=mask, other=1.0).to(tl.float32)
    scale = tl.rsqrt(var + norm.eps) * load_float32(norm.weight, channels, mask)
    return mean, scale, load_float32(norm.bias, channels, mask)


@triton.jit
def write_tile(
    acc, tile_m, p, in_p, channels, in_o, c_out,
    y_ptr, norm, residual_ptr, mean_ptr, square_ptr, ACT: tl.constexpr,
):  # fmt: skip
    """Write a tile of y, and its statistics: the epilogue."""
    dtype = y_ptr.dtype.element_ty
    at = p.to(tl.int64)[:, None] * c_out + channels[None, :]
    mask = in_p[:, None] & in_o[None, :]
    if mean_ptr is not None:
        acc = acc.to(dtype).to(tl.float32)
        # Rows beyond the last pixel are 0: only their distance from the mean is not.
        mean = tl.sum(acc, 0) / tl.sum(in_p.to(tl.float32), 0)
        centred = tl.where(in_p[:, None], acc - mean[None, :], 0.0)
        partial = (tl.zeros_like(channels).to(tl.int64) + tile_m) * c_out + channels
        tl.store(mean_ptr + partial, mean, mask=in_o)
        tl.store(square_ptr + partial, tl.sum(centred * centred, 0), mask=in_o)
    if norm is not None:
        mean, scale, bias = per_channel(norm, channels, in_o)
        acc = (acc - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        acc = acc + load_float32(residual_ptr, at, mask)
    tl.store(y_ptr + at, act_fwd(acc, ACT).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n"])
def conv2d_kernel(
    x_ptr, w_ptr, y_ptr, norm, residual_ptr, mean_ptr, square_ptr,
    n, h, w, c_in, h_out, w_out, c_out, c_in_group, c_out_group,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, ACT: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Any convolution. Grid: the tiles of a group, the groups."""
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

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps if FLAT else taps * steps):
        tap, i, k, in_k = taps_of(step, steps, c_in_group, taps, BLOCK_K, FLAT)
        a = load_taps(
            x_ptr, windows, tap, in_p, group * c_in_group + i, in_k, h, w, c_in, 0.0,
            KERNEL_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        b = tl.load(weights + k[:, None], mask=in_k[:, None] & in_o[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    write_tile(
        acc, tile_m, p, in_p, channels, in_o, c_out,
        y_ptr, norm, residual_ptr, mean_ptr, square_ptr, ACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels"])
def pointwise_kernel(
    x_matrix, w_matrix, y_ptr, norm, residual_ptr, mean_ptr, square_ptr,
    pixels, c_in, c_out,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A 1x1 convolution without stride: x [pixels, c_in] times w [c_out, c_in], by descriptors.

    Descriptors are copied by the TMA unit on sm_90 and later: no addresses, no masks; what lies
    outside is 0. Grid: persistent programs, which of n take every n-th tile.
    """
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(c_out, BLOCK_N)
    for program in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(program, tiles_m, tiles_n, GROUP_M)
        p = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_p, in_o = p < pixels, o < c_out
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(c_in, BLOCK_K)):
            a = x_matrix.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = w_matrix.load([tile_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        write_tile(
            acc, tile_m, p, in_p, o, in_o, c_out,
            y_ptr, norm, residual_ptr, mean_ptr, square_ptr, ACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "tiles"])
def merge_statistics_kernel(
    mean_ptr, square_ptr, means_ptr, squares_ptr, pixels, tiles, c_out,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the tiles' statistics: mean and biased variance. Grid: blocks of channels.

    ROWS pixels a tile, fewer in the last. Two passes over the tiles, of which the second centres
    by the merged mean: squares[t] + count[t] * (means[t] - mean)^2, all of them positive.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < c_out
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * c_out + channels[None, :]
        count = tl.maximum(tl.minimum(pixels - t * ROWS, ROWS), 0).to(tl.float32)
        share = (count / pixels)[:, None]
        total += share * load_float32(means_ptr, at, (t < tiles)[:, None] & in_c[None, :])
    mean = tl.sum(total, 0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * c_out + channels[None, :]
        mask = (t < tiles)[:, None] & in_c[None, :]
        count = tl.maximum(tl.minimum(pixels - t * ROWS, ROWS), 0).to(tl.float32)[:, None]
        apart = load_float32(means_ptr, at, mask) - mean[None, :]
        squares = load_float32(squares_ptr, at, mask) + count * apart * apart
        total += tl.where(mask, squares, 0.0)
    tl.store(mean_ptr + channels, mean, mask=in_c)
    tl.store(square_ptr + channels, tl.sum(total, 0) / pixels, mask=in_c)
