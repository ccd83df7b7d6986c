"""group_norm_act and pixel_norm_act: the operators, what they return, and their autograd.

    z = (x - mean) * rstd * weight + bias                   rstd = 1 / sqrt(var + eps)
    y = act(z)

x, y: [n, c, h, w]; weight, bias: [c]. mean and var (biased) have the accumulate type: float32, and
float64 for a float64 x.

group_norm_act  mean, var: [n, groups], over a sample's c / groups neighbouring channels, h and w
pixel_norm_act  mean, var: [n, h * w], over a pixel's channels: LayerNorm2d

Data movement in passes over the tensor: group_norm_act forward 3 and backward 5, or 2 and 3 where
what is normalised together stays in a cache from one pass to the next; pixel_norm_act 2 and 3.
Saved for backward: x, mean, var and the parameters. y is not saved: z is recomputed from x.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import act_number
from fastcnn.common.checks import check_channels, check_eps, check_image, memory_format_of
from fastcnn.common.dtypes import acc_type, as_acc
from fastcnn.common.library import apply, declare, distinct, once_differentiable, positional
from fastcnn.common.overrides import has_torch_function_variadic, overridable, overridden

OP = "group_norm_act"


def _statistics(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean, var = (x.new_empty((x.shape[0], count), dtype=acc_type(x)) for _ in range(2))
    return mean, var


def _group_fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x, groups)


def _pixel_fwd_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_statistics(x, x.shape[2] * x.shape[3])


def _bwd_fake(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(x.shape[1], dtype=acc_type(x)) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


_BWD = (
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    "int act) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
declare(
    "group_norm_act_fwd(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, int act) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _group_fwd_fake,
)
declare("group_norm_act_bwd" + _BWD, _bwd_fake)
declare(
    "pixel_norm_act_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, int act) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _pixel_fwd_fake,
)
declare("pixel_norm_act_bwd" + _BWD, _bwd_fake)


_group_fwd = torch.ops.fastcnn.group_norm_act_fwd.default
_group_bwd = torch.ops.fastcnn.group_norm_act_bwd.default
_pixel_fwd = torch.ops.fastcnn.pixel_norm_act_fwd.default
_pixel_bwd = torch.ops.fastcnn.pixel_norm_act_bwd.default


class GroupNormActFunction(torch.autograd.Function):
    """y, mean, var; statistics by groups, or with groups None by pixels. Backward of y."""

    @staticmethod
    @positional
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int | None,
        eps: float,
        act: int,
        move: Callable[[Any], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = as_acc(x, weight), as_acc(x, bias)
        if groups is None:
            y, mean, var = _pixel_fwd(x, *parameters, eps, act)
        else:
            y, mean, var = _group_fwd(x, *parameters, groups, eps, act)
        return y, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, groups, ctx.eps, ctx.act, move = inputs
        _, mean, var = output
        if move is not None:
            move(output)
        ctx.per_pixel = groups is None
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, bias, mean, var = ctx.saved_tensors
        dy = dy.contiguous(memory_format=memory_format_of(x) or torch.contiguous_format)
        bwd = _pixel_bwd if ctx.per_pixel else _group_bwd
        dx, dweight, dbias = bwd(
            dy, x, as_acc(x, weight), as_acc(x, bias), mean, var, ctx.eps, ctx.act
        )
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def check_norm(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    channels: int | None = None,
) -> int:
    """Check what all forms have in common, and return the activation's number."""
    check_image(op, "input", input)
    if channels is not None and input.shape[1] != channels:
        raise ValueError(f"{op}: input: expected {channels} channels, got {input.shape[1]}")
    number = act_number(op, act)
    check_eps(op, eps)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_channels(op, name, t, input.shape[1], input)
    return number


def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, apply, and return y with mean and var: see fastcnn.functional.group_norm_act."""
    number = check_norm(OP, input, weight, bias, eps, act)
    n, c, h, w = input.shape
    if not isinstance(num_groups, int):
        raise TypeError(f"{OP}: num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or c % num_groups != 0:
        raise ValueError(f"{OP}: num_groups: expected a divisor of {c} channels, got {num_groups}")
    if n * (c // num_groups) * h * w == 1:
        raise ValueError(
            f"{OP}: input: expected more than 1 value per group, or more than one sample, got "
            f"sizes {[n, c, h, w]} with {num_groups} groups"
        )
    tensors = distinct(input, weight, bias)
    y, mean, var = apply(GroupNormActFunction, *tensors, num_groups, float(eps), number, None)
    return y, mean, var


@overridable
def pixel_norm_act(
    op: str,
    input: Tensor,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """Normalise each pixel over its channels: the computation of fastcnn.nn.LayerNorm2d, `op`."""
    if has_torch_function_variadic(input, weight, bias):
        return overridden(locals())
    number = check_norm(op, input, weight, bias, eps, act, channels)
    tensors = distinct(input, weight, bias)
    y, _, _ = apply(GroupNormActFunction, *tensors, None, float(eps), number, None)
    return y
