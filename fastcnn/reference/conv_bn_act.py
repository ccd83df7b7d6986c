"""conv_bn_act in plain PyTorch, one operation after the other: autograd keeps every activation."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops.conv_bn_act.step import ConvBnActBlock, ConvBnActStep
from fastcnn.reference.batch_norm_act import batch_norm_act


def conv_bn_act(
    x: Tensor,
    steps: Sequence[ConvBnActStep],
    residual: Tensor | Sequence[ConvBnActStep] | None = None,
) -> Tensor:
    """Return the output of one block, by this process's batch alone; running statistics stay."""
    if residual is not None and not isinstance(residual, Tensor):
        residual = conv_bn_act(x, residual)
    for i, s in enumerate(steps, start=1):
        raw = F.conv2d(x, s.weight, s.conv_bias, s.stride, s.padding, s.dilation, s.groups)
        mean, var = (None, None) if s.training else (s.running_mean, s.running_var)
        added = residual if i == len(steps) else None
        x, _, _ = batch_norm_act(raw, s.bn_weight, s.bn_bias, mean, var, added, s.eps, s.act)
        if s.pool is not None:
            x = F.max_pool2d(x, *s.pool)
    return x


def conv_bn_act_blocks(x: Tensor, blocks: Sequence[ConvBnActBlock]) -> Tensor:
    """Return the output of blocks one after the other."""
    for block in blocks:
        x = conv_bn_act(x, *block)
    return x
