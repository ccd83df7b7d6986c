"""What a chain of conv_bn_act is asked, step by step, and what is known of it then."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.common.autocast import cast
from fastcnn.ops.batch_norm_act.operators import update_running
from fastcnn.ops.conv_bn_act.candidates import planned
from fastcnn.ops.conv_bn_act.passes import leaves_out_bias
from fastcnn.ops.conv_bn_act.step import (
    BlockGeometry,
    ConvBnActBlock,
    ConvBnActStep,
    Geometry,
    check_step,
)


class Check:
    """Checks blocks one after the other, and holds what the Function needs of them."""

    def __init__(self, x: Tensor, dtype: torch.dtype | None, memory: str) -> None:
        self.x, self.dtype, self.memory = x, dtype, memory
        self.blocks: list[BlockGeometry] = []
        # Of all blocks' steps, in the order in which they run.
        self.steps: list[ConvBnActStep] = []
        self.geometry: list[Geometry] = []
        self.inputs: list[list[int]] = []  # sizes
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
            self.inputs.append(sizes)
            g, raw, sizes = check_step(f"{op}: step {i}", step, self.x, sizes, self.memory)
            found.append(g)
            self.steps.append(step)
            self.counts.append(raw[0] * raw[2] * raw[3])
        self.geometry += found
        return tuple(found), sizes

    def plan(self) -> None:
        """Choose how the convolutions of each step run."""
        numbers = iter(range(len(self.steps)))
        tensors = [self.x, *(t for s in self.steps for t in s if isinstance(t, Tensor))]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

        def chain(steps: tuple[Geometry, ...], wants_dx: bool) -> tuple[Geometry, ...]:
            found: list[Geometry] = []
            for g in steps:
                i, before = next(numbers), found[-1] if found else None
                weight = self.steps[i].weight
                found.append(planned(g, self.x, self.inputs[i], weight, before, wants_dx, trains))
            return tuple(found)

        blocks, self.blocks, self.geometry = self.blocks, [], []
        for block in blocks:
            wants_dx = bool(self.blocks) or self.x.requires_grad
            shortcut = None if block.shortcut is None else chain(block.shortcut, wants_dx)
            self.blocks.append(BlockGeometry(chain(block.steps, wants_dx), shortcut))
            self.geometry += (*(shortcut or ()), *self.blocks[-1].steps)

    def fixed(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the fixed mean and variance of a step's raw output, None in training."""
        s = self.steps[i]
        mean, var = (None, None) if s.training else (s.running_mean, s.running_var)
        if mean is not None and s.conv_bias is not None and leaves_out_bias(self.geometry[i]):
            mean = mean - s.conv_bias.detach()
        return mean, var

    def update_running(self, kept: Sequence[Tensor]) -> None:
        """Move the running statistics by what the Function has returned beside y."""
        values = iter(kept)
        for g, s, count in zip(self.geometry, self.steps, self.counts, strict=True):
            if not g.rerun:
                next(values)
            if g.training:
                mean, var = next(values), next(values)
                total = None if g.group is None else next(values)
                if s.conv_bias is not None and leaves_out_bias(g):
                    mean = mean + s.conv_bias.detach()
                update_running(s.running_mean, s.running_var, mean, var, s.momentum, count, total)
