"""What the launches of all convolution kernels share: tiles, the device, what is refused."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcnn.ops.activation import ACT_NUMBER
from fastcnn.ops.conv2d_fused import DTYPES, allows_tf32
from fastcnn.ops.norm import Norm

Pair = tuple[int, int]
MOST_IN_GRID = 65535  # of CUDA's second and third dimension
MOST_PIXELS = 2**31 - 2**16  # kernels count them in int32, with the rest of the last tile


class Tile(NamedTuple):
    """How a product is cut: pixels, output channels and summed channels of a program's step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8  # tiles of one column before the next, for the L2 cache


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own, for kernels too, takes 6 us a call on the CPU."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the first power of 2 from n on."""
    return 1 << max(n - 1, 0).bit_length()


def default_tile(pixels: int, c_out: int, c_in: int, dtype: torch.dtype, lean: bool) -> Tile:
    """Return the tile of a product [pixels, c_out] of sums over c_in that was not measured.

    128 x 128 results a program: 64 bytes of operands are read for 64 multiplications each way, near
    a H200's ratio of arithmetic to shared memory. Fewer channels get a narrower tile; few pixels a
    lower one, so that there are programs for the card's processors. Where much stands before and
    behind the product (not lean), and in float32, 128 x 128 would take more registers than a
    program has.
    """
    k, wide = (64, lean) if dtype.itemsize == 2 else (32, False)
    n = min(128 if wide else 64, max(16, power_of_2(c_out)))
    m = 128 if pixels * c_out >= 128 * 128 * 132 else 64
    k = min(k, max(16, power_of_2(c_in)))
    # What is loaded ahead stays below 128 KiB: an A100 has 163 for a program, a H200 227.
    stages = max(2, min(4, 2**17 // ((m + n) * k * dtype.itemsize)))
    return Tile(m, n, k, warps=8 if m * n >= 128 * 64 else 4, stages=stages)


def weight_tile(c_out: int, c_in: int, pixels: int, dtype: torch.dtype, both: bool) -> Tile:
    """Return the tile of dweight [c_out, c_in] of sums over pixels.

    Where batch norms stand before both operands (both) the registers of 128 x 128 results suffice
    for half a step; a narrower tile would make the operands more often.
    """
    tile = default_tile(c_out, c_in, pixels, dtype, lean=True)
    return half_steps(tile) if both and tile.m * tile.n == 128**2 else tile


def half_steps(tile: Tile) -> Tile:
    """Return the tile with fewer summed channels a step, for want of registers."""
    return tile._replace(k=max(16, tile.k // 2))


def depthwise_tile(c: int) -> Tile:
    """Return the tile of a depthwise convolution: whole cache lines of channels."""
    n = min(64, max(16, power_of_2(c)))
    return Tile(128, n, 1, warps=8 if n == 64 else 4, stages=2)


def depthwise_blocks(tile: Tile) -> dict[str, Any]:
    """Return the tile as options of a launch without a matrix product."""
    return {k: v for k, v in blocks(tile).items() if k not in ("PRECISION", "BLOCK_K")}


def is_lean(prologue: bool, residual: bool, by_descriptors: bool, arch: int) -> bool:
    """Whether 128 x 128 results a program leave registers for what stands before and behind.

    By descriptors programs stay and keep more: on sm_90 an epilogue with a norm and a residual
    spilled 8 bytes. tests/test_conv2d_triton_compiled.py looks for spills.
    """
    if by_descriptors:
        return arch < 100 and not prologue and not residual
    return not (prologue and residual)


def blocks(tile: Tile) -> dict[str, Any]:
    """Return the tile as options of a launch."""
    return {
        "PRECISION": "tf32" if allows_tf32() else "ieee",
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def arch_of(t: Tensor) -> int:
    """Return 90 for sm_90; in the interpreter, too, so that its kernels run there."""
    if t.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def processors(x: Tensor) -> int:
    """The card's, on which as many programs run at once at the least."""
    if x.device.type != "cuda":
        return 3  # in the interpreter: fewer than there are tiles, so that programs take several
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def has_descriptors(
    window: Sequence[int], stride: Pair, padding: Pair, groups: int, *tensors: Tensor | None
) -> bool:
    """Whether the convolution is one product of matrices, and the TMA unit can read its operands.

    That has sm_90 on; it takes 16 bytes at a time: rows of channels, first to last.
    """
    given = [t for t in tensors if t is not None]
    return (
        groups == 1
        and (*window, *stride, *padding) == (1, 1, 1, 1, 0, 0)
        and arch_of(given[0]) >= 90
        and all(t.data_ptr() % 16 == 0 and t.shape[1] * t.itemsize % 16 == 0 for t in given)
        and all(t.numel() > 0 for t in given)
    )


def matrix(t: Tensor, *block: int) -> TensorDescriptor:
    """Return [pixels, channels] of an image, or [c_out, c_in] of weights, to be read in blocks."""
    c = t.shape[1]
    return TensorDescriptor(t, [t.numel() // c, c], [c, 1], list(block))


def current_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def output_size(
    image: Pair, window: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, ...]:
    """Return the height and width of a convolution's output, or raise ValueError."""
    for name, pair, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"conv2d: {name}: expected two numbers from {least} on, got {pair}")
    sides = zip(image, window, stride, padding, dilation, strict=True)
    sizes = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides)
    if min(sizes) < 1:
        raise ValueError(
            f"conv2d: weight: expected a window that fits, got {tuple(window)} with "
            f"dilation={dilation}, larger than the padded image: {image} with padding={padding}"
        )
    return sizes


def check_tensors(x: Tensor, weight: Tensor, *names: str) -> None:
    """Raise ValueError naming what is supported."""
    first, second = (*names, *("x", "weight")[len(names) :])
    if x.dtype not in DTYPES or weight.dtype is not x.dtype:
        raise ValueError(
            f"conv2d: expected {first} and {second} of one type of float16, bfloat16 and float32, "
            f"got {x.dtype} and {weight.dtype}"
        )
    for name, t in ((first, x), (second, weight)):
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


def check_groups(c_in: int, c_out: int, groups: int) -> None:
    """Raise ValueError for groups that do not divide the channels, or are too many to launch."""
    if groups < 1 or c_in % groups != 0 or c_out % groups != 0:
        raise ValueError(f"conv2d: groups: expected a divisor of {c_in} and {c_out}, got {groups}")
    if groups > MOST_IN_GRID and c_in != groups:
        raise ValueError(
            f"conv2d: groups: expected at most {MOST_IN_GRID} of several channels, got {groups}"
        )


def check_numbers(channels: int, **numbers: Tensor | None) -> None:
    """Raise ValueError for numbers that are not one a channel, or of another type."""
    for name, t in numbers.items():
        if t is not None and (
            tuple(t.shape) != (channels,) or not t.is_contiguous() or t.dtype not in DTYPES
        ):
            raise ValueError(
                f"conv2d: {name}: expected [{channels}], contiguous, of float16, bfloat16 or "
                f"float32, got {tuple(t.shape)} with strides {t.stride()} of {t.dtype}"
            )


def checked_norm(channels: int, name: str, norm: Norm | None, act: int) -> Norm | None:
    """Return the batch norm with a weight and a bias, as kernels take it.

    Triton 3.6, torch 2.11's, cannot ask of a tuple with a None in it whether it is None.

    Raises:
        ValueError: a batch norm of other channels, or an act behind it that is none.
    """
    if norm is not None:
        tensors = {f"{name}norm.{k}": getattr(norm, k) for k in norm._fields[:4]}
        check_numbers(channels, **tensors)
    if act not in ACT_NUMBER.values():
        raise ValueError(
            f"conv2d: {name}act: expected a number from 0 to {len(ACT_NUMBER) - 1}, got {act!r}"
        )
    if norm is None:
        return None
    weight = torch.ones_like(norm.mean) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.mean) if norm.bias is None else norm.bias
    return norm._replace(weight=weight, bias=bias)
