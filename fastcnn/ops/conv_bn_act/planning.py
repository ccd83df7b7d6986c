"""How the convolutions of all steps of a call run: one choice of candidates.py a step."""

from collections.abc import Sequence

from torch import Tensor

from fastcnn.ops.conv_bn_act.candidates import plan_step
from fastcnn.ops.conv_bn_act.validate import CheckedBlock, CheckedStep


def plan_blocks(blocks: Sequence[CheckedBlock], x: Tensor) -> list[CheckedBlock]:
    """Return the blocks with the choice in each step's settings."""

    def planned(step: CheckedStep) -> CheckedStep:
        by_triton = plan_step(step.settings, x, step.input, step.given.weight)
        return step._replace(settings=step.settings._replace(by_triton=by_triton))

    def chain(steps: tuple[CheckedStep, ...]) -> tuple[CheckedStep, ...]:
        return tuple(planned(step) for step in steps)

    return [
        block._replace(
            steps=chain(block.steps),
            shortcut=None if block.shortcut is None else chain(block.shortcut),
        )
        for block in blocks
    ]
