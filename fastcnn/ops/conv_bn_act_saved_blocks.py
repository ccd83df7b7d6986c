"""What blocks of conv_bn_act have kept, from the flat tensors that autograd saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastcnn.ops.activation import ACT_NUMBER, slope_is_in_y
from fastcnn.ops.conv_bn_act_saved import FIRST, TENSORS, SavedStep, SavedSteps
from fastcnn.ops.conv_bn_act_step import BlockGeometry, Geometry


def saves_y(block: BlockGeometry) -> bool:
    """Whether backward needs the block's output; else, behind an activation, its residual."""
    act = block.steps[-1].act
    return act != ACT_NUMBER["none"] and slope_is_in_y(act)


@dataclass
class SavedBlock:
    """A block in backward; `first` is the place of its first tensor in the arguments."""

    geometry: BlockGeometry
    steps: SavedSteps
    shortcut: SavedSteps | None
    first: int

    def is_identity(self) -> bool:
        """Whether the shortcut is the block's input itself."""
        return self.geometry.shortcut == ()

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
        return y if saves_y(self.geometry) else self.residual(x)

    def output(self, x: Tensor) -> Tensor:
        """Return the block's output, rebuilt from its input by elementwise passes."""
        return self.steps.output(len(self.steps.saved) - 1, x, self.residual(x))


def saved_blocks(blocks: tuple[BlockGeometry, ...], saved: Sequence[Any]) -> list[SavedBlock]:
    """Undo setup_context's flattening: the tensors of all steps, then what forward returned."""
    count = sum(len(b.steps) + len(b.shortcut or ()) for b in blocks)
    tensors, kept = iter(saved[: count * TENSORS]), iter(saved[count * TENSORS :])
    first = FIRST

    def steps_of(geometry: tuple[Geometry, ...]) -> SavedSteps:
        nonlocal first
        steps = SavedSteps(geometry, first)
        for g in geometry:
            of_step = [next(tensors) for _ in range(TENSORS)]
            raw = None if g.rerun else next(kept)
            if g.training:
                of_step[4:] = next(kept), next(kept)
            of_step.append(None if g.group is None else next(kept))
            steps.saved.append(SavedStep(raw, *of_step))
        first += len(geometry) * TENSORS
        return steps

    found = []
    for block in blocks:
        start = first
        shortcut = None if block.shortcut is None else steps_of(block.shortcut)
        found.append(SavedBlock(block, steps_of(block.steps), shortcut, start))
    return found
