"""batch_norm_act: the formula, its autograd, and what a user calls.

    z = (x - mean) * rstd * weight + bias + residual        rstd = 1 / sqrt(var + eps)
    y = act(z)

x, residual, y: [n, c, h, w]; mean, var (biased), weight, bias: [c]. mean and var have the
accumulate type: float32, and float64 for a float64 x.

Data movement in passes over the tensor: forward 3 (4 with a residual); backward 5, and 7 with a
residual. Saved for backward: x, mean, var, the parameters; and one image more where a residual was
added before an activation, since z cannot be recomputed from x alone there. For relu and relu6 that
is y, which tells the derivative and is the next layer's input anyway, so it costs no memory; for
the others the residual itself, which is some layer's output. Without a residual z is recomputed
from x.

The operators: fastcnn/ops/batch_norm_act/operators.py; over several processes: sync.py there; of
x in several tensors, a concatenation: concat.py.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import act_number
from fastcnn.common.checks import check_format, check_image, check_image_of, check_parameters
from fastcnn.common.library import (
    apply,
    apply_moving,
    distinct,
    once_differentiable,
    positional,
)
from fastcnn.common.process_group import Group, group_of
from fastcnn.ops.batch_norm_act.concat import check_pieces, format_of, sizes_of
from fastcnn.ops.batch_norm_act.operators import (
    batch_norm_act_apply,
    batch_norm_act_bwd,
    batch_norm_act_fwd,
    fixed_statistics,
    image_to_save,
    update_running,
)

OP = "batch_norm_act"


class BatchNormActFunction(torch.autograd.Function):
    """y, mean, var with statistics of the batch, and beside a group their count; else y alone."""

    @staticmethod
    @positional
    def forward(
        eps: float,
        act: int,
        group: Group | None,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        *xs_and_move: Any,
    ) -> tuple[Tensor, ...] | Tensor:
        *xs, _ = xs_and_move
        x = xs if len(xs) > 1 else xs[0]
        if mean is None or var is None:
            return batch_norm_act_fwd(x, residual, weight, bias, eps, act, group)
        return batch_norm_act_apply(x, residual, weight, bias, mean, var, eps, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.eps, ctx.act, ctx.group, residual, weight, bias, mean, var, *xs, move = inputs
        if move is not None:
            move(output)
        ctx.training = mean is None
        total = None
        if ctx.training:
            y, mean, var, *rest = output
            ctx.mark_non_differentiable(mean, var, *rest)
            total = rest[0] if rest else None
        else:
            y = output
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        saved = image_to_save(ctx.act, y, residual)
        ctx.save_for_backward(saved, weight, bias, mean, var, total, *xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved, weight, bias, mean, var, total, *xs = ctx.saved_tensors
        if dy is None:
            return (None,) * (9 + len(xs))
        want_dresidual, want_dweight, want_dbias = ctx.needs_input_grad[3:6]
        want_dx = any(ctx.needs_input_grad[8:-1])
        dx, *gradients = batch_norm_act_bwd(
            dy, xs if len(xs) > 1 else xs[0], saved, weight, bias, mean, var, ctx.eps, ctx.act,
            ctx.training, ctx.has_residual and want_dresidual, want_dx,
            want_dweight or want_dbias, total, ctx.group,
        )  # fmt: skip
        dxs = dx if isinstance(dx, list) else [dx]
        return None, None, None, *gradients, None, None, *dxs, None


def batch_norm_act(
    input: Tensor | tuple[Tensor, ...] | list[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: str,
    sync: bool,
    process_group: object,
) -> Tensor:
    """Check, apply, update the running statistics: see fastcnn.functional.batch_norm_act."""
    if isinstance(input, (tuple, list)):
        check_pieces(OP, input)
        xs = list(input)
    else:
        check_image(OP, "input", input)
        xs = [input]
    number = act_number(OP, act)
    group = group_of(OP, sync, process_group)
    sizes = xs[0].shape if len(xs) == 1 else sizes_of(xs)
    check_parameters(
        OP, sizes, xs[0], weight, bias, running_mean, running_var, training, momentum, eps,
        is_part=group is not None,
    )  # fmt: skip
    if residual is not None:
        check_image_of(OP, "residual", residual, sizes, xs[0])
        check_format(OP, "residual", residual, format_of(xs))
    if len(xs) > 1 and (group is not None or xs[0].device.type == "cuda"):
        xs = [torch.cat(xs, 1)]
    if not training:
        fixed = fixed_statistics(running_mean, running_var)
        tensors = distinct(residual, weight, bias, *fixed, *xs)
        return apply(BatchNormActFunction, eps, number, None, *tensors, None)

    def move(output: tuple[Tensor, ...]) -> None:
        _, mean, var, *total = output
        count = sizes[0] * sizes[2] * sizes[3]
        update_running(running_mean, running_var, mean, var, momentum, count, *total)

    tensors = distinct(residual, weight, bias, None, None, *xs)
    y, *_ = apply_moving(BatchNormActFunction, eps, number, group, *tensors, move=move)
    return y
