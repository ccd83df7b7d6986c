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
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_geometry import ConvGeometry, output_size
from fastcnn.common.conv_operands import Gradient, Input, Output
from fastcnn.common.library import by_name, declare, implement

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def _norm_arguments(prefix: str) -> str:
    names = ("mean", "var", "weight", "bias")
    return ", ".join(f"Tensor? {prefix}{name}" for name in names) + f", float {prefix}eps"


def _new(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(
        sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _channels(like: Tensor, channels: int) -> Tensor:
    return like.new_empty(channels, dtype=torch.float32)


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = args[:2]
    given = by_name(_fwd, args)
    geometry = given["stride"], given["padding"], given["dilation"]
    sides = output_size(x.shape[2:], weight.shape[2:], *geometry)
    c = weight.shape[0] if given["statistics"] else 0
    return _new(x, x.shape[0], weight.shape[0], *sides), _channels(x, c), _channels(x, c)


def _bwd_input_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, weight, h, w = args[:4]
    given = by_name(_bwd_input, args)
    c_in = weight.shape[1] * given["groups"]
    c = 0 if given["in_raw"] is None else c_in
    return _new(dy, dy.shape[0], c_in, h, w), _channels(dy, c), _channels(dy, c)


def _bwd_weight_fake(*args: Any) -> Tensor:
    dy, x, kernel_h, kernel_w = args[:4]
    groups = by_name(_bwd_weight, args)["groups"]
    return _new(x, dy.shape[1], x.shape[1] // groups, kernel_h, kernel_w)


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
    implement(_name, ("cpu", "cuda"), _when_called(_name))


def _norm(norm: Norm | None) -> tuple[Any, ...]:
    # A constant of the function: torch.compile takes a number of the module for a changing one.
    return (None, None, None, None, 0.0) if norm is None else tuple(norm)


def conv2d_fused(
    a: Input, weight: Tensor, g: ConvGeometry, out: Output
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and variance of the convolution, which are empty where not asked for."""
    return _fwd(
        a.x, weight, out.bias, *_norm(a.norm), a.act, *_norm(out.norm), out.residual, out.act,
        out.statistics, *g,
    )  # fmt: skip


def conv2d_fused_bwd_input(
    d: Gradient, weight: Tensor, a: Input, g: ConvGeometry, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of what `a` was made from, and its sums, which are empty for a.norm None.

    add: another gradient of what the convolution read.
    """
    raw = None if a.norm is None else a.x
    sides = a.x.shape[2:]
    return _bwd_input(d.dy, weight, *sides, *_gradient(d), add, raw, *_norm(a.norm), a.act, *g)


def conv2d_fused_bwd_weight(d: Gradient, weight: Tensor, a: Input, g: ConvGeometry) -> Tensor:
    """Return the weight's gradient."""
    window = weight.shape[2:]
    return _bwd_weight(d.dy, a.x, *window, *_gradient(d), *_norm(a.norm), a.act, *g)


def _gradient(d: Gradient) -> tuple[Any, ...]:
    """Return the operators' arguments from out_raw to sum_xhat."""
    return d.raw, *_norm(d.norm), d.act, *(d.sums or (None, None))
