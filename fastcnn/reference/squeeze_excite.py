"""squeeze_excite in plain PyTorch."""

import torch
from torch import Tensor

from fastcnn.common.activation import activation


def squeeze_excite(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Return y of x [n, c, h, w] and weights [c_out, c_in, 1, 1]."""
    z = _fc(x.flatten(2).sum(2) / (x.shape[2] * x.shape[3]), fc1_weight, fc1_bias)
    if fc2_weight is not None:
        z = _fc(activation(z, act), fc2_weight, fc2_bias)
    scale = torch.sigmoid(z) if gate == "sigmoid" else (z / 6 + 0.5).clamp(0, 1)
    return x * scale[:, :, None, None]


def _fc(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = t @ weight[:, :, 0, 0].t()
    return z if bias is None else z + bias
