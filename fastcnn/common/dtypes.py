"""The accumulate type: what statistics, sums and parameters have beside an image."""

import torch
from torch import Tensor


def acc_type(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums beside an input x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def new_channels(x: Tensor) -> Tensor:
    """Return an uninitialised number for each of x's channels."""
    return x.new_empty(x.shape[1], dtype=acc_type(x))


def as_acc(x: Tensor, t: Tensor | None) -> Tensor | None:
    """Return a per-channel vector as kernels take it beside x: dense, in the accumulate type."""
    acc = acc_type(x)
    # Asked first: a chain has a dozen of these calls, and nearly none has something to convert.
    return t if t is None or (t.dtype is acc and t.is_contiguous()) else t.to(acc).contiguous()
