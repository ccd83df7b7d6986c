"""The baseline of every comparison: the same network, run by plain PyTorch operations."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.resnet import Chained
from fastcnn.nn.conv_bn_act import Step
from fastcnn.ops.conv_bn_act_step import Memory

__all__ = ["eager_twin"]

Model = TypeVar("Model", bound=nn.Module)


def _identity(x: Tensor) -> Tensor:
    return x


# In place, as torchvision's models run them: eager PyTorch at its best in time and in memory.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid_,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}


def _eager_conv_bn_act(
    x: Tensor,
    steps: Sequence[Step],
    residual: Tensor | Sequence[Step] | None = None,
    memory: Memory = "default",
) -> Tensor:
    """What fastcnn.nn.conv_bn_act computes, as PyTorch users write it: one kernel an operation."""
    if residual is not None and not isinstance(residual, Tensor):
        residual = _eager_conv_bn_act(x, residual)
    for i, (conv, bn, *pool) in enumerate(steps, start=1):
        x = nn.BatchNorm2d.forward(bn, conv(x))
        if residual is not None and i == len(steps):
            x += residual
        x = _ACTIVATIONS[bn.act](x)
        for module in pool:
            x = module(x)
    return x


def eager_twin(model: Model) -> Model:
    """A copy of a fastcnn.models network whose chains run as nn.Conv2d, nn.BatchNorm2d, F.relu_.

    The twin has its own parameters and buffers with the same values and keys, and no memory levels;
    `model` is left as it is.

    Raises:
        TypeError: `model` has no chains, so that its copy would be no baseline.
    """
    twin = copy.deepcopy(model)
    chained = [module for module in twin.modules() if isinstance(module, Chained)]
    if not chained:
        raise TypeError(f"model: expected a network of fastcnn.models, got {type(model).__name__}")
    for module in chained:
        module.chain = _eager_conv_bn_act
        module.memory = "default"
    return twin
