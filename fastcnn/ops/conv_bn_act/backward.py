"""What a conv_bn_act chain saved for backward, and its backward pass: recomputation, gradients.

A chain is a step or several, a block two chains: its steps and its shortcut.
A step's input is recomputed from the convolution output before it, where the step needs it, and a
convolution output that was not saved by its convolution. Each tensor is dropped after its last use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import in_format_of
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.library import clone_no_cse
from fastcnn.ops.batch_norm_act.operators import batch_norm_act_apply, batch_norm_act_bwd
from fastcnn.ops.conv2d.aten import convolve, convolve_bwd, max_pool, max_pool_bwd
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act.step import BlockSettings, StepSettings, any_by_triton

# Of a step: weight, conv_bias, bn_weight, bn_bias, and the fixed mean and var, which are None where
# the batch's own are used.
TENSORS = 6
FIRST = 3  # the Function's arguments before the first step's


@dataclass
class SavedStep:
    """A step's tensors; raw is None where it was not kept, and again after its last use."""

    weight: Tensor
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor
    var: Tensor
    raw: Tensor | None = None
    total: Tensor | None = None
    indices: Tensor | None = None
    output: Tensor | None = None


class SavedSteps:
    """A chain in backward. x is always the chain's input; `first` its place in the arguments."""

    def __init__(self, steps: tuple[StepSettings, ...], first: int) -> None:
        self.settings = steps
        self.first = first
        self.saved: list[SavedStep] = []

    def raw(self, i: int, x: Tensor) -> Tensor:
        """Return step i's convolution output, saved or recomputed."""
        step = self.saved[i]
        if step.raw is None:
            step.raw = self._convolved(i, self.input(i, x))
        return step.raw

    def _convolved(self, i: int, a: Tensor) -> Tensor:
        """Run step i's convolution again on its input. The same bits, by the same kernel."""
        step, s = self.saved[i], self.settings[i]
        weight = clone_no_cse(step.weight) if i == 0 else step.weight
        if s.by_triton:
            return conv2d_fused(a, weight, s.conv, Epilogue())[0]
        raw = convolve(a, weight, step.conv_bias, s.conv)
        if any_by_triton(self.settings):
            raw = raw.contiguous(memory_format=torch.channels_last)
        return raw

    def input(self, i: int, x: Tensor) -> Tensor:
        """Return step i's input, saved or recomputed."""
        return x if i == 0 else self.output(i - 1, x)

    def _like_input(self, i: int, x: Tensor) -> Tensor:
        """Return a tensor of step i's input's sizes and layout, recomputing nothing for it."""
        if i == 0 or self.saved[i - 1].output is not None or self.settings[i - 1].pool is not None:
            return self.input(i, x)
        return self.raw(i - 1, x)

    def output(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return step i's output, saved or recomputed: its activation, pooled where it pools."""
        saved = self.saved[i].output
        if saved is not None:
            return saved
        return max_pool(self.activation(i, x, residual), self.settings[i].pool)

    def activation(self, i: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return act(batch_norm(raw) + residual) of step i. The same bits, by the same kernel."""
        raw, step, s = self.raw(i, x), self.saved[i], self.settings[i]
        if residual is not None:
            residual = in_format_of(residual, raw)
        # In training the forward has run another operator.
        mean = step.mean if s.training else clone_no_cse(step.mean)
        norm = step.bn_weight, step.bn_bias, mean, step.var
        return batch_norm_act_apply(raw, residual, *norm, s.eps, s.act)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        image: Tensor | None,
        wants_dresidual: bool,
        x_needs: bool,
        needs: tuple[bool, ...],
        grads: list[Tensor | None],
        adds: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Fill in the gradients of the steps' tensors; return dx and dresidual.

        image: image_to_save(...) of the last step. adds: x is the residual, so that dx has
        dresidual in it. Stops where nothing further up needs a gradient; then dx is None. Drops
        what it has used.
        """
        dresidual: Tensor | None = None
        while self.saved:
            i = len(self.saved) - 1
            s, step, last = self.settings[i], self.saved[i], i == len(self.settings) - 1
            at = self.first + i * TENSORS
            input_needs = x_needs or any(needs[self.first : at])
            a: Tensor | None = None
            if step.raw is None:
                a = self.input(i, x)
                step.raw = self._convolved(i, a)
            if s.pool is not None:
                saved = step.indices is not None  # then only the sizes matter
                dy = max_pool_bwd(
                    dy, step.raw if saved else self.activation(i, x), step.indices, s.pool
                )
            if image is not None:
                image = in_format_of(image, step.raw)
            want = (input_needs, needs[at], needs[at + 1])
            of_parameters = needs[at + 2] or needs[at + 3]
            want_dz = last and wants_dresidual
            d, added, *dbn = batch_norm_act_bwd(
                dy, step.raw, image if last else None, step.bn_weight, step.bn_bias, step.mean,
                step.var, s.eps, s.act, s.training, want_dz, any(want), of_parameters,
                step.total, s.group,
            )  # fmt: skip
            dbias = _bias_gradient(step.conv_bias, s) if want[2] else None
            dresidual = added if last else dresidual
            grads[at + 1 : at + 4] = dbias, *dbn
            self.saved.pop()
            step.raw = image = None
            if d is None or not any(want):
                return None, dresidual
            if a is None:
                a = self.input(i, x) if want[1] else self._like_input(i, x)
            want = (*want[:2], want[2] and dbias is None)
            found: tuple[Tensor | None, ...] = (None, None, None)
            if any(want):
                found = convolve_bwd(d, a, step.weight, step.conv_bias, s.conv, want)
            dx, grads[at], by_convolution = found
            if want[2]:
                grads[at + 1] = by_convolution
            del a, step, d, added
            if dx is None:
                return None, dresidual
            if adds and i == 0 and dresidual is not None:
                dx += dresidual
            dy = dx
        return dy, dresidual


def _bias_gradient(conv_bias: Tensor | None, s: StepSettings) -> Tensor | None:
    """Return a convolution's bias's gradient where it is 0, else None.

    The statistics of the batch follow a bias; those of a batch of which this is a part do not.
    """
    if conv_bias is None or not s.training or s.group is not None:
        return None
    return torch.zeros_like(conv_bias)


@dataclass
class SavedBlock:
    """A block in backward; `first` is the place of its first tensor in the arguments."""

    settings: BlockSettings
    steps: SavedSteps
    shortcut: SavedSteps | None
    first: int

    def is_identity(self) -> bool:
        """Whether the shortcut is the block's input itself."""
        return self.settings.shortcut == ()

    def residual(self, x: Tensor) -> Tensor | None:
        """Return what the shortcut adds, recomputed from the block's input."""
        if self.shortcut is None:
            return None
        last = len(self.shortcut.saved) - 1
        return x if last < 0 else self.shortcut.output(last, x)

    def image(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Return image_to_save(...) of the last step, from the block's input and output."""
        if self.shortcut is None:
            return None
        if self.settings.needs_residual():
            return self.residual(x)
        return y if self.settings.saves_y() else None

    def output(self, x: Tensor) -> Tensor:
        """Return the block's output, recomputed from its input by elementwise passes."""
        return self.steps.output(len(self.steps.saved) - 1, x, self.residual(x))


def saved_blocks(blocks: tuple[BlockSettings, ...], saved: Sequence[Any]) -> list[SavedBlock]:
    """Undo setup_context's flattening: the tensors of all steps, then what forward returned."""
    count = sum(len(b.steps) + len(b.shortcut or ()) for b in blocks)
    first, at = 0, count * TENSORS  # of the next step's tensors, and of what was kept of it

    def steps_of(settings: tuple[StepSettings, ...]) -> SavedSteps:
        nonlocal first, at
        steps = SavedSteps(settings, FIRST + first)
        for s in settings:
            step, names = SavedStep(*saved[first : first + TENSORS]), s.saved()
            for name, t in zip(names, saved[at : at + len(names)], strict=True):
                setattr(step, name, t)
            steps.saved.append(step)
            first, at = first + TENSORS, at + len(names)
        return steps

    found = []
    for block in blocks:
        start = FIRST + first
        shortcut = None if block.shortcut is None else steps_of(block.shortcut)
        found.append(SavedBlock(block, steps_of(block.steps), shortcut, start))
    return found
