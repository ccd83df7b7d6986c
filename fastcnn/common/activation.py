"""The activations by name, and the number that the operator schemas carry for each."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.checks import check_choice

Activation = Literal["none", "relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "hardswish"]

# csrc/common/activation.h holds the same table.
ACT_NUMBER: dict[str, int] = {name: number for number, name in enumerate(get_args(Activation))}

# Those whose derivative can be read off y = act(z); the others need z.
_DERIVATIVE_NEEDS_ONLY_Y = {ACT_NUMBER[name] for name in ("none", "relu", "relu6")}


def derivative_needs_only_y(act: int) -> bool:
    """Whether d act / dz can be read off y = act(z), by the schema's number."""
    return act in _DERIVATIVE_NEEDS_ONLY_Y


def act_number(op: str, act: str) -> int:
    """Return the schema's number of an activation, or raise ValueError naming those there are."""
    check_choice(op, "act", act, ACT_NUMBER)
    return ACT_NUMBER[act]


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


def eager_activation(z: Tensor, act: str, inplace: bool = False) -> Tensor:
    """Apply an activation by name as PyTorch does; gelu always makes a tensor of its own."""
    if act == "none":
        return z
    if act == "gelu":
        return F.gelu(z)
    if act == "sigmoid":
        return z.sigmoid_() if inplace else z.sigmoid()
    run: Callable[..., Tensor] = getattr(F, act)  # named as they are here
    return run(z, inplace=inplace)
