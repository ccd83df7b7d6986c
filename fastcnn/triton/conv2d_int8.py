"""Launches the 8-bit convolutions: what is made of the scales and zero points, which kernel."""

from typing import Any

import torch
import triton
from torch import Tensor

from fastcnn.triton.conv2d_int8_kernels import conv2d_int8_kernel, depthwise_int8_kernel
from fastcnn.triton.launch import (
    Pair,
    Tile,
    blocks,
    current_device,
    depthwise_blocks,
    depthwise_tile,
    output_size,
)

ACTS = ("none", "relu", "relu6")


def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: float,
    x_zero_point: int,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int | None = None,
    act: str = "none",
    out_dtype: torch.dtype = torch.uint8,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return y by the formula at the top of fastcnn/ops/conv2d_int8.py, bit for bit.

    x is uint8 or int8 [n, c, h, w], weight int8 [c_out, c / groups, kh, kw], both channels_last, as
    is a residual. The arguments are that op's, which checks them.
    """
    (n, c_in, h, w), (c_out, c_in_group, *window) = x.shape, weight.shape
    h_out, w_out = output_size((h, w), window, stride, padding, dilation)
    y = torch.empty(
        (n, c_out, h_out, w_out),
        dtype=out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    scale = weight_scale * _float32(x_scale)
    signed_zero = x_zero_point - (128 if x.dtype == torch.uint8 else 0)
    start = -signed_zero * weight.sum((1, 2, 3), dtype=torch.int32)
    added_scale, six, limits = residual_scale, torch.tensor(6.0), (0, 0)
    if out_scale is not None:
        if bias is not None:
            start += torch.round(bias / scale).int()
            bias = None
        scale = scale / _float32(out_scale)
        six = six / _float32(out_scale)
        if residual_scale is not None:
            added_scale = float(torch.tensor(residual_scale) / _float32(out_scale))
        limits = (torch.iinfo(out_dtype).min, torch.iinfo(out_dtype).max)
    pixels, by_channel = n * h_out * w_out, groups > 1 and c_in_group == 1
    if tile is None:
        tile = depthwise_tile(c_out) if by_channel else default_tile(pixels, c_out // groups)
    tensors = (x, weight, y, start, scale.contiguous(), bias, residual)
    numbers = (
        1.0 if added_scale is None else added_scale, residual_zero_point or 0, six.item(),
        out_zero_point or 0, x_zero_point,
    )  # fmt: skip
    sizes, geometry = (n, h, w, c_in, h_out, w_out, c_out), (*window, *stride, *padding, *dilation)
    # No fused multiply-add: floating y are rounded after each operation.
    options: dict[str, Any] = {
        "ACT": ACTS.index(act), "QUANTISED": out_scale is not None, "LEAST": limits[0],
        "MOST": limits[1],
    }  # fmt: skip
    with current_device(x):
        if pixels > 0 and by_channel:
            options |= {**depthwise_blocks(tile), "enable_fp_fusion": False}
            depthwise_int8_kernel[(triton.cdiv(pixels, tile.m), triton.cdiv(c_out, tile.n))](
                *tensors, *numbers, *sizes, c_out // groups, *geometry, **options
            )
        elif pixels > 0:
            options |= {**blocks(tile), "enable_fp_fusion": False, "GROUP_M": tile.group}
            del options["PRECISION"]
            tiles = triton.cdiv(pixels, tile.m) * triton.cdiv(c_out // groups, tile.n)
            conv2d_int8_kernel[(tiles, groups)](
                *tensors, *numbers, *sizes, c_in_group, c_out // groups, *geometry,
                FLAT=c_in_group < tile.k and window != [1, 1], **options,
            )  # fmt: skip
    return y


def _float32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)


def default_tile(pixels: int, c_out: int) -> Tile:
    """Return the tile of a problem that was not measured.

    A matrix instruction takes 32 channels; 128 x 64 results, since their float64 in the epilogue
    take two registers each.
    """
    n = min(64, max(16, triton.next_power_of_2(c_out)))
    return Tile(128 if pixels * c_out >= 128 * 64 * 132 else 64, n, 64, warps=8, stages=3)
