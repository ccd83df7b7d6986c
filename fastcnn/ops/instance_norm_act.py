"""instance_norm_act: group_norm_act with a group a channel, and torch's running statistics."""

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.checks import check_parameters
from fastcnn.common.library import apply, apply_moving, distinct
from fastcnn.common.overrides import has_torch_function_variadic, overridable, overridden
from fastcnn.ops.batch_norm_act.interface import batch_norm_act
from fastcnn.ops.group_norm_act import GroupNormActFunction, check_norm

_update_running = torch.ops.fastcnn.batch_norm_update_running.default


@overridable
def instance_norm_act(
    op: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of_input: bool,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    """Normalise each channel of each sample: torch.nn.functional.instance_norm with an activation.

    of_input: by the input's own statistics; the running ones, if any, then move towards the mean
    over the batch of the samples' statistics, each variance made unbiased. Else by the running
    ones. `op` is what errors call it.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return overridden(locals())
    weight, bias = _as_now(weight), _as_now(bias)
    if not of_input:
        return batch_norm_act(
            input, running_mean, running_var, weight, bias, False, 0.0, eps, None, act, False, None
        )
    number = check_norm(op, input, weight, bias, eps, act)
    n, c, h, w = input.shape
    if h * w == 1:
        raise ValueError(
            f"{op}: input: expected more than 1 pixel in an image, got sizes {[n, c, h, w]}"
        )
    check_parameters(
        op, input.shape, input, weight, bias, running_mean, running_var, True, momentum, eps
    )

    def move(output: tuple[Tensor, ...]) -> None:
        if running_mean is not None and running_var is not None and input.numel() > 0:
            mean, var = (t.mean(0) for t in output[1:])
            _update_running(running_mean, running_var, mean, var, None, momentum, h * w)

    arguments = (*distinct(input, weight, bias), c, float(eps), number)
    if number != ACT_NUMBER["none"]:
        y, *_ = apply_moving(GroupNormActFunction, *arguments, move=move)
        return y
    # torch's moves them when it has saved its last tensor, but before an activation saves one.
    output = apply(GroupNormActFunction, *arguments, None)
    move(output)
    return output[0]


def _as_now(parameter: Tensor | None) -> Tensor | None:
    """Return a copy where backward needs it: torch's too allows an optimizer's step in between."""
    if not isinstance(parameter, Tensor) or not parameter.requires_grad:
        return parameter
    return parameter.clone() if torch.is_grad_enabled() else parameter
