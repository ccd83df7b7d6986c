"""The operators of batch_norm_act, what they return, and the calls that autograd is made of.

The formula and the passes over memory: interface.py, whose Function calls these, as the chains of
conv_bn_act do. x is a tensor, or a list of those whose concatenation it is: concat.py.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER, derivative_needs_only_y
from fastcnn.common.dtypes import as_acc, new_channels
from fastcnn.common.library import declare
from fastcnn.common.process_group import Group
from fastcnn.ops.batch_norm_act.concat import concat_apply, concat_bwd, concat_fwd, format_of
from fastcnn.ops.batch_norm_act.sync import frozen_bwd, merged_statistics, synced_bwd


def _fwd_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), new_channels(x), new_channels(x)


def _apply_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _bwd_fake(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_dresidual = args[-1]
    dresidual = torch.empty_like(x) if want_dresidual else x.new_empty(0)
    return torch.empty_like(x), dresidual, new_channels(x), new_channels(x)


declare(
    "batch_norm_act_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    "int act) -> (Tensor y, Tensor mean, Tensor var)",
    _fwd_fake,
)
declare(
    "batch_norm_act_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, int act) -> Tensor",
    _apply_fake,
)
declare(
    "batch_norm_act_bwd(Tensor dy, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, float eps, int act, bool training, bool want_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)
declare(
    "batch_norm_update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
    "Tensor var, Tensor? total, float momentum, SymInt count) -> ()",
    lambda *_: None,
)


# The overloads themselves, not their packets, which would look one up at every call.
_fwd = torch.ops.fastcnn.batch_norm_act_fwd.default
_apply = torch.ops.fastcnn.batch_norm_act_apply.default
_bwd = torch.ops.fastcnn.batch_norm_act_bwd.default
_update_running = torch.ops.fastcnn.batch_norm_update_running.default


def image_to_save(act: int, y: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return what backward needs beside x to know act'(z): y, the residual, or nothing."""
    if residual is None or act == ACT_NUMBER["none"]:
        return None
    return y if derivative_needs_only_y(act) else residual


def batch_norm_act_fwd(
    x: Tensor | list[Tensor],
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: int,
    group: Group | None = None,
) -> tuple[Tensor, ...]:
    """Return y, mean and biased variance, with the statistics of the batch.

    group: whose parts of the batch the statistics are over; a fourth tensor is then their count,
    and x is one tensor.
    """
    first = x if isinstance(x, Tensor) else x[0]
    weight, bias = as_acc(first, weight), as_acc(first, bias)
    if group is not None:
        mean, var, total = merged_statistics(first, group)
        return _apply(first, residual, weight, bias, mean, var, eps, act), mean, var, total
    run = _fwd if isinstance(x, Tensor) else concat_fwd
    y, mean, var = run(x, residual, weight, bias, eps, act)
    return y, mean, var


def batch_norm_act_apply(
    x: Tensor | list[Tensor],
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
) -> Tensor:
    """Return y with the statistics given: evaluation, and the recomputation of an activation."""
    first, run = (x, _apply) if isinstance(x, Tensor) else (x[0], concat_apply)
    parameters = (as_acc(first, t) for t in (weight, bias, mean, var))
    return run(x, residual, *parameters, eps, act)


def batch_norm_act_bwd(
    dy: Tensor,
    x: Tensor | list[Tensor],
    saved: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
    training: bool,
    want_dresidual: bool,
    want_dx: bool = True,
    want_parameters: bool = True,
    total: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dresidual, dweight, dbias, with None for what was not there or not wanted.

    dx: a list where x is one. saved: image_to_save(...) of the forward. dy may come in any layout,
    also expanded; it is brought to x's. total, group: of the forward; want_dx spares a group the
    collective, and want_parameters a frozen batch norm (fixed statistics) the pass that sums.
    """
    xs = [x] if isinstance(x, Tensor) else x
    first = xs[0]
    dy = dy.contiguous(memory_format=format_of(xs) or torch.contiguous_format)
    if group is not None and total is not None:
        dx, dresidual, dweight, dbias = synced_bwd(
            dy, first, saved, weight, bias, mean, var, eps, act, want_dx, want_dresidual, total,
            group,
        )  # fmt: skip
    else:
        stats = as_acc(first, mean), as_acc(first, var)
        affine = as_acc(first, weight), as_acc(first, bias)
        if len(xs) == 1 and not (training or want_parameters or want_dresidual):
            dx = frozen_bwd(dy, first, saved, *affine, mean, var, eps, act)
            return dx, None, None, None
        run = _bwd if isinstance(x, Tensor) else concat_bwd
        dx, dresidual, dweight, dbias = run(
            dy, x, saved, *affine, *stats, eps, act, training, want_dresidual
        )
    return (
        dx,
        dresidual if want_dresidual else None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


def fixed_statistics(
    running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the running statistics as they are now, for a Function that saves them.

    A later forward in training moves them in place, and no version counter tells backward. Two
    copies take 7 us (2-core AMD EPYC); to(copy=True) takes 18.
    """
    if running_mean is None or running_var is None or not torch.is_grad_enabled():
        return running_mean, running_var
    return running_mean.clone(), running_var.clone()


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
    total: Tensor | None = None,
) -> None:
    """Blend statistics of `count` values a channel into the running ones, as PyTorch does.

    The variance is made unbiased. total: the count where x was a part of the batch. An empty batch
    leaves the running statistics as they are.
    """
    if running_mean is None or running_var is None or (count == 0 and total is None):
        return
    count = 0 if total is not None else count
    _update_running(running_mean, running_var, mean, var, total, momentum, count)
