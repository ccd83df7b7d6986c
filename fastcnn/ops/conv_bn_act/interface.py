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
the kernels that made it run again. The convolutions are PyTorch's own; on CUDA those of a step are
Triton's where the planner finds them faster, and what stands before and behind is fused into them
(passes.py, candidates.py). In evaluation, where nobody asks for a gradient, each
step is one convolution of oneDNN on the CPU (conv2d/aten.py), on CUDA what inference.py
offers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.common.checks import check_image, check_image_of
from fastcnn.common.library import apply, distinct
from fastcnn.ops.conv2d.onednn import folds
from fastcnn.ops.conv_bn_act.autograd import ConvBnActFunction
from fastcnn.ops.conv_bn_act.inference import convolve_folded, convolve_planned, is_inference
from fastcnn.ops.conv_bn_act.problem import is_planned
from fastcnn.ops.conv_bn_act.step import ConvBnActBlock, ConvBnActStep, Geometry, check_memory
from fastcnn.ops.conv_bn_act.validate import Check

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
    check = Check(x, dtype, memory)
    sizes = list(x.shape)
    for name, block in blocks.items():
        sizes = check.block(name, block, sizes, residual is not None)
    if residual is not None:
        check_image_of(OP, "residual", residual, sizes, x)
    if is_inference(x, check.steps, residual):
        if folds(x):
            return _evaluate(x, residual, blocks.values(), iter(check.geometry), convolve_folded)
        if is_planned(x) and x.numel() > 0:
            return _evaluate(x, residual, blocks.values(), iter(check.geometry), convolve_planned)
    if is_planned(x) and x.numel() > 0:
        check.plan()
    tensors: list[Tensor | None] = []
    for i, s in enumerate(check.steps):
        tensors += s.weight, s.conv_bias, s.bn_weight, s.bn_bias, *check.fixed(i)
    image, added, *tensors = distinct(x, residual, *tensors)
    y, *kept = apply(ConvBnActFunction, image, added, tuple(check.blocks), *tensors)
    check.update_running(kept)
    return y


def _evaluate(
    x: Tensor,
    residual: Tensor | None,
    blocks: Iterable[ConvBnActBlock],
    geometry: Iterator[Geometry],
    run_step: Callable[..., Tensor],
) -> Tensor:
    """One call a step, with the weights as they came: cast once, after folding."""

    def run(
        x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None, own: bool
    ) -> Tensor:
        for i, step in enumerate(steps, start=1):
            x = run_step(x, step, next(geometry), residual if i == len(steps) else None, own)
        return x

    for block in blocks:
        added = residual if block.shortcut is None else run(x, block.shortcut, None, True)
        x = run(x, block.steps, added, bool(block.shortcut))
    return x
