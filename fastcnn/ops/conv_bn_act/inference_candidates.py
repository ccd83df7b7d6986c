"""The candidates of a step with fixed statistics where no gradient is required, on CUDA.

    y = act(batch_norm(conv2d(x)) + residual)

    cudnn         cuDNN's convolution, a pass for the rest
    cudnn_fused   cuDNN's convolution + bias + ReLU (+ residual), batch norm folded into the
                  weights; cuDNN refuses some, so that only tuning chooses it
    triton        one kernel

Bytes: x, weight, residual and y once; cudnn writes and reads the convolution output besides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER, activation
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import check_format, check_like, in_format_of
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.batch_norm_act.operators import batch_norm_act_apply
from fastcnn.ops.conv2d.aten import convolve, max_pool
from fastcnn.ops.conv2d.cudnn_relu import conv2d_relu
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act.inference import folded, norm_of_step
from fastcnn.ops.conv_bn_act.problem import (
    Sizes,
    Synthetic,
    act_of,
    act_option,
    geometry_of,
    norm_of,
    normalised,
    problem,
    without_triton,
)
from fastcnn.ops.conv_bn_act.step import ConvBnActStep, StepSettings
from fastcnn.plan import Candidate, Kernel, Op, Problem, choose, register

EVAL = "conv_bn_act_eval"
Keep = Callable[..., Any]  # make(weight, *how, dtype), or what that gave before


class Arguments(NamedTuple):
    """What each candidate takes; own: the residual is of the block's making, in any layout."""

    x: Tensor
    weight: Tensor
    geometry: ConvGeometry
    norm: Norm
    act: int
    residual: Tensor | None
    own: bool


def _made(make: Callable[..., Any], *args: Any) -> Any:
    return make(*args)


def convolve_planned(
    x: Tensor,
    step: ConvBnActStep,
    s: StepSettings,
    residual: Tensor | None,
    own: bool,
    keep: Keep = _made,
) -> Tensor:
    """Return the step's output, pooled where it pools; in autocast the step has its own weight.

    own: the residual is of the block's making, and may come in the other layout.
    keep: makes what is made of the weight, or has kept it.
    """
    options = [act_option(s.act), *(["residual"] if residual is not None else [])]
    norm = norm_of_step(step)
    plan = choose(problem(EVAL, x, x.shape, step.weight.shape, s.conv, *options))
    if plan == "cudnn_fused":
        weight, bias = keep(folded, step.weight, step.conv_bias, norm, x.dtype)
        return max_pool(_cudnn_folded(x, weight, bias, s.conv, residual, own), s.pool)
    if step.conv_bias is not None:
        norm = norm._replace(mean=norm.mean - step.conv_bias)
    weight = keep(Tensor.to, step.weight, x.dtype)
    arguments = Arguments(x, weight, s.conv, norm, s.act, residual, own)
    return max_pool(_RUN[plan](arguments), s.pool)


def _cudnn(a: Arguments) -> Tensor:
    raw, residual = convolve(a.x, a.weight, None, a.geometry), a.residual
    if residual is not None and a.own:
        residual = in_format_of(residual, raw)
    elif residual is not None:
        check_like("conv_bn_act", "residual", residual, raw)
    mean, var, bn_weight, bn_bias, eps = a.norm
    return batch_norm_act_apply(raw, residual, bn_weight, bn_bias, mean, var, eps, a.act)


def _cudnn_fused(a: Arguments) -> Tensor:
    weight, bias = folded(a.weight, None, a.norm, a.x.dtype)
    return _cudnn_folded(a.x, weight, bias, a.geometry, a.residual, a.own)


def _cudnn_folded(
    x: Tensor, weight: Tensor, bias: Tensor, g: ConvGeometry, residual: Tensor | None, own: bool
) -> Tensor:
    y = conv2d_relu(x, weight, bias, residual, g.stride, g.padding, g.dilation, g.groups)
    if residual is not None and not own:
        check_like("conv_bn_act", "residual", residual, y)  # PyTorch has copied another layout
    return y


def _triton(a: Arguments) -> Tensor:
    residual = a.residual
    if residual is not None and a.own:
        residual = residual.contiguous(memory_format=torch.channels_last)
    elif residual is not None:
        check_format("conv_bn_act", "residual", residual, torch.channels_last)
    return conv2d_fused(a.x, a.weight, a.geometry, Epilogue(a.norm, residual, a.act))[0]


_RUN = {"cudnn": _cudnn, "cudnn_fused": _cudnn_fused, "triton": _triton}


def _tensors(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
    synthetic = Synthetic(problem, generator)
    residual = [synthetic.image(problem.y)] if "residual" in problem.options else []
    return synthetic.image(problem.x), synthetic.weight(), *synthetic.norm(problem.y[1]), *residual


def _exact(problem: Problem, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    z = normalised(convolve(x.double(), weight.double(), None, geometry_of(problem)), rest[:4])
    return activation(z + rest[4].double() if len(rest) > 4 else z, act_of(problem))


def _run(plan: str, problem: Problem, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    residual = rest[4] if len(rest) > 4 else None
    norm, act = norm_of(rest[:4]), ACT_NUMBER[act_of(problem)]
    return _RUN[plan](Arguments(x, weight, geometry_of(problem), norm, act, residual, False))


def _kernels(plan: str, problem: Problem) -> list[Kernel]:
    size = Sizes(problem)
    residual = size.y if "residual" in problem.options else 0
    if plan == "cudnn":
        return [size.cudnn(), Kernel(2 * size.y + residual)]
    # Folding: six small kernels, of which two read or write the weights.
    folding = [Kernel(2 * size.weight)] * 2 + [Kernel(0)] * 4
    return [*folding, size.cudnn(residual)] if plan == "cudnn_fused" else [size.triton(residual)]


def _supports(plan: str, problem: Problem) -> str | None:
    if plan == "cudnn":
        return None
    if plan == "triton":
        return without_triton(problem)
    if problem.device.type == "cuda" and not torch.backends.cudnn.is_available():
        return "there is no cuDNN"
    if "deterministic" in problem.options:
        return "PyTorch's operator does not ask cuDNN for deterministic ways"
    return None if act_of(problem) == "relu" else "relu only"


register(
    Op(EVAL, _tensors, _exact, "cudnn"),
    *(
        Candidate(
            plan,
            partial(_run, plan),
            partial(_supports, plan),
            partial(_kernels, plan),
        )
        for plan in _RUN
    ),
)
