"""The autograd.Function of conv_bn_act: blocks of chains, forward and backward.

Its arguments are flat, since autograd sees only tensors among them: x, an outside residual, the
blocks' settings, then six tensors for each step in the order in which the steps run (a block's
shortcut before its steps), and the call. What backward keeps of each step in that order is what
StepSettings.saved() names. Where the Function is traced or transformed it must be inputs and
outputs: there the call is None, and these are outputs without a gradient beside y. Elsewhere the
call has them, as each output takes 3 us.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_like, in_format_of
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.library import apply, distinct, once_differentiable, positional
from fastcnn.ops.batch_norm_act.operators import (
    batch_norm_act_apply,
    batch_norm_act_fwd,
    image_to_save,
)
from fastcnn.ops.conv2d.aten import convolve, max_pool_with_indices
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act.backward import FIRST, TENSORS, saved_blocks
from fastcnn.ops.conv_bn_act.step import BlockSettings, StepSettings, any_by_triton


class Call:
    """A call in eager mode: what it keeps for backward, and what moves the running statistics.

    move is called before autograd saves a tensor: activation checkpointing ends its second forward
    with the last one that is saved, and PyTorch's kernels have moved the statistics by then.
    """

    def __init__(self, move: Callable[[Sequence[Tensor]], None]) -> None:
        self.move, self.kept = move, list[Tensor]()


def run_blocks(
    x: Tensor,
    residual: Tensor | None,
    settings: tuple[BlockSettings, ...],
    tensors: Sequence[Tensor | None],
    move: Callable[[Sequence[Tensor]], None],
) -> Tensor:
    """Run blocks, and move the running statistics by what they keep for backward."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        image, added, *tensors = distinct(x, residual, *tensors)
        y, *kept = apply(ConvBnActFunction, image, added, settings, *tensors, None)
        move(kept)
        return y
    return apply(ConvBnActFunction, x, residual, settings, *tensors, Call(move))


def _steps_fwd(
    x: Tensor,
    residual: Tensor | None,
    steps: tuple[StepSettings, ...],
    tensors: Sequence[Tensor | None],
    kept: list[Tensor],
    own: bool,
) -> Tensor:
    """Run a chain; own: the residual is the block's input or made of it, not the caller's."""
    by_triton = any_by_triton(steps)
    for i, s in enumerate(steps):
        weight, conv_bias, bn_weight, bn_bias, mean, var = tensors[i * TENSORS : (i + 1) * TENSORS]
        added = residual if i == len(steps) - 1 else None
        assert weight is not None
        found: list[Tensor] = []
        if s.by_triton:
            raw, *found = conv2d_fused(x, weight, s.conv, Epilogue(statistics=True))
            mean, var = found
        else:
            raw = convolve(x, weight, conv_bias, s.conv)
            if by_triton:  # an image of one channel is in both layouts, and PyTorch takes either
                raw = raw.contiguous(memory_format=torch.channels_last)
        if added is not None and own:
            added = in_format_of(added, raw)
        elif added is not None:
            check_like("conv_bn_act", "residual", added, raw)
        if not s.recompute:
            kept.append(raw)
        if mean is None or var is None:
            norm = raw, added, bn_weight, bn_bias
            x, *found = batch_norm_act_fwd(*norm, s.eps, s.act, s.group)
        else:
            x = batch_norm_act_apply(raw, added, bn_weight, bn_bias, mean, var, s.eps, s.act)
        kept += found
        if s.pool is not None:
            x, indices = max_pool_with_indices(x, s.pool)
            if s.saves_indices:
                kept.append(indices)
        if s.saves_output:
            kept.append(x)
    return x


class ConvBnActFunction(torch.autograd.Function):
    """y, and without a call what is kept of each step. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, blocks: tuple[BlockSettings, ...], *args: Any
    ) -> tuple[Tensor, ...] | Tensor:
        tensors, call, at = args[:-1], args[-1], 0
        kept: list[Tensor] = [] if call is None else call.kept
        for block in blocks:
            added = residual
            if block.shortcut is not None:
                added = _steps_fwd(x, None, block.shortcut, tensors[at:], kept, own=True)
                at += len(block.shortcut) * TENSORS
            own = block.shortcut is not None
            x = _steps_fwd(x, added, block.steps, tensors[at:], kept, own)
            at += len(block.steps) * TENSORS
        return (x, *kept) if call is None else x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, residual, ctx.blocks, *tensors, call = inputs
        if call is None:
            y, *kept = output
            ctx.mark_non_differentiable(*kept)
        else:
            y, kept = output, call.kept
            call.move(kept)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        last = ctx.blocks[-1]
        if last.shortcut is None:
            image = image_to_save(last.steps[-1].act, y, residual)
        else:  # a residual of its own can be had again
            image = y if last.saves_y() else None
        ctx.save_for_backward(x, image, *tensors, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if dy is None:
            return tuple(grads)
        x, image, *saved = ctx.saved_tensors
        blocks = saved_blocks(ctx.blocks, saved)
        del saved
        if not torch.compiler.is_compiling():
            # Each tensor now goes back to the allocator after its last use, not at the end: the
            # next step then writes into memory that is still in the cache. Kept with retain_graph.
            ctx.maybe_clear_saved_tensors()
        inputs = [x]
        for block in blocks[:-1]:  # recomputed together, as every one needs the one before
            inputs.append(block.output(inputs[-1]))
        del x
        while blocks:
            block, x = blocks.pop(), inputs.pop()
            if not ctx.has_residual:
                image = block.image(x, image)
            x_needs = needs[0] or any(needs[FIRST : block.first])
            wants_dresidual = ctx.has_residual and needs[1]
            if block.shortcut is not None:
                wants_dresidual = x_needs or any(needs[block.first : block.steps.first])
            dx, dresidual = block.steps.backward(
                dy, x, image, wants_dresidual, x_needs, needs, grads, adds=block.is_identity()
            )
            if block.shortcut is None:
                grads[1] = dresidual
            elif dresidual is not None and not block.is_identity():
                by_shortcut = block.shortcut.backward(
                    dresidual, x, None, False, x_needs, needs, grads
                )[0]
                if dx is not None and by_shortcut is not None:
                    dx += by_shortcut
            if dx is None:
                break
            dy, image = dx, x  # x is what the block before has given
            grads[0] = dx if not blocks else None
        return tuple(grads)
