"""Launches the 8-bit convolutions: which kernel, which tile."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops.conv2d_int8.arguments import OP, Call, quotient
from fastcnn.triton.conv2d_int8_kernels import conv2d_int8_kernel, depthwise_int8_kernel
from fastcnn.triton.device import current_device
from fastcnn.triton.tiles import Tile, blocks, cdiv, depthwise_blocks, depthwise_tile, power_of_2
from fastcnn.triton.validate import MOST_IN_GRID, MOST_PIXELS


def launch(call: Call, sums: Tensor, y: Tensor, tile: Tile | None = None) -> None:
    """Write y by the formula at the top of fastcnn/ops/conv2d_int8/interface.py, bit for bit.

    The arguments are that op's, which has checked them; sums are those of each output channel's
    weights, int32. y is channels_last; x, weight and residual that are not are copied.
    """
    last = torch.channels_last
    x, weight = (t.contiguous(memory_format=last) for t in (call.x, call.weight))
    residual = None if call.residual is None else call.residual.contiguous(memory_format=last)
    (n, c_in, h, w), (c_out, c_in_group, *window) = x.shape, weight.shape
    h_out, w_out = y.shape[2:]
    groups, quantised = call.groups, call.out_scale is not None
    pixels, by_channel = n * h_out * w_out, groups > 1 and c_in_group == 1
    if pixels == 0:
        return
    _check_sizes(call, y, by_channel)
    if tile is None:
        sizes_of_group = (c_out // groups, c_in_group)
        tile = depthwise_tile(c_out) if by_channel else default_tile(pixels, *sizes_of_group)
    vectors = (None if t is None else t.contiguous() for t in (call.weight_scale, call.bias))
    # fl of products and quotients of one number each; those of channels are the kernel's.
    numbers = (
        call.scale(),
        call.out_scale if quantised else 1.0,
        call.added_scale(),
        quotient(6.0, call.out_scale),
        call.x_zero_point,
        call.residual_zero_point or 0,
        call.out_zero_point or 0,
    )
    tensors = (x, weight, y, sums, *vectors, residual)
    sizes = (n, h, w, c_in, h_out, w_out, c_out)
    geometry = (*window, *call.stride, *call.padding, *call.dilation)
    limits = torch.iinfo(y.dtype) if quantised else None
    # No fused multiply-add: each operation is rounded.
    options: dict[str, Any] = {
        "ACT": call.act,
        "QUANTISED": quantised,
        "LEAST": limits.min if limits else 0,
        "MOST": limits.max if limits else 0,
    }
    with current_device(x):
        if by_channel:
            options |= {**depthwise_blocks(tile), "enable_fp_fusion": False}
            depthwise_int8_kernel[(cdiv(pixels, tile.m), cdiv(c_out, tile.n))](
                *tensors, *numbers, *sizes, c_out // groups, *geometry, **options
            )
        else:
            options |= {**blocks(tile), "enable_fp_fusion": False, "GROUP_M": tile.group}
            del options["PRECISION"]
            tiles = cdiv(pixels, tile.m) * cdiv(c_out // groups, tile.n)
            conv2d_int8_kernel[(tiles, groups)](
                *tensors, *numbers, *sizes, c_in_group, c_out // groups, *geometry,
                FLAT=c_in_group < tile.k and window != [1, 1],
                ZERO_FILL=call.x_zero_point == 0 or max(call.padding) == 0, **options,
            )  # fmt: skip


def _check_sizes(call: Call, y: Tensor, by_channel: bool) -> None:
    n, _, h_out, w_out = y.shape
    sides = [size + 2 * p for size, p in zip(call.x.shape[2:], call.padding, strict=True)]
    if max(n * h_out * w_out, *sides) > MOST_PIXELS:
        raise ValueError(
            f"{OP}: x: expected at most {MOST_PIXELS} pixels in y, and rows and columns in a "
            f"padded image, on CUDA, got {list(call.x.shape)} for {list(y.shape)}"
        )
    if call.groups > MOST_IN_GRID and not by_channel:
        raise ValueError(
            f"{OP}: groups: expected at most {MOST_IN_GRID} on CUDA, or one input channel each, "
            f"got {call.groups}"
        )


def default_tile(pixels: int, c_out: int, c_in: int) -> Tile:
    """Return the tile of a problem that was not measured.

    A matrix instruction takes 32 channels; 128 x 128 results where each multiprocessor then has a
    program, since one of 128 x 64 issues as much for half the products; steps of 128 channels where
    they come out even, half as many.
    """
    results = pixels * c_out
    m = 128 if results >= 128 * 64 * 132 else 64
    n = min(128 if results >= 128 * 128 * 132 else 64, max(16, power_of_2(c_out)))
    return Tile(m, n, 64 if c_in % 128 else 128, warps=8, stages=3)
