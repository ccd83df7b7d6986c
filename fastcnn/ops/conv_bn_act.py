"""conv_bn_act: a chain of (convolution, batch norm, activation, pooling) steps, with a residual.

    a_0 = input
    r_i = conv(a_{i-1}, weight_i)                              the raw output of step i
    a_i = pool_i(act_i(batch_norm_i(r_i)))                     i < last
    output = act_last(batch_norm_last(r_last) + residual)

The residual is a tensor, the input, or the output of a chain of its own on the input (a block's
projection). A chain with its residual is a block; a stage is a row of blocks.

Kept for backward, beside parameters, statistics and, where a residual went through an activation,
the output (it is the next block's input anyway) or, where that does not tell the derivative, a
residual that came as a tensor:

    memory     kept                                             runs again in backward
    default    each block's input, every r_i                    every a_i, i < last: read r_i, write
                                                                a_i
    low        the stage's input, every r_i                     the same, and the blocks' outputs:
                                                                read r_last and residual, write
    lowest     each block's input, the r_i but those of 1x1     the same, and those convolutions
               convolutions to more channels

Eager keeps every a_i beside every r_i, and a pooling's indices. What is rebuilt has the same bits:
the kernels that made it run again. The convolutions are PyTorch's own. In evaluation, where nobody
asks for a gradient, each step is one convolution of oneDNN on the CPU (ops/convolution.py).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastcnn.ops._library import apply, distinct
from fastcnn.ops.batch_norm_calls import update_running
from fastcnn.ops.checks import check_image, check_image_of
from fastcnn.ops.conv_bn_act_function import ConvBnActFunction
from fastcnn.ops.conv_bn_act_step import (
    BlockGeometry,
    ConvBnActBlock,
    ConvBnActStep,
    Geometry,
    check_memory,
    check_step,
)
from fastcnn.ops.convolution import autocast_dtype, cast, convolve_folded, folds

OP = "conv_bn_act"


def conv_bn_act(
    x: Tensor,
    steps: Sequence[ConvBnActStep],
    residual: Tensor | Sequence[ConvBnActStep] | None,
    memory: str,
) -> Tensor:
    """One block: see fastcnn.functional.conv_bn_act."""
    if isinstance(residual, Sequence):
        return _run(x, None, {OP: ConvBnActBlock(steps, residual)}, memory)
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(
            f"{OP}: residual: expected a Tensor or a sequence of steps, "
            f"got {type(residual).__name__}"
        )
    return _run(x, residual, {OP: ConvBnActBlock(steps)}, memory)


def conv_bn_act_blocks(x: Tensor, blocks: Sequence[ConvBnActBlock], memory: str) -> Tensor:
    """Run blocks one after the other: see fastcnn.functional.conv_bn_act_blocks."""
    if not blocks:
        raise ValueError(f"{OP}: blocks: expected at least one, got none")
    named = {OP: blocks[0]}
    if len(blocks) > 1:
        named = {f"{OP}: block {i}": block for i, block in enumerate(blocks)}
    if memory == "low":
        return _run(x, None, named, memory)
    for name, block in named.items():
        x = _run(x, None, {name: block}, memory)
    return x


def _run(
    x: Tensor, residual: Tensor | None, blocks: dict[str, ConvBnActBlock], memory: str
) -> Tensor:
    """Run blocks as one Function; their keys are what errors call them."""
    check_memory(OP, memory)
    dtype = autocast_dtype(x)
    x, residual = cast(x, dtype), cast(residual, dtype)
    check_image(OP, "input", x)
    check = _Check(x, dtype, memory)
    sizes = list(x.shape)
    for name, block in blocks.items():
        sizes = check.block(name, block, sizes, residual is not None)
    if residual is not None:
        check_image_of(OP, "residual", residual, sizes, x)
    if folds(x, check.steps, residual):
        return _evaluate(x, residual, blocks.values(), iter(check.geometry))
    tensors: list[Tensor | None] = []
    for s in check.steps:
        fixed = (None, None) if s.training else (s.running_mean, s.running_var)
        tensors += s.weight, s.conv_bias, s.bn_weight, s.bn_bias, *fixed
    image, added, *tensors = distinct(x, residual, *tensors)
    y, *kept = apply(ConvBnActFunction, image, added, tuple(check.blocks), *tensors)
    check.update_running(kept)
    return y


class _Check:
    """Checks blocks one after the other, and holds what the Function needs of them."""

    def __init__(self, x: Tensor, dtype: torch.dtype | None, memory: str) -> None:
        self.x, self.dtype, self.memory = x, dtype, memory
        self.blocks: list[BlockGeometry] = []
        # Of all blocks' steps, in the order in which they run.
        self.steps: list[ConvBnActStep] = []
        self.geometry: list[Geometry] = []
        self.counts: list[int] = []  # values a channel

    def block(self, op: str, block: ConvBnActBlock, sizes: list[int], adds: bool) -> list[int]:
        """Check a block whose input has these sizes; return its output's."""
        if not isinstance(block, ConvBnActBlock):
            raise TypeError(f"{op}: blocks: expected ConvBnActBlocks, got {type(block).__name__}")
        shortcut, added = None, sizes
        if block.shortcut is not None:
            shortcut, added = self._chain(op, "shortcut", block.shortcut, sizes)
        steps, out = self._chain(op, "steps", block.steps, sizes)
        if not steps:
            raise ValueError(f"{op}: steps: expected at least one, got none")
        if shortcut is not None and added != out:
            raise ValueError(f"{op}: shortcut: expected sizes {out} as the steps give, got {added}")
        if (adds or shortcut is not None) and steps[-1].pool is not None:
            raise ValueError(
                f"{op}: pool: expected None in the last step of a block with a residual, "
                f"got {block.steps[-1].pool}"
            )
        self.blocks.append(BlockGeometry(steps, shortcut))
        return out

    def _chain(
        self, op: str, name: str, steps: Sequence[ConvBnActStep], sizes: list[int]
    ) -> tuple[tuple[Geometry, ...], list[int]]:
        found = []
        if not isinstance(steps, (tuple, list)) or isinstance(steps, ConvBnActStep):
            raise TypeError(
                f"{op}: {name}: expected a tuple or list of steps, got {type(steps).__name__}"
            )
        if name != "steps":
            op = f"{op}: {name}"
        for i, step in enumerate(steps):
            if not isinstance(step, ConvBnActStep):
                raise TypeError(
                    f"{op}: step {i}: expected a ConvBnActStep, got {type(step).__name__}"
                )
            if self.dtype is not None:
                step = step._replace(
                    weight=cast(step.weight, self.dtype),
                    conv_bias=cast(step.conv_bias, self.dtype),
                )
            g, raw, sizes = check_step(f"{op}: step {i}", step, self.x, sizes, self.memory)
            found.append(g)
            self.steps.append(step)
            self.counts.append(raw[0] * raw[2] * raw[3])
        self.geometry += found
        return tuple(found), sizes

    def update_running(self, kept: Sequence[Tensor]) -> None:
        """Move the running statistics by what the Function has returned beside y."""
        values = iter(kept)
        for g, s, count in zip(self.geometry, self.steps, self.counts, strict=True):
            if not g.rerun:
                next(values)
            if g.training:
                mean, var = next(values), next(values)
                total = None if g.group is None else next(values)
                update_running(s.running_mean, s.running_var, mean, var, s.momentum, count, total)


def _evaluate(
    x: Tensor,
    residual: Tensor | None,
    blocks: Iterable[ConvBnActBlock],
    geometry: Iterator[Geometry],
) -> Tensor:
    """One convolution a step, from the weights as they came: cast once, after folding."""

    def run(
        x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None, own: bool
    ) -> Tensor:
        for i, step in enumerate(steps, start=1):
            added = residual if i == len(steps) else None
            x = convolve_folded(x, step, next(geometry), added, own)
        return x

    for block in blocks:
        added = residual if block.shortcut is None else run(x, block.shortcut, None, True)
        x = run(x, block.steps, added, bool(block.shortcut))
    return x
