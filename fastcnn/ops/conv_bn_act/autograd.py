"""The autograd.Function of conv_bn_act: blocks of chains, forward and backward.

Its arguments are flat, since autograd sees only tensors among them: x, an outside residual, the
blocks' settings, then six tensors for each step in the order in which the steps run (a block's
shortcut before its steps), and what moves the running statistics (library.apply_moving). Its
outputs are y, and for each step in that order what StepSettings.saved() names: what backward keeps
must be an input or an output for torch.func. These have no gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import check_like, in_format_of
from fastcnn.common.conv_operands import Input
from fastcnn.common.library import once_differentiable, positional
from fastcnn.ops.batch_norm_act.operators import (
    batch_norm_act_apply,
    batch_norm_act_fwd,
    image_to_save,
)
from fastcnn.ops.conv2d.aten import convolve, max_pool_with_indices
from fastcnn.ops.conv_bn_act.backward import FIRST, TENSORS, saved_blocks
from fastcnn.ops.conv_bn_act.passes import batch_statistics, fused_raw, written
from fastcnn.ops.conv_bn_act.step import (
    BlockSettings,
    StepSettings,
    any_by_triton,
    leaves_norm,
)

Tensors = Iterator[Tensor | None]


def _steps_fwd(
    x: Tensor,
    residual: Tensor | None,
    steps: tuple[StepSettings, ...],
    tensors: Tensors,
    kept: list[Tensor],
    own: bool,
) -> Tensor:
    """Run a chain; own: the residual is of the block's making, not a tensor of the caller's."""
    a, channels_last = Input(x), any_by_triton(steps)
    for i, s in enumerate(steps):
        weight, conv_bias, bn_weight, bn_bias, mean, var = (next(tensors) for _ in range(TENSORS))
        added = residual if i == len(steps) - 1 else None
        leaves = leaves_norm(steps, i)
        assert weight is not None
        found: tuple[Tensor, ...] = ()
        if s.plan.fwd:
            statistics = s.training and s.group is None
            raw, *stats = fused_raw(a, weight, conv_bias, s, statistics)
            found = tuple(stats) if statistics else ()
        else:
            raw = convolve(written(a), weight, conv_bias, s.conv)
            if (
                channels_last
            ):  # an image of one channel is in both layouts, and PyTorch takes either
                raw = raw.contiguous(memory_format=torch.channels_last)
        if added is not None and own:
            added = in_format_of(added, raw)
        elif added is not None:
            check_like("conv_bn_act", "residual", added, raw)
        if not s.recompute:
            kept.append(raw)
        if s.training and not found and (leaves or s.group is not None):
            found = batch_statistics(raw, s.group)
        if not s.training:
            assert mean is not None
            assert var is not None
        elif found:
            mean, var = found[:2]
        if mean is None or var is None:
            y, *stats = batch_norm_act_fwd(raw, added, bn_weight, bn_bias, s.eps, s.act)
            found, a = tuple(stats), Input(y)
        elif leaves:
            a = Input(raw, Norm(mean, var, bn_weight, bn_bias, s.eps), s.act)
        else:
            a = Input(batch_norm_act_apply(raw, added, bn_weight, bn_bias, mean, var, s.eps, s.act))
        kept += found
        if s.pool is not None:
            pooled, indices = max_pool_with_indices(a.x, s.pool)
            a = Input(pooled)
            kept += [indices] * s.saves_indices
        kept += [a.x] * s.saves_output
    return a.x


class ConvBnActFunction(torch.autograd.Function):
    """y, then what is kept of each step. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, blocks: tuple[BlockSettings, ...], *args: Any
    ) -> tuple[Tensor, ...]:
        tensors = iter(args[:-1])
        kept: list[Tensor] = []
        for block in blocks:
            added = residual
            if block.shortcut is not None:
                added = _steps_fwd(x, None, block.shortcut, tensors, kept, own=True)
            # Dynamo of torch 2.11 cannot take a tuple for a truth value.
            own = block.shortcut is not None and len(block.shortcut) > 0
            x = _steps_fwd(x, added, block.steps, tensors, kept, own)
        return x, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, ctx.blocks, *tensors, move = inputs
        y, *kept = output
        if move is not None:
            move(output)
        ctx.mark_non_differentiable(*kept)
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
