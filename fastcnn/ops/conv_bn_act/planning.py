"""How the convolutions of all steps of a call run: one choice of candidates.py a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.ops.conv_bn_act.candidates import plan_step
from fastcnn.ops.conv_bn_act.validate import CheckedBlock, CheckedStep, steps_of


def plan_blocks(blocks: Sequence[CheckedBlock], x: Tensor) -> list[CheckedBlock]:
    """Return the blocks with a plan in each step's settings."""
    steps = [step.given for step in steps_of(blocks)]
    tensors = [x, *(t for step in steps for t in step if isinstance(t, Tensor))]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def chain(steps: tuple[CheckedStep, ...], wants_dx: bool) -> tuple[CheckedStep, ...]:
        found: list[CheckedStep] = []
        for step in steps:
            before = found[-1].settings if found else None
            plan = plan_step(
                step.settings, x, step.input, step.given.weight, before, wants_dx, trains
            )
            found.append(step._replace(settings=step.settings._replace(plan=plan)))
        return tuple(found)

    planned = []
    for i, block in enumerate(blocks):
        wants_dx = i > 0 or x.requires_grad
        shortcut = None if block.shortcut is None else chain(block.shortcut, wants_dx)
        planned.append(block._replace(steps=chain(block.steps, wants_dx), shortcut=shortcut))
    return planned
