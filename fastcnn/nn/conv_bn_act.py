"""Chains of convolution, BatchNormAct2d and pooling modules."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastcnn import functional
from fastcnn.nn.batch_norm_act import BatchNormAct2d
from fastcnn.ops.conv_bn_act_step import Memory

Step = (
    tuple[torch.nn.Conv2d, BatchNormAct2d]
    | tuple[torch.nn.Conv2d, BatchNormAct2d, torch.nn.MaxPool2d]
)
Pair = tuple[int, int]


class Block(NamedTuple):
    """Steps and the shortcut beside them: None, () for the block's input, or steps of its own."""

    steps: Sequence[Step]
    shortcut: Sequence[Step] | None = None


def conv_bn_act(
    x: Tensor,
    steps: Sequence[Step],
    residual: Tensor | Sequence[Step] | None = None,
    memory: Memory = "default",
) -> Tensor:
    """Run modules as one chain: see :func:`fastcnn.functional.conv_bn_act`.

    ``steps[i] = (conv, bn)`` computes ``bn(conv(x))``, the last one ``bn(conv(x), residual)``, and
    ``(conv, bn, pool)`` pools what comes out. The modules lend their parameters and count their
    batches; their own forward, and hooks on it, do not run.

    Raises:
        ValueError: a convolution whose padding_mode is not "zeros" or whose padding is a string, a
            pooling with dilation, ceil_mode or indices, and all that the function refuses.
    """
    added = _steps(residual) if isinstance(residual, Sequence) else residual
    return functional.conv_bn_act(x, _steps(steps), added, memory=memory)


def conv_bn_act_blocks(x: Tensor, blocks: Sequence[Block], memory: Memory = "default") -> Tensor:
    """Run modules as blocks: see :func:`fastcnn.functional.conv_bn_act_blocks`."""
    parts = [
        functional.ConvBnActBlock(
            _steps(block.steps), None if block.shortcut is None else _steps(block.shortcut)
        )
        for block in blocks
    ]
    return functional.conv_bn_act_blocks(x, parts, memory=memory)


def _steps(steps: Sequence[Step]) -> list[functional.ConvBnActStep]:
    return [_step(i, *step) for i, step in enumerate(steps)]


def _step(
    i: int, conv: torch.nn.Conv2d, bn: BatchNormAct2d, pool: torch.nn.MaxPool2d | None = None
) -> functional.ConvBnActStep:
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
        None if pool is None else _pool(i, pool),
    )


def _pool(i: int, pool: torch.nn.MaxPool2d) -> functional.MaxPool:
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        raise ValueError(
            f"conv_bn_act: step {i}: expected a MaxPool2d without dilation, ceil_mode and "
            f"return_indices, got {pool}"
        )
    return functional.MaxPool(
        cast(Pair, pool.kernel_size), cast(Pair, pool.stride), cast(Pair, pool.padding)
    )
