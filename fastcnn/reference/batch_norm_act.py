"""batch_norm_act in elementary PyTorch operations, without torch's own batch norm."""

import math

import torch
from torch import Tensor

from fastcnn.ops.activation import act_number


def activation(z: Tensor, act: str) -> Tensor:
    """Apply an activation by name. A NaN comes through."""
    match act:
        case "none":
            return z
        case "relu":
            return torch.where(z <= 0, 0.0, z)
        case "relu6":
            return torch.where(z <= 0, 0.0, torch.where(z >= 6, 6.0, z))
        case "leaky_relu":
            return torch.where(z > 0, z, 0.01 * z)
        case "silu":
            return z * torch.sigmoid(z)
        case "gelu":
            return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        case "sigmoid":
            return torch.sigmoid(z)
        case "hardswish":
            return z * (z + 3).clamp(0, 6) / 6
    act_number("activation", act)  # raises, naming those there are
    raise NotImplementedError(f"activation: {act} has no reference")


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and biased var. Statistics that are not given are those of x [n, c, h, w]."""

    def column(t: Tensor) -> Tensor:
        return t[:, None, None]

    if mean is None or var is None:
        mean = x.mean((0, 2, 3))
        var = (x - column(mean)).square().mean((0, 2, 3))
    z = (x - column(mean)) / column((var + eps).sqrt())
    if weight is not None:
        z = z * column(weight)
    if bias is not None:
        z = z + column(bias)
    if residual is not None:
        z = z + residual
    return activation(z, act), mean, var
