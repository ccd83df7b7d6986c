"""conv_bn_act: a chain of (convolution, batch norm, activation, pooling) steps, with a residual.

    a_0 = input
    r_i = conv(a_{i-1}, weight_i)                              the convolution output of step i
    a_i = pool_i(act_i(batch_norm_i(r_i)))                     i < last
    output = act_last(batch_norm_last(r_last) + residual)

The residual is a tensor, the input, or the output of a chain of its own on the input (a block's
projection). A chain with its residual is a block; a stage is a row of blocks.

Saved for backward, beside parameters, statistics and, where a residual went through an activation,
the output (it is the next block's input anyway) or, where that does not tell the derivative, a
residual that came as a tensor:

    memory     saved                                            recomputed in backward
    auto       as "full" on the CPU, as "default" elsewhere: step.level_on
    full       each block's input, every r_i, every a_i,        nothing
               i < last, and a pooling's indices
    default    each block's input, every r_i                    every a_i, i < last: read r_i, write
                                                                a_i
    low        the stage's input, every r_i                     the same, and the blocks' outputs:
                                                                read r_last and residual, write
    lowest     each block's input, the r_i but those of 1x1     the same, and those convolutions
               convolutions to more channels

Eager saves what "full" does. What is recomputed has the same bits: the kernels that made it run
again. The convolutions on the CPU are those of conv2d/aten.py, most of them PyTorch's own; on CUDA
that of a step in training is Triton's, with the statistics of what it writes, where the planner
finds that faster (candidates.py). In evaluation, where no gradient is required,
each step is one convolution on the CPU (conv2d/onednn.py), on CUDA one of inference_candidates.py.

A call: validate.py checks the blocks, planning.py chooses how their convolutions run, autograd.py
runs them forward and backward, running.py moves the running statistics.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.common.checks import check_image, check_image_of, memory_format_of
from fastcnn.ops.conv2d.aten import outruns_pytorch
from fastcnn.ops.conv2d.onednn import folds
from fastcnn.ops.conv_bn_act.autograd import run_blocks
from fastcnn.ops.conv_bn_act.backward import TENSORS
from fastcnn.ops.conv_bn_act.inference import convolve_folded, is_inference
from fastcnn.ops.conv_bn_act.inference_candidates import convolve_planned
from fastcnn.ops.conv_bn_act.planning import plan_blocks
from fastcnn.ops.conv_bn_act.problem import is_planned
from fastcnn.ops.conv_bn_act.running import statistics_of, update_running_statistics
from fastcnn.ops.conv_bn_act.step import (
    ConvBnActBlock,
    ConvBnActStep,
    Memory,
    check_memory,
    level_on,
)
from fastcnn.ops.conv_bn_act.validate import (
    CheckedBlock,
    CheckedStep,
    check_block,
    saving_outputs,
    steps_of,
)

OP = "conv_bn_act"


def conv_bn_act(
    x: Tensor,
    steps: Sequence[ConvBnActStep],
    residual: Tensor | Sequence[ConvBnActStep] | None,
    memory: Memory,
) -> Tensor:
    """One block: see fastcnn.functional.conv_bn_act."""
    return _run(x, *_block_of(steps, residual), memory)


def conv_bn_act_blocks(x: Tensor, blocks: Sequence[ConvBnActBlock], memory: Memory) -> Tensor:
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


class TrainingCall:
    """Checked blocks that run as one Function.

    For inputs and a residual like those of the check, as long as the steps' tensors and numbers are
    as they were then. dtype: autocast's.
    """

    def __init__(self, blocks: Sequence[CheckedBlock], dtype: torch.dtype | None) -> None:
        steps = steps_of(blocks)
        self._steps, self._dtype = steps, dtype
        self._settings = tuple(block.settings() for block in blocks)
        self._move = partial(update_running_statistics, steps)
        self._tensors: list[Tensor | None] = []
        for checked in steps:
            weight, conv_bias = checked.given[:2]
            norm = checked.given.bn_weight, checked.given.bn_bias, *statistics_of(checked)
            self._tensors += weight, conv_bias, *norm

    def most_values(self) -> int:
        """Return how many values the largest convolution output has."""
        return max(step.values * step.given.weight.shape[0] for step in self._steps)

    def outruns_pytorch(self, x: Tensor) -> bool:
        """Whether a convolution is made in a way of ours that is far faster, for inputs as x."""
        layout = memory_format_of(x) or torch.contiguous_format
        like: Any = {"dtype": self._dtype or x.dtype, "device": x.device, "memory_format": layout}
        return any(
            outruns_pytorch(torch.empty(s.input, **like), s.given.weight, s.settings.conv)
            for s in self._steps
        )

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the last block's output."""
        dtype, tensors = self._dtype, self._tensors
        if dtype is not None:  # of the convolutions: a weight and a bias each
            x, residual = cast(x, dtype), cast(residual, dtype)
            tensors = [
                cast(t, dtype) if i % TENSORS < 2 else t for i, t in enumerate(self._tensors)
            ]
        return run_blocks(x, residual, self._settings, tensors, self._move)


def training_call(
    x: Tensor,
    steps: Sequence[ConvBnActStep],
    residual: Tensor | Sequence[ConvBnActStep] | None,
    memory: Memory,
) -> TrainingCall:
    """Check a call of one block in training on the CPU, where nothing is planned."""
    dtype = autocast_dtype(x)
    added, blocks = _block_of(steps, residual)
    checked = _check(cast(x, dtype), cast(added, dtype), blocks, dtype, memory)
    return TrainingCall(_saving(checked, x, memory), dtype)


def _block_of(
    steps: Sequence[ConvBnActStep], residual: Tensor | Sequence[ConvBnActStep] | None
) -> tuple[Tensor | None, dict[str, ConvBnActBlock]]:
    """Return a residual from outside, and the block by what errors call it."""
    if isinstance(residual, (tuple, list)):
        return None, {OP: ConvBnActBlock(steps, residual)}
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(
            f"{OP}: residual: expected a Tensor or a sequence of steps, "
            f"got {type(residual).__name__}"
        )
    return residual, {OP: ConvBnActBlock(steps)}


def _check(
    x: Tensor,
    residual: Tensor | None,
    blocks: dict[str, ConvBnActBlock],
    dtype: torch.dtype | None,
    memory: Memory,
) -> list[CheckedBlock]:
    """Check blocks whose input and residual are cast to autocast's dtype."""
    check_memory(OP, memory)
    check_image(OP, "input", x)
    memory = level_on(x.device.type, memory)
    sizes, checked = list(x.shape), []
    for name, block in blocks.items():
        checked.append(check_block(name, block, x, sizes, dtype, memory, residual is not None))
        sizes = checked[-1].output
    if residual is not None:
        check_image_of(OP, "residual", residual, sizes, x)
    return checked


def _run(
    x: Tensor, residual: Tensor | None, blocks: dict[str, ConvBnActBlock], memory: Memory
) -> Tensor:
    """Run blocks as one Function; their keys are what errors call them."""
    dtype = autocast_dtype(x)
    x, residual = cast(x, dtype), cast(residual, dtype)
    checked = _check(x, residual, blocks, dtype, memory)
    if is_inference(x, [step.given for step in steps_of(checked)], residual):
        if folds(x):
            return _evaluate(x, residual, checked, convolve_folded)
        if is_planned(x) and x.numel() > 0:
            return _evaluate(x, residual, checked, convolve_planned)
    if is_planned(x) and x.numel() > 0:
        checked = plan_blocks(checked, x)
    return TrainingCall(_saving(checked, x, memory), dtype)(x, residual)


def _saving(blocks: list[CheckedBlock], x: Tensor, memory: Memory) -> list[CheckedBlock]:
    """Return planned blocks that save what a memory level says."""
    full = level_on(x.device.type, memory) == "full"
    return [saving_outputs(block) for block in blocks] if full else blocks


def _evaluate(
    x: Tensor,
    residual: Tensor | None,
    blocks: Iterable[CheckedBlock],
    run_step: Callable[..., Tensor],
) -> Tensor:
    """One call a step, with the weights as they came: cast once, after folding."""

    def run(x: Tensor, steps: Sequence[CheckedStep], residual: Tensor | None, own: bool) -> Tensor:
        for i, step in enumerate(steps, start=1):
            added = residual if i == len(steps) else None
            x = run_step(x, step.given, step.settings, added, own)
        return x

    for block in blocks:
        added = residual if block.shortcut is None else run(x, block.shortcut, None, True)
        x = run(x, block.steps, added, block.shortcut is not None)
    return x
