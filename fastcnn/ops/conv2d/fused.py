"""Convolutions with batch norm and activation on either side, in one kernel: for CUDA, in Triton.

    conv2d_fused             a   = act(norm(x)), or x                      where norm is given
                             y   = act(norm(conv2d(a, weight)) + residual), or + bias without a norm
                             and mean and biased variance of conv2d(a, weight), where asked for
    conv2d_fused_bwd_input   g   = batch norm's gradient of dz             where norm is given
                             dz  = dy * act'(norm(raw))
                             dx  = act'(norm(raw)) * (conv2d's gradient by its input of g + add)
                             and the sums of dx and dx * xhat               where activated
    conv2d_fused_bwd_weight  dw  = conv2d's gradient by its weight of g and a

norm(t) = (t - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), per channel, with None for
a weight of 1 and a bias of 0. Images are channels_last; a weight in another layout is copied.
Formulas, floors in bytes and kernels: fastcnn/triton/conv2d_kernels.py and conv2d_bwd_kernels.py.
They run on the CPU where Triton's interpreter is on.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_geometry import ConvGeometry, output_size
from fastcnn.common.library import declare

Sums = tuple[Tensor, Tensor]
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


class Input(NamedTuple):
    """A convolution's input: x, or act(norm(x)) that was not written."""

    x: Tensor
    norm: Norm | None = None
    act: int = 0


class Gradient(NamedTuple):
    """A gradient in front of a batch norm, dz = dy * act'(norm(raw)); act 0: dy is dz.

    sums: of dz and dz * xhat over the batch; None with fixed statistics.
    """

    dy: Tensor
    raw: Tensor
    norm: Norm
    act: int
    sums: Sums | None


def _norm_arguments(prefix: str) -> str:
    names = ("mean", "var", "weight", "bias")
    return ", ".join(f"Tensor? {prefix}{name}" for name in names) + f", float {prefix}eps"


def _new(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(
        sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _channels(like: Tensor, channels: int) -> Tensor:
    return like.new_empty(channels, dtype=torch.float32)


def _fwd_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics, stride, padding, dilation, _ = args[-5:]
    sides = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = _new(x, x.shape[0], weight.shape[0], *sides)
    c = weight.shape[0] if statistics else 0
    return y, _channels(x, c), _channels(x, c)


def _bwd_input_fake(
    dy: Tensor, weight: Tensor, h: int, w: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    groups, in_raw = args[-1], args[10]
    c_in = weight.shape[1] * groups
    c = 0 if in_raw is None else c_in
    return _new(dy, dy.shape[0], c_in, h, w), _channels(dy, c), _channels(dy, c)


def _bwd_weight_fake(dy: Tensor, x: Tensor, kernel_h: int, kernel_w: int, *args: Any) -> Tensor:
    return _new(x, dy.shape[1], x.shape[1] // args[-1], kernel_h, kernel_w)


declare(
    f"conv2d_fused(Tensor x, Tensor weight, Tensor? bias, {_norm_arguments('in_')}, int in_act, "
    f"{_norm_arguments('out_')}, Tensor? residual, int out_act, bool statistics, {_GEOMETRY}) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _fwd_fake,
)
declare(
    "conv2d_fused_bwd_input(Tensor dy, Tensor weight, SymInt h, SymInt w, Tensor? out_raw, "
    f"{_norm_arguments('out_')}, int out_act, Tensor? sum, Tensor? sum_xhat, Tensor? add, "
    f"Tensor? in_raw, {_norm_arguments('in_')}, int in_act, {_GEOMETRY}) "
    "-> (Tensor dx, Tensor in_sum, Tensor in_sum_xhat)",
    _bwd_input_fake,
)
declare(
    "conv2d_fused_bwd_weight(Tensor dy, Tensor x, SymInt kernel_h, SymInt kernel_w, "
    f"Tensor? out_raw, {_norm_arguments('out_')}, int out_act, Tensor? sum, Tensor? sum_xhat, "
    f"{_norm_arguments('in_')}, int in_act, {_GEOMETRY}) -> Tensor",
    _bwd_weight_fake,
)
_fwd = torch.ops.fastcnn.conv2d_fused.default
_bwd_input = torch.ops.fastcnn.conv2d_fused_bwd_input.default
_bwd_weight = torch.ops.fastcnn.conv2d_fused_bwd_weight.default


def _when_called(name: str) -> Callable[..., Any]:
    """Return a function of fused_cuda.py, which is imported when it is called."""

    def run(*args: Any) -> Any:
        operator = getattr(importlib.import_module("fastcnn.ops.conv2d.fused_cuda"), name)
        try:
            return operator(*args)
        except (TypeError, ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RuntimeError(
                f"{name}: Triton could not run it: {type(error).__name__}: {error}; run the model "
                f"once in eager mode first: there the planner finds out, and PyTorch's convolution "
                f"runs instead (docs/planning.md)"
            ) from error

    return run


for _name in ("conv2d_fused", "conv2d_fused_bwd_input", "conv2d_fused_bwd_weight"):
    torch.library.impl(f"fastcnn::{_name}", ("cpu", "cuda"))(_when_called(_name))


def _or_none(norm: Norm | None) -> Norm | tuple[None, None, None, None, float]:
    # A constant of the function: torch.compile takes a number of the module for a changing one.
    return (None, None, None, None, 0.0) if norm is None else norm


def conv2d_fused(
    a: Input,
    weight: Tensor,
    g: ConvGeometry,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    act: int = 0,
    statistics: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and variance of the convolution, which are empty where not asked for.

    bias: the convolution's own, not beside a norm, which would take it off again.
    """
    return _fwd(
        a.x, weight, bias, *_or_none(a.norm), a.act, *_or_none(norm), residual, act,
        statistics, g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def conv2d_fused_bwd_input(
    dy: Tensor | Gradient, weight: Tensor, a: Input, g: ConvGeometry, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of what `a` was made from, and its sums, which are empty for a.norm None.

    add: another gradient of what the convolution read.
    """
    activated = (None if a.norm is None else a.x, *_or_none(a.norm), a.act)
    dy, behind = _behind(dy)
    return _bwd_input(
        dy, weight, *a.x.shape[2:], *behind, add, *activated,
        g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def conv2d_fused_bwd_weight(
    dy: Tensor | Gradient, weight: Tensor, a: Input, g: ConvGeometry
) -> Tensor:
    """Return the weight's gradient."""
    dy, behind = _behind(dy)
    return _bwd_weight(
        dy, a.x, *weight.shape[2:], *behind, *_or_none(a.norm), a.act,
        g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def _behind(dy: Tensor | Gradient) -> tuple[Tensor, tuple[Any, ...]]:
    """Return dy, and the operators' arguments from out_raw to sum_xhat."""
    if isinstance(dy, Gradient):
        return dy.dy, (dy.raw, *dy.norm, dy.act, *(dy.sums or (None, None)))
    return dy, (None, *_or_none(None), 0, None, None)
