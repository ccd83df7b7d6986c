"""A step's convolution with what stands beside it: fused by Triton, or passes around PyTorch's.

The plan of a step says for its convolution, its input's gradient and its weight's whether Triton
runs them (StepPlan; candidates.py chooses). Triton's kernels read the convolution output of the
step before and apply batch norm and activation while loading, so that the activation is not
written, and neither is the gradient of a convolution output; they give the statistics and sums of
what they write. Where PyTorch's convolution stands beside them it gets what it needs by a
pass. X and Y are the step's input and output, raw:

                    PyTorch's                             Triton's
    forward         a: read X, write a                    read X
                    y: read a, write Y                    write Y
                    statistics: read Y                    -
    backward        sums: read dy, Y                      - (with the next step's dx)
                    g: read dy, Y, write g                -
                    dx: read g, write dx                  read dz, Y, X, write dz before
                    dw: read X, write a; read g, a        read dz, Y, X

A convolution's bias is left out where Triton runs it: batch norm takes it off again with the mean.
Not where processes share statistics, since not all of them need have the same plan.
"""

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import in_format_of
from fastcnn.common.conv_operands import Gradient, Input, Output, Sums
from fastcnn.common.dtypes import as_acc
from fastcnn.common.process_group import Group
from fastcnn.ops.batch_norm_act.operators import batch_norm_act_apply
from fastcnn.ops.batch_norm_act.sync import frozen_bwd, merged_statistics, shared_sums
from fastcnn.ops.conv2d.aten import convolve_bwd
from fastcnn.ops.conv2d.fused import (
    conv2d_fused,
    conv2d_fused_bwd_input,
    conv2d_fused_bwd_weight,
)
from fastcnn.ops.conv_bn_act.step import StepSettings

_NONE = ACT_NUMBER["none"]
_reduce = torch.ops.fastcnn.batch_norm_act_reduce.default
_dx = torch.ops.fastcnn.batch_norm_act_dx.default


def written(a: Input) -> Tensor:
    """Return act(norm(x)): a pass where the batch norm was left to the convolution."""
    if a.norm is None:
        return a.x
    mean, var, weight, bias, eps = a.norm
    return batch_norm_act_apply(a.x, None, weight, bias, mean, var, eps, a.act)


def fused_raw(
    a: Input, weight: Tensor, conv_bias: Tensor | None, s: StepSettings, statistics: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a fused step's convolution output, and its mean and variance where asked for."""
    bias = None if s.group is None else conv_bias
    return conv2d_fused(a, weight, s.conv, Output(statistics=statistics, bias=bias))


def leaves_out_bias(s: StepSettings) -> bool:
    """Whether a step's convolution output is without the convolution's bias."""
    return s.plan.fwd and s.group is None


def batch_statistics(raw: Tensor, group: Group | None) -> tuple[Tensor, ...]:
    """Return mean and biased variance of raw, and with a group those of all its parts, and count.

    One pass over raw.
    """
    found = merged_statistics(raw, group)
    return found[:2] if group is None else found


def gradient_sums(dy: Tensor, raw: Tensor, norm: Norm, act: int) -> Sums:
    """Return the sums of dz = dy * act'(norm(raw)) and of dz * xhat: one pass over dy and raw."""
    return _sums(dy, raw, None, norm, act, False)[1]


def _sums(
    dy: Tensor, raw: Tensor, image: Tensor | None, norm: Norm, act: int, want_dz: bool
) -> tuple[Tensor, Sums]:
    mean, var, weight, bias = (as_acc(raw, t) for t in norm[:4])
    dz, times_xhat, gradient = _reduce(
        dy, raw, image, weight, bias, mean, var, norm.eps, act, want_dz
    )
    return dz, Sums(gradient, times_xhat)


def gradient_written(d: Gradient) -> Tensor:
    """Return the gradient of the convolution output: one pass."""
    assert d.raw is not None
    assert d.norm is not None
    mean, var, weight, bias = (as_acc(d.raw, t) for t in d.norm[:4])
    if d.sums is None:
        statistics = d.norm.mean, d.norm.var
        return frozen_bwd(d.dy, d.raw, None, weight, bias, *statistics, d.norm.eps, d.act)
    gradient, times_xhat = d.sums
    count = gradient.new_full((1,), d.raw.numel() // d.raw.shape[1])
    return _dx(
        d.dy, d.raw, None, weight, bias, mean, var, times_xhat, gradient, count,
        d.norm.eps, d.act, True,
    )  # fmt: skip


def batch_norm_gradient(
    dy: Tensor,
    raw: Tensor,
    image: Tensor | None,
    norm: Norm,
    conv_bias: Tensor | None,
    s: StepSettings,
    sums: Sums | None,
    want_dz: bool,
    want_sums: bool,
    want_any: bool,
    total: Tensor | None,
) -> tuple[Gradient, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradient in front of a step's batch norm, not written, and what comes with it.

    That is dz where it is wanted, and the gradients of norm's weight and bias and of conv_bias.

    sums: where dy is dz already. image, total: as in batch_norm_act_bwd. want_sums: whether fixed
    statistics need them; want_any: whether the convolution does, as in batch_norm_act_bwd.
    """
    act = s.act if sums is None else _NONE
    dy = in_format_of(dy, raw)
    if sums is None and (want_dz or image is not None or want_sums or s.training):
        writes = want_dz or image is not None
        dz, sums = _sums(dy, raw, image, norm, act, writes)
        if writes:
            dy, act = dz, _NONE
    shared = sums if s.training else None
    if shared is not None and s.group is not None and total is not None and want_any:
        shared = _over_all(shared, raw, s.group, total)
    d = Gradient(dy, raw, norm, act, shared)
    added = dy if want_dz else None
    if sums is None:
        return d, added, None, None, None
    gradient, times_xhat = sums
    dconv_bias = bias_gradient(conv_bias, s)
    if conv_bias is not None and not s.training:
        dbias = gradient if norm.weight is None else gradient * norm.weight
        dconv_bias = (dbias * (norm.var + norm.eps).rsqrt()).to(conv_bias.dtype)
    return (
        d,
        added,
        None if norm.weight is None else times_xhat.to(norm.weight.dtype),
        None if norm.bias is None else gradient.to(norm.bias.dtype),
        dconv_bias,
    )


def bias_gradient(conv_bias: Tensor | None, s: StepSettings) -> Tensor | None:
    """Return a convolution's bias's gradient where it is 0, else None.

    The statistics of the batch follow a bias; those of a batch of which this is a part do not.
    """
    if conv_bias is None or not s.training or s.group is not None:
        return None
    return torch.zeros_like(conv_bias)


def _over_all(sums: Sums, raw: Tensor, group: Group, total: Tensor) -> Sums:
    """Return the sums over all parts of the batch, for kernels that divide by the values of one."""
    # In the order of every other backward pass: ranks may have different plans.
    shared = shared_sums(sums[1], sums[0], group) * (raw.numel() // raw.shape[1] / total)
    return Sums(shared[1], shared[0])


def convolution_bwd(
    d: Tensor | Gradient,
    a: Input,
    weight: Tensor,
    bias: Tensor | None,
    s: StepSettings,
    want: tuple[bool, bool, bool],
    add: Tensor | None = None,
) -> tuple[Tensor | None, Sums | None, Tensor | None, Tensor | None]:
    """Return dx and its sums, dweight and dbias, with None for what is not wanted or not there.

    d: the gradient of the convolution output, written or not. With sums, dx is the gradient before
    a.norm, else that of what the convolution read, plus `add`.
    """
    dx: Tensor | None = None
    dweight: Tensor | None = None
    sums: Sums | None = None
    fused = want[0] and s.plan.dx, want[1] and s.plan.dw
    rest = (want[0] and not fused[0], want[1] and not fused[1], want[2])
    if isinstance(d, Gradient) and any(rest):
        d = gradient_written(d)
    by_triton = d if isinstance(d, Gradient) else Gradient(d)
    if fused[1]:
        dweight = conv2d_fused_bwd_weight(by_triton, weight, a, s.conv)
    if fused[0]:
        dx, *found = conv2d_fused_bwd_input(by_triton, weight, a, s.conv, add)
        sums = None if a.norm is None else Sums(*found)
    if any(rest):
        assert isinstance(d, Tensor)
        # For a frozen weight only the input's sizes matter, and x has them.
        image = written(a) if rest[1] else a.x
        by_torch = convolve_bwd(d, image, weight, bias, s.conv, rest)
        if rest[0]:
            dx = by_torch[0]
            if dx is not None and add is not None:
                dx += add
        dweight = by_torch[1] if rest[1] else dweight
        return dx, sums, dweight, by_torch[2]
    return dx, sums, dweight, None
