"""Launches the convolution's gradients: tiles, phases, parts."""

import math
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.conv_geometry import ConvGeometry, Pair
from fastcnn.common.conv_operands import Gradient, Input, Sums
from fastcnn.triton.conv2d_bwd_kernels import (
    conv2d_bwd_input_kernel,
    conv2d_bwd_weight_kernel,
    sum_tiles_kernel,
)
from fastcnn.triton.depthwise_kernels import (
    depthwise_bwd_input_kernel,
    depthwise_bwd_weight_kernel,
)
from fastcnn.triton.device import current_device, has_descriptors, matrix, multiprocessors
from fastcnn.triton.pointwise_bwd_kernels import (
    pointwise_bwd_input_kernel,
    pointwise_bwd_weight_kernel,
)
from fastcnn.triton.support import allows_tf32
from fastcnn.triton.tiles import (
    Tile,
    blocks,
    cdiv,
    default_tile,
    depthwise_blocks,
    depthwise_tile,
    half_steps,
    power_of_2,
    weight_tile,
)
from fastcnn.triton.validate import (
    check_groups,
    check_per_channel,
    check_pixels,
    check_sizes,
    check_tensors,
    checked_norm,
    checked_output_size,
)


def conv2d_bwd_input(
    d: Gradient,
    weight: Tensor,
    size: Pair,
    geometry: ConvGeometry = ConvGeometry(),  # noqa: B008 (immutable)
    add: Tensor | None = None,
    before: Input | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Sums | None]:
    """Return dx [n, c, *size] of a convolution, channels_last, and its sums with a norm before.

    d.dy is [n, c_out, h_out, w_out], weight [c_out, c / groups, kh, kw], both channels_last and of
    one type. add is added to dx. before: the convolution's input was act(norm(x)) of it; dx is
    taken back to dx * act'(norm(x)), with its sums, of itself and times xhat.
    """
    dy, (stride, padding, dilation, groups) = d.dy, geometry
    check_tensors(dy, weight, "dy")
    c_out, c_in_group, *window = weight.shape
    n, c_in, (h, w) = dy.shape[0], c_in_group * groups, size
    check_groups(c_in, c_out, groups)
    h_out, w_out = checked_output_size(size, window, stride, padding, dilation)
    check_sizes("dy", dy, (n, c_out, h_out, w_out), dy.dtype)
    behind = _behind(d)
    dx = torch.empty(
        (n, c_in, h, w), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last
    )
    check_sizes("add", add, dx.shape, dy.dtype)
    if before is not None:
        check_sizes("in_raw", before.x, dx.shape, dy.dtype)
        in_norm = checked_norm(c_in, "in_", before.norm, before.act)
    by_descriptors = has_descriptors(window, stride, padding, groups, dy, weight, behind[0])
    # Multiplied without TF32 it would spill 1.6 KB on sm_90, the kernel of addresses nothing.
    by_descriptors = by_descriptors and (dy.dtype.itemsize == 2 or allows_tf32())
    by_channel = groups > 1 and c_in_group == 1
    phases = 1 if by_channel else stride[0] * stride[1]
    # Of the phase that has most pixels.
    pixels = n * h * w
    if not by_channel:
        pixels = n * math.prod(cdiv(a, s) for a, s in zip(size, stride, strict=True))
    check_pixels(pixels)
    if tile is None and by_channel:
        tile = depthwise_tile(c_in)
    elif tile is None:
        lean = before is None
        tile = default_tile(pixels, c_in_group, c_out // groups, dy.dtype, lean)
        # Persistent programs keep more: with SiLU's gradient whole steps spilled 8 to 48 bytes.
        tile = half_steps(tile) if by_descriptors and d.norm is not None else tile
    tiles = cdiv(pixels, tile.m)
    count = 2 if before else 0
    parts = [dy.new_empty((phases * tiles, c_in), dtype=torch.float32) for _ in range(count)]
    after = (before.x, in_norm, *parts) if before else (None,) * 4
    tensors = (dy, weight, dx, *behind, add, *after)
    sizes = (n, h, w, c_in, h_out, w_out, c_out)
    acts = {"DY_ACT": d.act, "ACT": before.act if before else 0}
    with current_device(dy):
        if dx.numel() > 0 and by_channel:
            depthwise_bwd_input_kernel[(tiles, cdiv(c_in, tile.n))](
                *tensors, *sizes, c_out // groups, *window, *stride, *padding, *dilation,
                **acts, **depthwise_blocks(tile),
            )  # fmt: skip
        elif by_descriptors:
            programs = min(tiles * cdiv(c_in, tile.n), multiprocessors(dy))
            pointwise_bwd_input_kernel[(programs,)](
                matrix(dy, tile.m, tile.k), matrix(weight, tile.k, tile.n), dx,
                *_by_descriptor(behind, tile.m, tile.k), add, *after, pixels, c_in, c_out,
                **acts, **blocks(tile), GROUP_M=tile.group,
            )  # fmt: skip
        elif dx.numel() > 0:
            conv2d_bwd_input_kernel[(tiles * cdiv(c_in_group, tile.n), groups, phases)](
                *tensors, *sizes, c_in_group, c_out // groups, tiles,
                *window, *stride, *padding, *dilation,
                *(math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)),
                **acts, **blocks(tile), GROUP_M=tile.group,
            )  # fmt: skip
        sums = Sums(*(_sum(part, torch.float32) for part in parts)) if before else None
    return dx, sums


def conv2d_bwd_weight(
    d: Gradient,
    a: Input,
    window: Pair,
    geometry: ConvGeometry = ConvGeometry(),  # noqa: B008 (immutable)
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """Return dweight [c_out, c / groups, *window] of a convolution, channels_last, in x's type.

    d.dy is [n, c_out, h_out, w_out], a.x [n, c, h, w], both channels_last and of one type. parts:
    of how many the pixels' sum is made, else enough for the device's multiprocessors.
    """
    dy, x, (stride, padding, dilation, groups) = d.dy, a.x, geometry
    check_tensors(dy, x, "dy", "x")
    (n, c_in, h, w), c_out = x.shape, dy.shape[1]
    h_out, w_out = checked_output_size((h, w), window, stride, padding, dilation)
    check_sizes("dy", dy, (n, c_out, h_out, w_out), dy.dtype)
    behind = _behind(d)
    check_groups(c_in, c_out, groups)
    in_norm = checked_norm(c_in, "in_", a.norm, a.act)
    c_in_group, c_out_group, taps = c_in // groups, c_out // groups, math.prod(window)
    pixels = n * h_out * w_out
    check_pixels(pixels)
    by_descriptors = has_descriptors(window, stride, padding, groups, dy, x, behind[0])
    by_channel = groups > 1 and c_in_group == 1
    if tile is None:
        both = d.norm is not None and a.norm is not None
        sizes = (c_out_group, c_in_group, pixels)
        tile = depthwise_tile(c_out) if by_channel else weight_tile(*sizes, dy.dtype, both)
    flat = c_in_group < tile.n and taps > 1  # a tile's columns are of several taps
    if by_channel:
        grid, step = (cdiv(c_out, tile.n), taps), tile.m
    else:
        columns = cdiv(taps * c_in_group, tile.n)
        columns = columns if flat else taps * cdiv(c_in_group, tile.n)
        grid, step = (cdiv(c_out_group, tile.m) * columns, groups), tile.k
    if parts is None:  # a program for each processor, and at least 8 steps for each of them
        parts = min(cdiv(pixels, 8 * step), multiprocessors(dy) // math.prod(grid))
    pixels_a_part = cdiv(cdiv(max(pixels, 1), max(parts, 1)), step) * step
    parts = max(1, cdiv(pixels, pixels_a_part))
    sums = dy.new_empty((parts, c_out, *window, c_in_group), dtype=torch.float32)
    tensors = (dy, x, sums, *behind, in_norm)
    image, how = (n, h, w, c_in, h_out, w_out, c_out), (*window, *stride, *padding, *dilation)
    acts = {"DY_ACT": d.act, "PRE_ACT": a.act if in_norm else 0}
    with current_device(dy):
        if by_channel:
            depthwise_bwd_weight_kernel[(*grid, parts)](
                *tensors, *image, pixels_a_part, c_out_group, *how,
                **acts, **depthwise_blocks(tile),
            )  # fmt: skip
        elif by_descriptors:
            pointwise_bwd_weight_kernel[(grid[0], parts)](
                matrix(dy, tile.k, tile.m), matrix(x, tile.k, tile.n), sums,
                *_by_descriptor(behind, tile.k, tile.m), in_norm,
                pixels, c_in, c_out, pixels_a_part // step, **acts, **blocks(tile),
            )  # fmt: skip
        else:
            conv2d_bwd_weight_kernel[(*grid, parts)](
                *tensors, *image, c_in_group, c_out_group, pixels_a_part, *how,
                **acts, FLAT=flat, **blocks(tile),
            )  # fmt: skip
        dweight = _sum(sums.flatten(1), x.dtype)
    return dweight.view(c_out, *window, c_in_group).permute(0, 3, 1, 2)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    count = parts.shape[1]
    total = parts.new_empty(count, dtype=dtype)
    # As many parts at once as there are, up to 32 numbers a thread, of a sector's 8 at the least.
    rows = min(1024, power_of_2(parts.shape[0]))
    block = max(8, 1024 // rows)
    sum_tiles_kernel[(cdiv(count, block),)](
        total, parts, parts.shape[0], count, BLOCK_T=rows, BLOCK_C=block,
        num_warps=8 if rows > 256 else 4,
    )  # fmt: skip
    return total


def _behind(d: Gradient) -> tuple[Any, ...]:
    """Return what the kernels take of a batch norm behind: raw, norm, sums, 1 / count."""
    if d.norm is None:
        return None, None, None, 1.0
    c = d.dy.shape[1]
    check_sizes("out_raw", d.raw, d.dy.shape, d.dy.dtype)
    norm = checked_norm(c, "out_", d.norm, d.act)
    if d.sums is not None:
        check_per_channel(c, sum=d.sums.gradient, sum_xhat=d.sums.times_xhat)
    needed = d.act != 0 or d.sums is not None
    return d.raw if needed else None, norm, d.sums, 1 / max(d.dy.numel() // c, 1)


def _by_descriptor(behind: tuple[Any, ...], *block: int) -> tuple[Any, ...]:
    """_behind()'s, with raw as the matrix of dy's blocks."""
    raw, *rest = behind
    return None if raw is None else matrix(raw, *block), *rest
