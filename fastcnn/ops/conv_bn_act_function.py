"""The autograd.Function of conv_bn_act: blocks of chains, forward and backward.

Its arguments are flat, since autograd sees only tensors among them: x, an outside residual, the
blocks' geometry, then six tensors for each step in the order in which the steps run (a block's
shortcut before its steps). Its outputs are y, and for each step in that order its raw convolution
output (unless `rerun`) and, in training, mean and var (and
their count where processes share them): what backward keeps must be an input or an
output for torch.func. These have no gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops._library import afresh, positional
from fastcnn.ops.activation import ACT_NUMBER, slope_is_in_y
from fastcnn.ops.batch_norm_act import (
    batch_norm_act_apply,
    batch_norm_act_bwd,
    batch_norm_act_fwd,
    image_to_save,
)
from fastcnn.ops.checks import check_like
from fastcnn.ops.conv_bn_act_step import BlockGeometry, Geometry
from fastcnn.ops.convolution import convolve, convolve_bwd, max_pool, max_pool_bwd

# Of a step: weight, conv_bias, bn_weight, bn_bias, and the fixed mean and var, which are None where
# the batch's own are used.
TENSORS = 6
_FIRST = 3  # the arguments before the first step's

Tensors = Iterator[Tensor | None]


def _steps_fwd(
    x: Tensor,
    residual: Tensor | None,
    steps: tuple[Geometry, ...],
    tensors: Tensors,
    kept: list[Tensor],
) -> Tensor:
    for i, g in enumerate(steps):
        weight, conv_bias, bn_weight, bn_bias, mean, var = (next(tensors) for _ in range(TENSORS))
        added = residual if i == len(steps) - 1 else None
        assert weight is not None
        raw = convolve(x, weight, conv_bias, g)
        if added is not None:
            check_like("conv_bn_act", "residual", added, raw)
        if not g.rerun:
            kept.append(raw)
        if g.training:
            x, *stats = batch_norm_act_fwd(raw, added, bn_weight, bn_bias, g.eps, g.act, g.group)
            kept += stats
        else:
            assert mean is not None
            assert var is not None
            x = batch_norm_act_apply(raw, added, bn_weight, bn_bias, mean, var, g.eps, g.act)
        x = max_pool(x, g)
    return x


class ConvBnActFunction(torch.autograd.Function):
    """y, then what is kept of each step. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, blocks: tuple[BlockGeometry, ...], *args: Tensor | None
    ) -> tuple[Tensor, ...]:
        tensors = iter(args)
        kept: list[Tensor] = []
        for block in blocks:
            added = residual
            if block.shortcut is not None:
                added = _steps_fwd(x, None, block.shortcut, tensors, kept)
            x = _steps_fwd(x, added, block.steps, tensors, kept)
        return x, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, ctx.blocks, *tensors = inputs
        y, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        last = ctx.blocks[-1]
        if last.shortcut is None:
            image = image_to_save(last.steps[-1].act, y, residual)
        else:  # a residual of its own can be had again
            image = y if _saves_y(last) else None
        ctx.save_for_backward(x, image, *tensors, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if dy is None:
            return tuple(grads)
        x, image, *saved = ctx.saved_tensors
        blocks = _saved_blocks(ctx.blocks, saved)
        del saved
        if not torch.compiler.is_compiling():
            # Each tensor now goes back to the allocator after its last use, not at the end: the
            # next step then writes into memory that is still in the cache. Kept with retain_graph.
            ctx.maybe_clear_saved_tensors()
        inputs = [x]
        for block in blocks[:-1]:  # rebuilt together, as every one needs the one before
            inputs.append(block.output(inputs[-1]))
        del x
        while blocks:
            block, x = blocks.pop(), inputs.pop()
            if not ctx.has_residual:
                image = block.image(x, image)
            x_needs = needs[0] or any(needs[_FIRST : block.first])
            wants_dresidual = ctx.has_residual and needs[1]
            if block.shortcut is not None:
                wants_dresidual = x_needs or any(needs[block.first : block.steps.first])
            dx, dresidual = block.steps.backward(
                dy, x, image, wants_dresidual, x_needs, needs, grads
            )
            if block.shortcut is None:
                grads[1] = dresidual
            elif dresidual is not None:
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


@dataclass
class _SavedStep:
    raw: Tensor | None
    weight: Tensor
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor
    var: Tensor
    total: Tensor | None


class _SavedSteps:
    """A chain in backward. x is always the chain's input; `first` its place in the arguments."""

    def __init__(self, steps: tuple[Geometry, ...], first: int) -> None:
        self.geometry = steps
        self.first = first
        self.saved: list[_SavedStep] = []

    def raw(self, i: int, x: Tensor) -> Tensor:
        """Return step i's raw output, kept or from its convolution once more."""
        step = self.saved[i]
        if step.raw is None:
            weight = afresh(step.weight) if i == 0 else step.weight
            step.raw = convolve(self.input(i, x), weight, step.conv_bias, self.geometry[i])
        return step.raw

    def input(self, i: int, x: Tensor) -> Tensor:
        """Return step i's input, rebuilt by the kernel that made it: the same bits."""
        return x if i == 0 else self.output(i - 1, x)

    def output(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return step i's output: its activation, pooled where it pools."""
        return max_pool(self.activation(i, x, residual), self.geometry[i])

    def activation(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return act(batch_norm(raw) + residual) of step i."""
        step, g = self.saved[i], self.geometry[i]
        # In training the forward has run another operator.
        mean = step.mean if g.training else afresh(step.mean)
        return batch_norm_act_apply(
            self.raw(i, x), residual, step.bn_weight, step.bn_bias, mean, step.var,
            g.eps, g.act,
        )  # fmt: skip

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        image: Tensor | None,
        wants_dresidual: bool,
        x_needs: bool,
        needs: tuple[bool, ...],
        grads: list[Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fill in the gradients of the steps' tensors; return dx and dresidual.

        image: image_to_save(...) of the last step. Stops where nothing further up needs a
        gradient; then dx is None. Drops what it has used.
        """
        dresidual: Tensor | None = None
        if not self.saved:  # the shortcut that is x itself
            return dy, None
        while self.saved:
            i = len(self.saved) - 1
            g, step, last = self.geometry[i], self.saved[i], i == len(self.geometry) - 1
            at = self.first + i * TENSORS
            input_needs = x_needs or any(needs[self.first : at])
            conv_input, dx = None, None
            if step.raw is None:
                conv_input = self.input(i, x)
                weight = afresh(step.weight) if i == 0 else step.weight
                step.raw = convolve(conv_input, weight, step.conv_bias, g)
            if g.pool is not None:
                dy = max_pool_bwd(dy, self.activation(i, x), g)
            want = (input_needs, needs[at], needs[at + 1])
            draw, added, dbn_weight, dbn_bias = batch_norm_act_bwd(
                dy, step.raw, image if last else None, step.bn_weight, step.bn_bias, step.mean,
                step.var, g.eps, g.act, g.training, last and wants_dresidual,
                any(want), step.total, g.group,
            )  # fmt: skip
            dresidual = added if last else dresidual
            grads[at + 2 : at + 4] = dbn_weight, dbn_bias
            self.saved.pop()
            step.raw = image = None
            if conv_input is None and any(want):
                conv_input = self._conv_input(i, x, needs[at])
            if conv_input is not None and draw is not None:
                dx, *grads[at : at + 2] = convolve_bwd(
                    draw, conv_input, step.weight, step.conv_bias, g, want
                )
            del conv_input, step, draw
            if dx is None:
                return None, dresidual
            dy = dx
        return dy, dresidual

    def _conv_input(self, i: int, x: Tensor, needs_weight: bool) -> Tensor:
        """Return step i's input; for a frozen weight only its sizes matter, and raw has them."""
        before = self.saved[i - 1].raw if i > 0 else None
        if not needs_weight and before is not None and self.geometry[i - 1].pool is None:
            return before
        return self.input(i, x)


def _saves_y(block: BlockGeometry) -> bool:
    """Whether backward needs the block's output; else, behind an activation, its residual."""
    act = block.steps[-1].act
    return act != ACT_NUMBER["none"] and slope_is_in_y(act)


@dataclass
class _SavedBlock:
    geometry: BlockGeometry
    steps: _SavedSteps
    shortcut: _SavedSteps | None
    first: int  # the place of its first tensor in the arguments

    def residual(self, x: Tensor) -> Tensor | None:
        """Return what the shortcut adds, rebuilt from the block's input."""
        if self.shortcut is None:
            return None
        last = len(self.shortcut.saved) - 1
        return x if last < 0 else self.shortcut.output(last, x)

    def image(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Return image_to_save(...) of the last step, from the block's input and output."""
        if self.shortcut is None or self.steps.geometry[-1].act == ACT_NUMBER["none"]:
            return None
        return y if _saves_y(self.geometry) else self.residual(x)

    def output(self, x: Tensor) -> Tensor:
        """Return the block's output, rebuilt from its input by elementwise passes."""
        return self.steps.output(len(self.steps.saved) - 1, x, self.residual(x))


def _saved_blocks(blocks: tuple[BlockGeometry, ...], saved: list[Any]) -> list[_SavedBlock]:
    """Undo setup_context's flattening: the tensors of all steps, then what forward returned."""
    count = sum(len(b.steps) + len(b.shortcut or ()) for b in blocks)
    tensors, kept = iter(saved[: count * TENSORS]), iter(saved[count * TENSORS :])
    first = _FIRST

    def steps_of(geometry: tuple[Geometry, ...]) -> _SavedSteps:
        nonlocal first
        steps = _SavedSteps(geometry, first)
        for g in geometry:
            of_step = [next(tensors) for _ in range(TENSORS)]
            raw = None if g.rerun else next(kept)
            if g.training:
                of_step[4:] = next(kept), next(kept)
            of_step.append(None if g.group is None else next(kept))
            steps.saved.append(_SavedStep(raw, *of_step))
        first += len(geometry) * TENSORS
        return steps

    found = []
    for block in blocks:
        start = first
        shortcut = None if block.shortcut is None else steps_of(block.shortcut)
        found.append(_SavedBlock(block, steps_of(block.steps), shortcut, start))
    return found
