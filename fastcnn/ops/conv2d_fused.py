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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.ops._library import declare
from fastcnn.ops.checks import check_storage
from fastcnn.ops.conv_bn_act_step import Geometry, Pair
from fastcnn.ops.norm import Norm

Sums = tuple[Tensor, Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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


def _output(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]


def _new(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(
        sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _channels(like: Tensor, channels: int) -> Tensor:
    return like.new_empty(channels, dtype=torch.float32)


def _fwd_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics, stride, padding, dilation, _ = args[-5:]
    y = _new(x, x.shape[0], weight.shape[0], *_output(x, weight, stride, padding, dilation))
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


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _norm(
    name: str, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> tuple[Norm | None, dict[str, Tensor | None]]:
    """Return the batch norm of an operator's five arguments, and its tensors by name."""
    if (mean is None) != (var is None) or (mean is None and rest[:2] != (None, None)):
        raise ValueError(f"conv2d_fused: {name}: expected mean and var, or no batch norm at all")
    norm = None if mean is None or var is None else Norm(mean, var, *rest)
    tensors = dict(zip(Norm._fields, (mean, var, *rest[:2]), strict=False))
    return norm, {f"{name}_{key}": t for key, t in tensors.items()}


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[Pair, Pair, Pair, int]:
    """Return what the dispatcher has made lists of as pairs again."""
    (a, b), (c, d), (e, f) = stride, padding, dilation
    return (a, b), (c, d), (e, f), groups


def _dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _fwd_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from fastcnn.triton.conv2d import Epilogue, Prologue, conv2d

    in_act, residual, out_act, statistics, *geometry = args[5], *args[11:]
    before, named = _norm("in", *args[:5])
    behind, also = _norm("out", *args[6:11])
    _protect(x=x, weight=weight, bias=bias, residual=residual, **named, **also)
    prologue = None if before is None else Prologue(before, in_act)
    epilogue = Epilogue(behind, residual, out_act, statistics, bias)
    y, found = conv2d(x, _dense(weight), *_geometry(*geometry), prologue, epilogue)
    return y, *(found or (_channels(x, 0), _channels(x, 0)))


def _gradient(dy: Tensor, raw: Tensor | None, args: Sequence[Any]) -> Any:
    """Return Triton's BatchNormGradient of an operator's arguments from out_mean to sum_xhat."""
    from fastcnn.triton.conv2d_bwd import BatchNormGradient, Sums

    norm, named = _norm("out", *args[:5])
    act, *sums = args[5:8]
    _protect(dy=dy, out_raw=raw, sum=sums[0], sum_xhat=sums[1], **named)
    if (norm is None) != (raw is None) or (sums[0] is None) != (sums[1] is None):
        raise ValueError("conv2d_fused: expected out_raw with a norm, and both sums or neither")
    if norm is None or raw is None:
        return None
    return BatchNormGradient(raw, norm, act, None if sums[0] is None else Sums(*sums))


def _bwd_input_triton(
    dy: Tensor, weight: Tensor, h: int, w: int, out_raw: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from fastcnn.triton.conv2d_bwd import Activated, conv2d_bwd_input

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
    return dx, *(sums or (_channels(dy, 0), _channels(dy, 0)))


def _bwd_weight_triton(
    dy: Tensor, x: Tensor, kernel_h: int, kernel_w: int, out_raw: Tensor | None, *args: Any
) -> Tensor:
    from fastcnn.triton.conv2d import Prologue
    from fastcnn.triton.conv2d_bwd import conv2d_bwd_weight

    gradient = _gradient(dy, out_raw, args[:8])
    norm, named = _norm("in", *args[8:13])
    act, *geometry = args[13:]
    _protect(dy=dy, x=x, **named)
    prologue = None if norm is None else Prologue(norm, act)
    window = kernel_h, kernel_w
    return conv2d_bwd_weight(dy, x, window, *_geometry(*geometry), gradient, prologue)


for _name, _kernel in (
    ("conv2d_fused", _fwd_triton),
    ("conv2d_fused_bwd_input", _bwd_input_triton),
    ("conv2d_fused_bwd_weight", _bwd_weight_triton),
):
    torch.library.impl(f"fastcnn::{_name}", ("cpu", "cuda"))(_kernel)

_NO_NORM = (None, None, None, None, 0.0)


def conv2d_fused(
    a: Input,
    weight: Tensor,
    g: Geometry,
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
        a.x, weight, bias, *(a.norm or _NO_NORM), a.act, *(norm or _NO_NORM), residual, act,
        statistics, g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def conv2d_fused_bwd_input(
    dy: Tensor | Gradient, weight: Tensor, a: Input, g: Geometry, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of what `a` was made from, and its sums, which are empty for a.norm None.

    add: another gradient of what the convolution read.
    """
    activated = (None if a.norm is None else a.x, *(a.norm or _NO_NORM), a.act)
    dy, behind = _behind(dy)
    return _bwd_input(
        dy, weight, *a.x.shape[2:], *behind, add, *activated,
        g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def conv2d_fused_bwd_weight(dy: Tensor | Gradient, weight: Tensor, a: Input, g: Geometry) -> Tensor:
    """Return the weight's gradient."""
    dy, behind = _behind(dy)
    return _bwd_weight(
        dy, a.x, *weight.shape[2:], *behind, *(a.norm or _NO_NORM), a.act,
        g.stride, g.padding, g.dilation, g.groups,
    )  # fmt: skip


def _behind(dy: Tensor | Gradient) -> tuple[Tensor, tuple[Any, ...]]:
    """Return dy, and the operators' arguments from out_raw to sum_xhat."""
    if isinstance(dy, Gradient):
        return dy.dy, (dy.raw, *dy.norm, dy.act, *(dy.sums or (None, None)))
    return dy, (None, *_NO_NORM, 0, None, None)
