"""The gradients of a 1x1 convolution without stride, by descriptors: two products of matrices.

    dx[q, i] = sum over channels o of g[q, o] * w[o, i]    g, a, epilogue: as conv2d_bwd_kernels.py
    dw[o, i] = sum over pixels p of g[p, o] * a[p, i]

Descriptors are copied by the TMA unit on sm_90 and later, as for pointwise_kernel: dy, raw, x are
[pixels, channels], w is [c_out, c_in]. The operands' loads have no addresses and no masks; what
lies outside a matrix is 0, and 0 again after a batch norm made something of it.

Floors, in images: dx reads dy, raw and what its epilogue needs, and writes dx; dw reads dy, raw and
x. w, dw and the parts are small beside them. A second tile of dx's channels, or of dw, finds its
operands in the L2 cache: neighbouring programs share them.

What a program keeps: dx, only its place in the list of tiles: the next tile's loads may begin while
the last one's stores are under way; dw, its BLOCK_M x BLOCK_N sums over its part of the pixels and
its channels' coefficients, made once. Between load and product g, and a with a prologue, pass
through registers; without norms both operands of the product stay in shared memory.
"""

# Constexpr parameters have capitals: a kernel is compiled anew for each of their values.
import triton
import triton.language as tl

from fastcnn.triton.conv2d_bwd_kernels import gradient_per_channel, through_norm, write_gradient
from fastcnn.triton.conv2d_kernels import apply_prologue, per_channel, tile_of


@triton.jit
def _block_of(dy_matrix, raw_matrix, sums, row, column, inside, at_channels, ACT: tl.constexpr):
    """Return the block of g whose first pixel is row and whose first channel is column."""
    g = dy_matrix.load([row, column])
    if at_channels is not None:
        raw = None
        if raw_matrix is not None:
            raw = raw_matrix.load([row, column])
        g = through_norm(g, raw, sums, inside, at_channels, ACT)
    return g


@triton.jit(do_not_specialize=["pixels"])
def pointwise_bwd_input_kernel(
    dy_matrix, w_matrix, dx_ptr, dy_raw_matrix, dy_norm, dy_sums, share,
    add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr, pixels, c_in, c_out,
    DY_ACT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Dx. Grid: persistent programs, which of n take every n-th tile."""
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(c_in, BLOCK_N)
    for program in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(program, tiles_m, tiles_n, GROUP_M)
        q = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        i = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_q, in_i = q < pixels, i < c_in
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(c_out, BLOCK_K)):
            o = step * BLOCK_K + tl.arange(0, BLOCK_K)
            in_o = o < c_out
            at_channels = None
            if dy_norm is not None:
                at_channels = gradient_per_channel(dy_norm, dy_sums, share, o, in_o)
            g = _block_of(
                dy_matrix, dy_raw_matrix, dy_sums, tile_m * BLOCK_M, step * BLOCK_K,
                in_q[:, None] & in_o[None, :], at_channels, DY_ACT,
            )  # fmt: skip
            weights = w_matrix.load([step * BLOCK_K, tile_n * BLOCK_N])
            acc = tl.dot(g, weights, acc, input_precision=PRECISION)
        at = q.to(tl.int64)[:, None] * c_in + i[None, :]
        write_gradient(
            acc, tile_m, at, in_q, i, in_i, c_in, dx_ptr,
            add_ptr, raw_ptr, norm, sum_ptr, sum_xhat_ptr, ACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "steps_a_part"])
def pointwise_bwd_weight_kernel(
    dy_matrix, x_matrix, parts_ptr, dy_raw_matrix, dy_norm, dy_sums, share, pre_norm,
    pixels, c_in, c_out, steps_a_part,
    DY_ACT: tl.constexpr, PRE_ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of dw, in float32 [parts, c_out, c_in]. Grid: tiles of one part, parts.

    A part is whole steps, so that only the last can end within a block: where the pixels end.
    """
    tiles_m = tl.cdiv(c_out, BLOCK_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    part = tl.program_id(1)
    o = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o, in_i = o < c_out, i < c_in
    g_coefficients, a_coefficients = None, None
    if dy_norm is not None:
        g_coefficients = gradient_per_channel(dy_norm, dy_sums, share, o, in_o)
    if pre_norm is not None:
        a_coefficients = per_channel(pre_norm, i, in_i)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * steps_a_part
    for step in range(first, tl.minimum(first + steps_a_part, tl.cdiv(pixels, BLOCK_K))):
        start = step * BLOCK_K
        in_p = (start + tl.arange(0, BLOCK_K) < pixels)[:, None]
        g = _block_of(
            dy_matrix, dy_raw_matrix, dy_sums, start, tile_m * BLOCK_M,
            in_p & in_o[None, :], g_coefficients, DY_ACT,
        )  # fmt: skip
        a = x_matrix.load([start, tile_n * BLOCK_N])
        if pre_norm is not None:
            a = apply_prologue(a, in_p & in_i[None, :], a_coefficients, PRE_ACT)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
    at = (part.to(tl.int64) * c_out + o)[:, None] * c_in + i[None, :]
    tl.store(parts_ptr + at, acc, mask=in_o[:, None] & in_i[None, :])
