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

# Where the derivative jumps, so that a rounding of z decides about the gradient: tests stay away.
NONDIFFERENTIABLE: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "hardswish": (-3.0, 3.0),
}


def near_nondifferentiable(z: Tensor, act: str, margin: Tensor | float) -> Tensor:
    """Mark the values within the margin of a point where the activation is not differentiable."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for point in NONDIFFERENTIABLE.get(act, ()):
        near |= (z - point).abs() <= margin
    return near
