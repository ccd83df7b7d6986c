"""How convolutions are cut into tiles, where nothing was measured."""

from typing import Any, NamedTuple

import torch

from fastcnn.triton.support import allows_tf32


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
    lower one, so that each multiprocessor has a program. Where much stands behind the product (not
    lean), and in float32, 128 x 128 would take more registers than a program has.
    """
    k, wide = (64, lean) if dtype.itemsize == 2 else (32, False)
    n = min(128 if wide else 64, max(16, power_of_2(c_out)))
    m = 128 if pixels * c_out >= 128 * 128 * 132 else 64
    k = min(k, max(16, power_of_2(c_in)))
    # What is loaded ahead stays below 128 KiB: an A100 has 163 for a program, a H200 227.
    stages = max(2, min(4, 2**17 // ((m + n) * k * dtype.itemsize)))
    return Tile(m, n, k, warps=8 if m * n >= 128 * 64 else 4, stages=stages)


def depthwise_tile(c: int) -> Tile:
    """Return the tile of a depthwise convolution: whole cache lines of channels."""
    n = min(64, max(16, power_of_2(c)))
    return Tile(128, n, 1, warps=8 if n == 64 else 4, stages=2)


def depthwise_blocks(tile: Tile) -> dict[str, Any]:
    """Return the tile as options of a launch without a matrix product."""
    return {k: v for k, v in blocks(tile).items() if k not in ("PRECISION", "BLOCK_K")}


def is_lean(residual: bool, by_descriptors: bool, arch: int) -> bool:
    """Whether 128 x 128 results a program leave registers for what stands behind.

    By descriptors programs stay and keep more: on sm_90 an epilogue with a norm and a residual
    spilled 8 bytes. tests/ops/conv2d/test_triton_compiled.py looks for spills.
    """
    return not by_descriptors or (arch < 100 and not residual)


def blocks(tile: Tile) -> dict[str, Any]:
    """Return the tile as options of a launch."""
    return {
        "PRECISION": "tf32" if allows_tf32() else "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
