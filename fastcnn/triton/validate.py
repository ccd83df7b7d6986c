"""What the launches refuse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_geometry import Pair, output_size
from fastcnn.triton.support import DTYPES

MOST_IN_GRID = 65535  # of CUDA's second and third dimension
MOST_PIXELS = 2**31 - 2**16  # kernels count them in int32, with the rest of the last tile


def checked_output_size(
    image: Pair, window: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """Return the height and width of a convolution's output, or raise ValueError."""
    for name, pair, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"conv2d: {name}: expected two numbers from {least} on, got {pair}")
    h, w = output_size(image, window, stride, padding, dilation)
    if min(h, w) < 1:
        raise ValueError(
            f"conv2d: weight: expected a window that fits, got {tuple(window)} with "
            f"dilation={dilation}, larger than the padded image: {image} with padding={padding}"
        )
    return h, w


def check_tensors(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError naming what is supported."""
    if x.dtype not in DTYPES or weight.dtype is not x.dtype:
        raise ValueError(
            f"conv2d: expected x and weight of one type of float16, bfloat16 and float32, "
            f"got {x.dtype} and {weight.dtype}"
        )
    for name, t in (("x", x), ("weight", weight)):
        if t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"conv2d: {name}: expected 4 dimensions in channels_last, got shape "
                f"{tuple(t.shape)} with strides {t.stride()}: use "
                f".contiguous(memory_format=torch.channels_last)"
            )


def check_sizes(name: str, t: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError for an image of other sizes, another type or layout."""
    if t is None:
        return
    dense = t.is_contiguous(memory_format=torch.channels_last)
    if list(t.shape) != list(sizes) or t.dtype is not dtype or not dense:
        raise ValueError(
            f"conv2d: {name}: expected {tuple(sizes)} of {dtype} in channels_last, got "
            f"{tuple(t.shape)} of {t.dtype} with strides {t.stride()}"
        )


def check_pixels(pixels: int) -> None:
    """Raise ValueError for more than a kernel can count."""
    if pixels > MOST_PIXELS:
        raise ValueError(f"conv2d: expected at most {MOST_PIXELS} pixels, got {pixels}")


def check_groups(x: Tensor, weight: Tensor, groups: int) -> None:
    """Raise ValueError for groups that do not divide the channels, or are too many to launch."""
    c_in = x.shape[1]
    if groups < 1 or c_in != weight.shape[1] * groups or weight.shape[0] % groups != 0:
        raise ValueError(
            f"conv2d: expected weight [c_out, c / groups, kh, kw] with groups dividing c_out and "
            f"c = {c_in}, got {tuple(weight.shape)} with groups={groups}"
        )
    if groups > MOST_IN_GRID and c_in != groups:
        raise ValueError(
            f"conv2d: groups: expected at most {MOST_IN_GRID} of several channels, got {groups}"
        )


def check_per_channel(channels: int, **tensors: Tensor | None) -> None:
    """Raise ValueError for tensors that are not one number a channel, or of another type."""
    for name, t in tensors.items():
        if t is not None and (
            tuple(t.shape) != (channels,) or not t.is_contiguous() or t.dtype not in DTYPES
        ):
            raise ValueError(
                f"conv2d: {name}: expected [{channels}], contiguous, of float16, bfloat16 or "
                f"float32, got {tuple(t.shape)} with strides {t.stride()} of {t.dtype}"
            )


def check_act(act: int) -> None:
    """Raise ValueError for an activation's number that is none."""
    if act not in ACT_NUMBER.values():
        raise ValueError(
            f"conv2d: act: expected a number from 0 to {len(ACT_NUMBER) - 1}, got {act!r}"
        )


def checked_norm(channels: int, norm: Norm | None) -> Norm | None:
    """Return the batch norm with a weight and a bias, as kernels take it.

    Triton 3.6, torch 2.11's, cannot ask of a tuple with a None in it whether it is None.

    Raises:
        ValueError: a batch norm of other channels.
    """
    if norm is None:
        return None
    check_per_channel(channels, **{f"bn_{k}": getattr(norm, k) for k in norm._fields[:4]})
    weight = torch.ones_like(norm.mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.mean) if norm.bias is None else norm.bias
    return norm._replace(weight=weight, bias=bias)
