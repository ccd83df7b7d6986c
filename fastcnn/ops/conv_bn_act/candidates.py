"""How the convolution of a step in training runs on CUDA, for the planner to choose from.

    conv_bn_act_fwd    from a step's input to its convolution output, and the statistics of that
        cudnn     cuDNN's convolution, a pass over its output for the statistics
        triton    one kernel

Bytes: triton reads x and the weight and writes y; cudnn reads y once more. All else is the same in
both: the activation before is written by a pass, as the one behind is, and the gradients are
cuDNN's, with batch norm's own passes around them. Triton's kernels could apply the batch norm
before while loading, and take gradients through it; they lost more of the tensor cores' time than
the passes take (docs/gpu-notes.md).

A convolution's bias is left out where Triton runs it: batch norm takes it off again with the mean.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.ops.batch_norm_act.sync import merged_statistics
from fastcnn.ops.conv2d.aten import convolve
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act.problem import (
    Sizes,
    Synthetic,
    geometry_of,
    problem,
    without_triton,
)
from fastcnn.ops.conv_bn_act.step import StepSettings
from fastcnn.plan import Candidate, Kernel, Op, Problem, choose, register

FWD = "conv_bn_act_fwd"


def plan_step(s: StepSettings, x: Tensor, sizes: Sequence[int], weight: Tensor) -> bool:
    """Choose whether Triton runs a step's convolution: whose input has these sizes and x's dtype.

    With fixed statistics there is nothing to fuse, and what processes share is a pass of its own.
    """
    if not s.training or s.group is not None:
        return False
    return choose(problem(FWD, x, sizes, weight.shape, s.conv)) == "triton"


def _cudnn(problem: Problem, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    raw = convolve(x, weight, None, geometry_of(problem))
    return raw, *merged_statistics(raw, None)[:2]


def _triton(problem: Problem, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return conv2d_fused(x, weight, geometry_of(problem), Epilogue(statistics=True))


def _kernels(problem: Problem, fused: bool) -> list[Kernel]:
    size, merge = Sizes(problem), Kernel(0)
    return [size.triton(), merge] if fused else [size.cudnn(), Kernel(size.y), merge]


def _tensors(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
    synthetic = Synthetic(problem, generator)
    return synthetic.image(problem.x), synthetic.weight()


def _exact(problem: Problem, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Return the convolution output, its mean and biased variance, in float64."""
    raw = torch.conv2d(x.double(), weight.double(), None, *geometry_of(problem))
    of_channels = raw.transpose(0, 1).flatten(1)
    return raw, of_channels.mean(1), of_channels.var(1, correction=0)


register(
    Op(FWD, _tensors, _exact, "cudnn", scale_of=(0, 0, 0)),
    Candidate("cudnn", _cudnn, lambda _: None, partial(_kernels, fused=False)),
    Candidate("triton", _triton, without_triton, partial(_kernels, fused=True)),
)
