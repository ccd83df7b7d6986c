"""A step's running statistics: those that are used as they are, and those that are moved."""

from collections.abc import Sequence

from torch import Tensor

from fastcnn.common.autocast import cast
from fastcnn.ops.batch_norm_act.operators import fixed_statistics, update_running
from fastcnn.ops.conv_bn_act.validate import CheckedStep


def statistics_of(checked: CheckedStep) -> tuple[Tensor | None, Tensor | None]:
    """Return the fixed mean and variance of a step's convolution, None in training."""
    step = checked.given
    if step.training:
        return None, None
    return fixed_statistics(step.running_mean, step.running_var)


def update_running_statistics(steps: Sequence[CheckedStep], kept: Sequence[Tensor]) -> None:
    """Move the running statistics by what the Function has kept of the steps."""
    at = 0
    for checked in steps:
        step, settings = checked.given, checked.settings
        names = settings.saved()
        if settings.training:
            first = at + names.index("mean")
            mean, var = kept[first : first + 2]
            total = kept[first + 2] if "total" in names else None
            if step.conv_bias is not None and settings.by_triton:  # it was left out
                mean = mean + cast(step.conv_bias.detach(), checked.dtype)
            moved = step.running_mean, step.running_var
            update_running(*moved, mean, var, step.momentum, checked.values, total)
        at += len(names)
