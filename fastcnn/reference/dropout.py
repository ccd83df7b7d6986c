"""dropout in elementary PyTorch operations: Philox in int64, one counter an element."""

import math

import torch
from torch import Tensor

from fastcnn.common.philox import LOW, philox4x32_10


def draws(seed: int, index: Tensor) -> Tensor:
    """Return u(i), 32 bits each, for logical indices i, as csrc/common/dropout_mask.h has it."""
    block, place = index // 8, index % 8
    u = torch.zeros_like(index)
    for stream in (0, 1):
        counter = [block & LOW, block >> 32, torch.full_like(block, stream), 0 * block]
        word = philox4x32_10(torch.stack(counter), seed).gather(0, (place // 2)[None])[0]
        u = u << 16 | word >> 16 * (place % 2) & 0xFFFF
    return u


def threshold(p: float) -> int:
    """Return how many of the 2^32 draws are kept: none or all only for p = 1 or 0."""
    if p in (0, 1):
        return 0 if p == 1 else 2**32
    return min(max(math.floor((1 - p) * 2**32 + 0.5), 1), 2**32 - 1)


def dropout(
    x: Tensor, seed: int, p: float, residual: Tensor | None = None, per_channel: bool = False
) -> Tensor:
    """Return x * keep * scale + residual; indices count in x's dimensions' order."""
    shape = x.shape
    if per_channel:
        shape = torch.Size([*x.shape[:2], *(1 for _ in x.shape[2:])])
    keep = draws(seed, torch.arange(shape.numel(), device=x.device)).reshape(shape) < threshold(p)
    y = x * (keep.to(x.dtype) * (2**32 / max(threshold(p), 1)))
    return y if residual is None else y + residual
