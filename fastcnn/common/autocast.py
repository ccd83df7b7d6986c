"""What autocast does to the arguments of a convolution, and computing without it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(x: Any) -> torch.dtype | None:
    """Return what autocast casts x to, or None where it is off."""
    # Autocast does not know the meta device.
    if not isinstance(x, Tensor) or x.device.type == "meta":
        return None
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else None


def cast_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of cast(t, dtype)."""
    return t.dtype if dtype is None or t.dtype not in _AUTOCAST_FROM else dtype


def cast(t: Any, dtype: torch.dtype | None) -> Any:
    """Cast as autocast does for a convolution: every floating type but float64."""
    if dtype is None or not isinstance(t, Tensor) or t.dtype not in _AUTOCAST_FROM:
        return t
    return t.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast casts nothing on x's device."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
