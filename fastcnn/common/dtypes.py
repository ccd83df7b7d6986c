"""New tensors beside an image, and the accumulate type of statistics, sums and parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def acc_type(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums beside an input x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def new_channels(x: Tensor) -> Tensor:
    """Return an uninitialised number for each of x's channels."""
    return x.new_empty(x.shape[1], dtype=acc_type(x))


def new_image(x: Tensor, sizes: Sequence[Any], channels_last: bool) -> Tensor:
    """Return uninitialised numbers of x's dtype on its device in a layout."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=format)


def as_acc(x: Tensor, t: Tensor | None) -> Tensor | None:
    """Return a per-channel vector as kernels take it beside x: dense, in the accumulate type."""
    acc = acc_type(x)
    # Asked first: a chain has a dozen of these calls, and nearly none has something to convert.
    return t if t is None or (t.dtype is acc and t.is_contiguous()) else t.to(acc).contiguous()
