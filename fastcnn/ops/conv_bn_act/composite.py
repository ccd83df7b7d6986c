"""A chain of PyTorch's operators, for feature maps so small that a call costs more than its work.

    a_i = max_pool_i(act_i(batch_norm_i(conv(a_{i-1}))))        with the batch's statistics
    y   = act(batch_norm(conv(a)) + residual)

ConvBnActFunction takes more Python than PyTorch's operators, which its kernels earn back where
feature maps are larger, or where a convolution of the chain is one that outruns_pytorch():
docs/performance.md, "Small feature maps".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.activation import eager_activation
from fastcnn.ops.conv_bn_act.step import ConvBnActStep

# Of the largest feature map, up to which this is faster. Of other dtypes nothing was measured.
MOST_VALUES = {torch.float32: 1 << 18, torch.bfloat16: 1 << 17}


def too_small(dtype: torch.dtype, values: int) -> str | None:
    """Say why a chain is better PyTorch's; values: of its largest feature map."""
    most = MOST_VALUES.get(dtype, 0)
    if values > most:
        return None
    return f"up to {most} values of {dtype} a feature map PyTorch's operators are faster"


class CompositeCall:
    """Checked steps in training, without a shortcut (None), with x (()) or steps on it as one."""

    def __init__(
        self, steps: Sequence[ConvBnActStep], shortcut: Sequence[ConvBnActStep] | None
    ) -> None:
        self._steps, self._shortcut = steps, shortcut

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the chain's output."""
        added = residual if self._shortcut is None else _chain(x, self._shortcut, None)
        return _chain(x, self._steps, added)


def _chain(x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None) -> Tensor:
    last = len(steps) - 1
    for i, step in enumerate(steps):
        (
            weight, conv_bias, stride, padding, dilation, groups, mean, var, bn_weight, bn_bias,
            training, momentum, eps, act, _, _, pool,
        ) = step  # fmt: skip
        raw = torch.conv2d(x, weight, conv_bias, stride, padding, dilation, groups)
        x = torch.batch_norm(raw, bn_weight, bn_bias, mean, var, training, momentum, eps, False)
        if residual is not None and i == last:
            x += residual
        x = eager_activation(x, act, inplace=True)
        if pool is not None:
            x = F.max_pool2d(x, *pool)
    return x
