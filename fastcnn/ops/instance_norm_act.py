"""instance_norm_act: group_norm_act with a group a channel, and torch's running statistics."""

import torch
from torch import Tensor

from fastcnn.common.checks import check_parameters
from fastcnn.common.library import apply, distinct
from fastcnn.common.overrides import has_torch_function_variadic, overridden
from fastcnn.ops.group_norm_act import GroupNormActFunction, check_norm

_update_running = torch.ops.fastcnn.batch_norm_update_running.default


def instance_norm_act(
    op: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    """Normalise each channel of each sample and update the running statistics, if any.

    They move towards the mean over the batch of the samples' statistics, each variance made
    unbiased, as in torch.nn.functional.instance_norm: the computation of `op`.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return overridden(instance_norm_act, locals())
    number = check_norm(op, input, weight, bias, eps, act)
    n, c, h, w = input.shape
    if h * w == 1:
        raise ValueError(
            f"{op}: input: expected more than 1 pixel in an image, got sizes {[n, c, h, w]}"
        )
    check_parameters(
        op, input.shape, input, weight, bias, running_mean, running_var, True, momentum, eps
    )
    tensors = distinct(input, weight, bias)
    y, mean, var = apply(GroupNormActFunction, *tensors, c, float(eps), number)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        _update_running(running_mean, running_var, mean.mean(0), var.mean(0), None, momentum, h * w)
    return y
