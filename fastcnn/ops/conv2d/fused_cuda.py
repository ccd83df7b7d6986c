"""What the operators of fused.py run: their flat arguments, checked, as records, launched.

The launches check sizes, types and layouts; here is what else could let a kernel read elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import check_eps, check_storage
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.conv_operands import Gradient, Input, Output, Sums
from fastcnn.common.library import by_name
from fastcnn.triton.conv2d_bwd import conv2d_bwd_input, conv2d_bwd_weight
from fastcnn.triton.conv2d_fwd import conv2d
from fastcnn.triton.support import interpreted

Given = dict[str, Any]  # an operator's arguments by name


def conv2d_fused(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator."""
    given = _protected("conv2d_fused", args)
    x, residual, bias = given["x"], given["residual"], given["bias"]
    a = Input(x, _norm(given, "in"), given["in_act"])
    out = Output(_norm(given, "out"), residual, given["out_act"], given["statistics"], bias)
    y, found = conv2d(a, _dense(given["weight"]), _geometry(given), out)
    return y, *(found or (_empty(x), _empty(x)))


def conv2d_fused_bwd_input(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator."""
    given = _protected("conv2d_fused_bwd_input", args)
    dy, norm, raw = given["dy"], _norm(given, "in"), given["in_raw"]
    if (norm is None) != (raw is None):
        raise ValueError("conv2d_fused: expected in_raw with a norm, got one of them")
    before = None if norm is None else Input(raw, norm, given["in_act"])
    size = given["h"], given["w"]
    weight, geometry = _dense(given["weight"]), _geometry(given)
    dx, sums = conv2d_bwd_input(_gradient(given), weight, size, geometry, given["add"], before)
    return dx, *(sums or (_empty(dy), _empty(dy)))


def conv2d_fused_bwd_weight(*args: Any) -> Tensor:
    """Run the operator."""
    given = _protected("conv2d_fused_bwd_weight", args)
    a = Input(given["x"], _norm(given, "in"), given["in_act"])
    window = given["kernel_h"], given["kernel_w"]
    return conv2d_bwd_weight(_gradient(given), a, window, _geometry(given))


def _protected(name: str, args: tuple[Any, ...]) -> Given:
    """Check what would let a kernel read elsewhere: one device, dense memory that is there."""
    given = by_name(getattr(torch.ops.fastcnn, name).default, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    check_storage("conv2d_fused", **tensors)
    first, *others = tensors.items()
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
    return given


def _norm(given: Given, name: str) -> Norm | None:
    """Return a batch norm of an operator's five arguments."""
    keys = ("mean", "var", "weight", "bias")
    # A weight may be expanded, or a slice: small vectors, as everywhere.
    mean, var, weight, bias = (
        None if t is None else t.contiguous() for t in (given[f"{name}_{key}"] for key in keys)
    )
    if mean is not None and var is not None:
        check_eps(f"conv2d_fused: {name}", given[f"{name}_eps"], of_batch=False)
        return Norm(mean, var, weight, bias, given[f"{name}_eps"])
    if any(t is not None for t in (mean, var, weight, bias)):
        raise ValueError(f"conv2d_fused: {name}: expected mean and var, or no batch norm at all")
    return None


def _gradient(given: Given) -> Gradient:
    norm, raw, sums = _norm(given, "out"), given["out_raw"], (given["sum"], given["sum_xhat"])
    if (norm is None) != (raw is None) or (sums[0] is None) != (sums[1] is None):
        raise ValueError("conv2d_fused: expected out_raw with a norm, and both sums or neither")
    if norm is None:
        return Gradient(given["dy"])
    of_batch = None if sums[0] is None else Sums(*sums)
    return Gradient(given["dy"], raw, norm, given["out_act"], of_batch)


def _geometry(given: Given) -> ConvGeometry:
    """Return what the dispatcher has made lists of as pairs again."""
    (a, b), (c, d), (e, f) = given["stride"], given["padding"], given["dilation"]
    return ConvGeometry((a, b), (c, d), (e, f), given["groups"])


def _dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)
