"""dropout in elementary PyTorch operations: Philox in int64, one counter an element."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Return four words of 32 bits for counter [..., 4] and key [..., 2], all as int64.

    A product of two words wraps around in int64 and keeps its 64 bits.
    """
    (c0, c1, c2, c3), (k0, k1) = counter.unbind(-1), key.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def draws(seed: int, index: Tensor) -> Tensor:
    """Return u(i), 32 bits each, for logical indices i: csrc/common/keep.h has the formula."""
    key = torch.tensor([seed & _MASK, seed >> 32 & _MASK])
    block, place = index // 8, index % 8
    u = torch.zeros_like(index)
    for stream in (0, 1):
        counter = [block & _MASK, block >> 32, torch.full_like(block, stream), 0 * block]
        words = philox4x32_10(torch.stack(counter, -1), key)
        word = words.gather(-1, (place // 2)[..., None])[..., 0]
        u = u << 16 | word >> 16 * (place % 2) & 0xFFFF
    return u


def threshold(p: float) -> int:
    """Return how many of the 2^32 draws are kept: 0 for p = 1, else 1 ... 2^32 - 1."""
    return 0 if p == 1 else min(max(math.floor((1 - p) * 2**32 + 0.5), 1), 2**32 - 1)


def dropout(
    x: Tensor, seed: int, p: float, residual: Tensor | None = None, per_channel: bool = False
) -> Tensor:
    """Return x * keep * scale + residual for p > 0; indices count in x's dimensions' order."""
    shape = x.shape
    if per_channel:
        shape = torch.Size([*x.shape[:2], *(1 for _ in x.shape[2:])])
    keep = draws(seed, torch.arange(shape.numel())).reshape(shape) < threshold(p)
    y = x * (keep.to(x.dtype) * (2**32 / max(threshold(p), 1)))
    return y if residual is None else y + residual
