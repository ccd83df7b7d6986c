"""Chains of convolution and BatchNormAct2d modules."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastcnn import functional
from fastcnn.nn.batch_norm_act import BatchNormAct2d

Pair = tuple[int, int]


def conv_bn_act(
    x: Tensor,
    steps: Sequence[tuple[torch.nn.Conv2d, BatchNormAct2d]],
    residual: Tensor | None = None,
) -> Tensor:
    """Run modules as one chain: see :func:`fastcnn.functional.conv_bn_act`.

    ``steps[i] = (conv, bn)`` computes ``bn(conv(x))``, the last one ``bn(conv(x), residual)``. The
    modules lend their parameters and count their batches; their own forward, and hooks on it, do
    not run.

    Raises:
        ValueError: a convolution whose padding_mode is not "zeros" or whose padding is a string,
            and all that the function refuses.
    """
    return functional.conv_bn_act(x, [_step(i, *step) for i, step in enumerate(steps)], residual)


def _step(i: int, conv: torch.nn.Conv2d, bn: BatchNormAct2d) -> functional.ConvBnActStep:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"conv_bn_act: step {i}: expected padding numbers with padding_mode='zeros', got "
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r}"
        )
    return functional.ConvBnActStep(
        conv.weight,
        conv.bias,
        cast(Pair, conv.stride),
        cast(Pair, conv.padding),
        cast(Pair, conv.dilation),
        conv.groups,
        *bn.running_statistics(),
        bn.weight,
        bn.bias,
        bn.uses_batch_statistics,
        bn.step_momentum(),
        bn.eps,
        bn.act,
        bn.sync,
        bn.process_group,
    )
