"""What blocks of conv_bn_act are asked, step by step, and what is known of each step then."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.ops.conv_bn_act.step import (
    BlockSettings,
    ConvBnActBlock,
    ConvBnActStep,
    StepSettings,
    check_step,
)


class CheckedStep(NamedTuple):
    """A step as it came, what its weight and bias are cast to, and what was found out."""

    given: ConvBnActStep
    dtype: torch.dtype | None
    settings: StepSettings
    input: list[int]  # sizes
    values: int  # of a channel of the convolution's output


class CheckedBlock(NamedTuple):
    """A block's steps, its shortcut's, and the sizes of its output."""

    steps: tuple[CheckedStep, ...]
    shortcut: tuple[CheckedStep, ...] | None
    output: list[int]

    def settings(self) -> BlockSettings:
        """Return what the Function takes of it."""
        shortcut = None if self.shortcut is None else tuple(s.settings for s in self.shortcut)
        return BlockSettings(tuple(s.settings for s in self.steps), shortcut)


def steps_of(blocks: Iterable[CheckedBlock]) -> list[CheckedStep]:
    """Return all steps in the order in which they run: a block's shortcut before its steps."""
    return [step for block in blocks for step in (*(block.shortcut or ()), *block.steps)]


def saving_outputs(block: CheckedBlock) -> CheckedBlock:
    """Return a block whose backward recomputes nothing: memory="full"."""

    def chain(steps: tuple[CheckedStep, ...], with_last: bool) -> tuple[CheckedStep, ...]:
        found = []
        for i, step in enumerate(steps, start=1):
            read = i < len(steps) or with_last
            found.append(step._replace(settings=step.settings._replace(saves_output=read)))
        return tuple(found)

    shortcut = block.shortcut
    if shortcut is not None:
        shortcut = chain(shortcut, with_last=block.settings().needs_residual())
    return block._replace(steps=chain(block.steps, with_last=False), shortcut=shortcut)


def check_block(
    op: str,
    block: ConvBnActBlock,
    x: Tensor,
    sizes: list[int],
    dtype: torch.dtype | None,
    memory: str,
    adds: bool,
) -> CheckedBlock:
    """Check a block whose input has these sizes, and x's dtype, device and layout.

    dtype: autocast's, None where it is off. adds: a residual comes as a tensor.
    """
    if not isinstance(block, ConvBnActBlock):
        raise TypeError(f"{op}: blocks: expected ConvBnActBlocks, got {type(block).__name__}")
    shortcut, added = None, sizes
    if block.shortcut is not None:
        shortcut, added = _chain(op, "shortcut", block.shortcut, x, sizes, dtype, memory)
    steps, out = _chain(op, "steps", block.steps, x, sizes, dtype, memory)
    if not steps:
        raise ValueError(f"{op}: steps: expected at least one, got none")
    if shortcut is not None and added != out:
        raise ValueError(f"{op}: shortcut: expected sizes {out} as the steps give, got {added}")
    if (adds or shortcut is not None) and steps[-1].settings.pool is not None:
        raise ValueError(
            f"{op}: pool: expected None in the last step of a block with a residual, "
            f"got {block.steps[-1].pool}"
        )
    return CheckedBlock(steps, shortcut, out)


def _chain(
    op: str,
    name: str,
    steps: Sequence[ConvBnActStep],
    x: Tensor,
    sizes: list[int],
    dtype: torch.dtype | None,
    memory: str,
) -> tuple[tuple[CheckedStep, ...], list[int]]:
    found = []
    if not isinstance(steps, (tuple, list)) or isinstance(steps, ConvBnActStep):
        raise TypeError(
            f"{op}: {name}: expected a tuple or list of steps, got {type(steps).__name__}"
        )
    if name != "steps":
        op = f"{op}: {name}"
    for i, step in enumerate(steps):
        if not isinstance(step, ConvBnActStep):
            raise TypeError(f"{op}: step {i}: expected a ConvBnActStep, got {type(step).__name__}")
        settings, raw, out = check_step(f"{op}: step {i}", step, x, sizes, dtype, memory)
        values = raw[0] * raw[2] * raw[3]
        found.append(CheckedStep(step, dtype, settings, sizes, values))
        sizes = out
    return tuple(found), sizes
