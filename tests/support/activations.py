"""The activations as PyTorch has them: the oracle of every test that goes through one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}

# Where the slope jumps, so that a rounding of z decides about the gradient: tests stay away.
KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)
}  # fmt: skip


def near_a_kink(z: Tensor, act: str, margin: Tensor | float) -> Tensor:
    """Mark the values that are no further than the margin from a kink of the activation."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(act, ()):
        near |= (z - kink).abs() <= margin
    return near
