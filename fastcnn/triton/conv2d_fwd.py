"""Launches the convolution kernels: which kernel, which tile, what is refused."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.triton.conv2d_kernels import (
    conv2d_kernel,
    merge_statistics_kernel,
    pointwise_kernel,
)
from fastcnn.triton.depthwise_kernels import depthwise_kernel
from fastcnn.triton.device import arch_of, current_device, has_descriptors, matrix, multiprocessors
from fastcnn.triton.tiles import (
    Tile,
    blocks,
    cdiv,
    default_tile,
    depthwise_blocks,
    depthwise_tile,
    is_lean,
    power_of_2,
)
from fastcnn.triton.validate import (
    check_act,
    check_groups,
    check_pixels,
    check_sizes,
    check_tensors,
    checked_norm,
    checked_output_size,
)


class Statistics(NamedTuple):
    """Of each channel of the product: mean and biased variance, in float32."""

    mean: Tensor
    var: Tensor


def conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry = ConvGeometry(),  # noqa: B008 (immutable)
    behind: Epilogue = Epilogue(),  # noqa: B008 (immutable)
    tile: Tile | None = None,
) -> tuple[Tensor, Statistics | None]:
    """Return the convolution with what stands behind it, and its statistics if asked.

    x is [n, c, h, w], weight [c_out, c / groups, kh, kw], both channels_last and of one type of
    DTYPES; float32 is multiplied as allows_tf32() says. tile: another than default_tile() would
    take.
    """
    stride, padding, dilation, groups = geometry
    check_tensors(x, weight)
    check_groups(x, weight, groups)
    check_act(behind.act)
    norm = checked_norm(weight.shape[0], behind.norm)
    n, c_in, h, w = x.shape
    c_out, c_in_group, *window = weight.shape
    h_out, w_out = checked_output_size((h, w), window, stride, padding, dilation)
    y = torch.empty(
        (n, c_out, h_out, w_out), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    check_sizes("residual", behind.residual, y.shape, x.dtype)
    pixels, asked = n * h_out * w_out, behind.statistics
    check_pixels(pixels)
    by_descriptors = has_descriptors(x, weight, stride, padding, groups)
    by_channel = groups > 1 and c_in_group == 1
    if tile is None and by_channel:
        tile = depthwise_tile(c_out)
    elif tile is None:
        lean = is_lean(behind.residual is not None, by_descriptors, arch_of(x))
        tile = default_tile(pixels, c_out // groups, c_in_group, x.dtype, lean)
    tiles_m, tiles_n = cdiv(pixels, tile.m), cdiv(c_out // groups, tile.n)
    parts = [x.new_empty((tiles_m, c_out), dtype=torch.float32) for _ in range(2 * asked)]
    epilogue = (norm, behind.residual, *(parts or (None, None)))
    options = {"ACT": behind.act, **blocks(tile), "GROUP_M": tile.group}
    with current_device(x):
        if pixels == 0:
            pass
        elif by_descriptors:
            programs = min(tiles_m * tiles_n, multiprocessors(x))
            matrices = (matrix(x, tile.m, tile.k), matrix(weight, tile.n, tile.k))
            sizes = (pixels, c_in, c_out)
            pointwise_kernel[(programs,)](*matrices, y, *epilogue, *sizes, **options)
        elif by_channel:
            depthwise_kernel[(tiles_m, cdiv(c_out, tile.n))](
                x, weight, y, *epilogue, n, h, w, c_in, h_out, w_out, c_out, c_out // groups,
                *window, *stride, *padding, *dilation, ACT=behind.act, **depthwise_blocks(tile),
            )  # fmt: skip
        else:
            conv2d_kernel[(tiles_m * tiles_n, groups)](
                x, weight, y, *epilogue,
                n, h, w, c_in, h_out, w_out, c_out, c_in_group, c_out // groups,
                *window, *stride, *padding, *dilation,
                FLAT=c_in_group < tile.k and window != [1, 1], **options,
            )  # fmt: skip
        return y, _merged(parts, pixels, tile.m) if asked else None


def _merged(parts: list[Tensor], pixels: int, rows: int) -> Statistics:
    means, squares = parts
    tiles, c_out = means.shape
    mean, var = (means.new_empty(c_out) for _ in range(2))
    # 8 channels, a sector of 32 bytes, and as many tiles at once as there are, up to 32 numbers a
    # thread: few channels are few programs, whose steps wait for memory one after the other.
    at_once = min(1024, max(16, power_of_2(tiles)))
    merge_statistics_kernel[(cdiv(c_out, 8),)](
        mean, var, means, squares, pixels, tiles, c_out, ROWS=rows, BLOCK_T=at_once, BLOCK_C=8,
        num_warps=8 if at_once > 256 else 4,
    )  # fmt: skip
    return Statistics(mean, var)
