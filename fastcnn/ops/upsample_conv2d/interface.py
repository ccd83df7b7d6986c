"""upsample_conv2d: a 3x3 convolution of an upsampled image, optionally beside a skip's channels.

    y = conv2d(cat([concat, up(x)], 1), weight, bias, padding=1)

or with x's channels before the skip's (concat_last). weight [c_out, c_skip + c, 3, 3] has the parts
ws and wx. On the CPU in channels_last x's share is made on the small image (taps.py), with
wz [9 c_out, c, 1, 1], which is wx tap by tap:

    z = conv2d(x, wz)            y = taps(z) + conv2d(concat, ws, bias)
    dz = taps^T(dy)              dx, dwz of the 1x1 convolution; dskip, dws, dbias of the other one

A U-Net's decoder (256 channels upsampled by 2 beside 128) needs half of the products so, and no
concatenated image, up(x) or gradient of them is written. z is rounded to x's dtype, where the plain
way rounds up(x). Saved for backward: x, concat and weight. Elsewhere: interpolate, then conv2d.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.common.checks import check_image, memory_format_of
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.library import apply, once_differentiable, positional
from fastcnn.common.overrides import has_torch_function_variadic, overridable, overridden
from fastcnn.ops.conv2d.aten import convolve, convolve_bwd
from fastcnn.ops.conv2d.onednn import convolve_onednn, folds
from fastcnn.ops.upsample.arguments import output_size, sampling_number
from fastcnn.ops.upsample.interface import interpolate
from fastcnn.ops.upsample_conv2d.taps import TAPS, upsample_taps_bwd, upsample_taps_fwd

OP = "upsample_conv2d"
Resize = tuple[int, int, float | None, float | None, int]  # h, w, their scales, the sampling

AROUND, POINTWISE = ConvGeometry(padding=(1, 1)), ConvGeometry()
# Channels of x from which on the spared products outweigh writing and reading z.
_LEAST_CHANNELS = 32


def by_taps(x: Tensor, concat: Tensor | None, weight: Tensor, resize: Resize) -> bool:
    """Whether x's share is made on the small image: where it can be, and spares products."""
    images = (x,) if concat is None else (x, concat)
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    if not all(memory_format_of(t) is torch.channels_last for t in images):
        return False
    larger = resize[0] * resize[1] >= 2 * x.shape[2] * x.shape[3]
    return larger and x.shape[1] >= _LEAST_CHANNELS and tuple(weight.shape[2:]) == (3, 3)


def split(weight: Tensor, c: int, concat_last: bool) -> tuple[Tensor | None, Tensor]:
    """Return ws, None where there is no skip, and wz for an x of c channels."""
    c_out, c_skip = weight.shape[0], weight.shape[1] - c
    wx = weight.narrow(1, 0 if concat_last else c_skip, c)
    wz = wx.permute(2, 3, 0, 1).reshape(TAPS * c_out, c, 1, 1)
    if c_skip == 0:
        return None, wz
    ws = weight.narrow(1, c if concat_last else 0, c_skip)
    return ws.contiguous(memory_format=torch.channels_last), wz


def concatenated(dws: Tensor | None, dwz: Tensor, concat_last: bool) -> Tensor:
    """Return the gradient of a weight from those of its parts."""
    dwx = dwz.reshape(3, 3, -1, dwz.shape[1]).permute(2, 3, 0, 1)
    if dws is None:
        return dwx
    return torch.cat([dwx, dws] if concat_last else [dws, dwx], 1)


class UpsampleConv2dFunction(torch.autograd.Function):
    """y by taps. Backward of all four tensors."""

    @staticmethod
    @positional
    def forward(
        x: Tensor,
        concat: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        resize: Resize,
        concat_last: bool,
    ) -> Tensor:
        ws, wz = split(weight, x.shape[1], concat_last)
        y: Tensor = upsample_taps_fwd(convolve(x, wz, None, POINTWISE), *resize)
        if concat is None or ws is None:
            return y if bias is None else y.add_(bias[:, None, None])
        if folds(x):  # one convolution that adds
            return convolve_onednn(concat, ws, bias, AROUND, "none", y, True, into=True)
        return y.add_(convolve(concat, ws, bias, AROUND))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, concat, weight, bias, ctx.resize, ctx.concat_last = inputs
        ctx.save_for_backward(x, concat, weight, bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None, None
        x, concat, weight, bias = ctx.saved_tensors
        wants_dx, wants_dskip, wants_dweight, wants_dbias = ctx.needs_input_grad[:4]
        dy = dy.contiguous(memory_format=torch.channels_last)
        ws, wz = split(weight, x.shape[1], ctx.concat_last)
        dskip = dws = dweight = dbias = dx = None
        if concat is not None and ws is not None:
            want = (wants_dskip, wants_dweight, wants_dbias)
            dskip, dws, dbias = convolve_bwd(dy, concat, ws, bias, AROUND, want)
        elif wants_dbias:
            dbias = dy.sum((0, 2, 3))
        if wants_dx or wants_dweight:
            dz = upsample_taps_bwd(dy, *x.shape[2:], *ctx.resize[2:])
            dx, dwz, _ = convolve_bwd(dz, x, wz, None, POINTWISE, (wants_dx, wants_dweight, False))
            if dwz is not None:
                dweight = concatenated(dws, dwz, ctx.concat_last)
        return dx, dskip, dweight, dbias, None, None


@overridable
def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    concat: Tensor | None = None,
    concat_last: bool = False,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """Return conv2d(cat([concat, interpolate(x, ...)], 1), weight, bias, padding=1).

    The arguments are those of :func:`fastcnn.functional.interpolate` and torch's conv2d; autocast
    casts as for a convolution.

    Raises:
        TypeError, ValueError: what those refuse.
    """
    if has_torch_function_variadic(x, weight, bias, concat):
        return overridden(locals())
    dtype = autocast_dtype(x)
    x, concat, weight, bias = (cast(t, dtype) for t in (x, concat, weight, bias))
    how = (size, scale_factor, mode, align_corners, recompute_scale_factor)
    resize = resize_of(x, *how)
    if not by_taps(x, concat, weight, resize):
        return F.conv2d(interpolate(x, *how, False, concat, concat_last), weight, bias, padding=1)
    check_upsample_conv2d(x, concat, weight, bias, resize)
    y: Tensor = apply(UpsampleConv2dFunction, x, concat, weight, bias, resize, concat_last)
    return y


def resize_of(
    x: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
) -> Resize:
    """Check interpolate's arguments."""
    check_image(OP, "input", x)
    sampling = sampling_number(OP, mode, align_corners)
    (h, w), scales = output_size(x, size, scale_factor, recompute_scale_factor)
    return h, w, *scales, sampling


def check_upsample_conv2d(
    x: Tensor, concat: Tensor | None, weight: Tensor, bias: Tensor | None, resize: Resize
) -> None:
    """Check tensors that by_taps takes against each other."""
    named = {"concat": concat, "weight": weight, "bias": bias}
    for name, t in named.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{OP}: {name}: expected {x.dtype} as the input, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{OP}: {name}: expected device {x.device}, got {t.device}")
    c = x.shape[1]
    if concat is not None:
        c += concat.shape[1]
        if (concat.shape[0], *concat.shape[2:]) != (x.shape[0], *resize[:2]):
            expected = f"[{x.shape[0]}, any, {resize[0]}, {resize[1]}]"
            raise ValueError(f"{OP}: concat: expected sizes {expected}, got {list(concat.shape)}")
    if weight.shape[1] != c:
        raise ValueError(
            f"{OP}: input: expected {weight.shape[1]} channels, concat's included, for weight "
            f"{list(weight.shape)}, got {c}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias: expected {weight.shape[0]} numbers, got {list(bias.shape)}")
