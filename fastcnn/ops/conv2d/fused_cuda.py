"""What the operators of fastcnn/ops/conv2d/fused.py run: their flat arguments, checked, launched.

The launches check sizes, types and layouts; here is what else could let a kernel read elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import check_storage
from fastcnn.common.conv_geometry import Pair
from fastcnn.triton.conv2d_bwd import (
    Activated,
    BatchNormGradient,
    Sums,
    conv2d_bwd_input,
    conv2d_bwd_weight,
)
from fastcnn.triton.conv2d_fwd import Epilogue, Prologue, conv2d
from fastcnn.triton.support import interpreted


def _protect(**tensors: Tensor | None) -> None:
    """Check what would let a kernel read elsewhere: one device, dense memory that is there."""
    check_storage("conv2d_fused", **tensors)
    first, *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in others:
        if t.device != first[1].device or t.layout is not torch.strided:
            raise ValueError(
                f"conv2d_fused: {name}: expected a dense tensor on {first[1].device} as "
                f"{first[0]}, got {t.layout} on {t.device}"
            )
    if not first[1].is_cuda and not interpreted():
        raise ValueError(
            f"conv2d_fused: {first[0]}: expected a CUDA tensor, since Triton's kernels run on "
            f"NVIDIA GPUs, got one on {first[1].device}"
        )


def _norm(
    name: str, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> tuple[Norm | None, dict[str, Tensor | None]]:
    """Return the batch norm of an operator's five arguments, and its tensors by name."""
    if (mean is None) != (var is None) or (mean is None and rest[:2] != (None, None)):
        raise ValueError(f"conv2d_fused: {name}: expected mean and var, or no batch norm at all")
    # A weight may be expanded, or a slice: small vectors, as everywhere.
    mean, var, weight, bias = (
        None if t is None else t.contiguous() for t in (mean, var, *rest[:2])
    )
    norm = None if mean is None or var is None else Norm(mean, var, weight, bias, rest[2])
    tensors = dict(zip(Norm._fields, (mean, var, weight, bias), strict=False))
    return norm, {f"{name}_{key}": t for key, t in tensors.items()}


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[Pair, Pair, Pair, int]:
    """Return what the dispatcher has made lists of as pairs again."""
    (a, b), (c, d), (e, f) = stride, padding, dilation
    return (a, b), (c, d), (e, f), groups


def _dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def conv2d_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator; args are the schema's from in_mean on."""
    in_act, residual, out_act, statistics, *geometry = args[5], *args[11:]
    before, named = _norm("in", *args[:5])
    behind, also = _norm("out", *args[6:11])
    _protect(x=x, weight=weight, bias=bias, residual=residual, **named, **also)
    prologue = None if before is None else Prologue(before, in_act)
    epilogue = Epilogue(behind, residual, out_act, statistics, bias)
    y, found = conv2d(x, _dense(weight), *_geometry(*geometry), prologue, epilogue)
    return y, *(found or (_empty(x), _empty(x)))


def _gradient(dy: Tensor, raw: Tensor | None, args: Sequence[Any]) -> BatchNormGradient | None:
    """Return Triton's BatchNormGradient of an operator's arguments from out_mean to sum_xhat."""
    norm, named = _norm("out", *args[:5])
    act, *sums = args[5:8]
    _protect(dy=dy, out_raw=raw, sum=sums[0], sum_xhat=sums[1], **named)
    if (norm is None) != (raw is None) or (sums[0] is None) != (sums[1] is None):
        raise ValueError("conv2d_fused: expected out_raw with a norm, and both sums or neither")
    if norm is None or raw is None:
        return None
    return BatchNormGradient(raw, norm, act, None if sums[0] is None else Sums(*sums))


def conv2d_fused_bwd_input(
    dy: Tensor, weight: Tensor, h: int, w: int, out_raw: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator; args are the schema's from out_mean on."""
    gradient, (add, in_raw) = _gradient(dy, out_raw, args[:8]), args[8:10]
    norm, named = _norm("in", *args[10:15])
    act, *geometry = args[15:]
    _protect(dy=dy, weight=weight, add=add, in_raw=in_raw, **named)
    if (norm is None) != (in_raw is None):
        raise ValueError("conv2d_fused: expected in_raw with a norm, got one of them")
    activated = None if norm is None else Activated(in_raw, norm, act)
    dx, sums = conv2d_bwd_input(
        dy, _dense(weight), (h, w), *_geometry(*geometry), gradient, add, activated
    )
    return dx, *(sums or (_empty(dy), _empty(dy)))


def conv2d_fused_bwd_weight(
    dy: Tensor, x: Tensor, kernel_h: int, kernel_w: int, out_raw: Tensor | None, *args: Any
) -> Tensor:
    """Run the operator; args are the schema's from out_mean on."""
    gradient = _gradient(dy, out_raw, args[:8])
    norm, named = _norm("in", *args[8:13])
    act, *geometry = args[13:]
    _protect(dy=dy, x=x, **named)
    prologue = None if norm is None else Prologue(norm, act)
    window = kernel_h, kernel_w
    return conv2d_bwd_weight(dy, x, window, *_geometry(*geometry), gradient, prologue)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)
