"""upsample: the operators, what they return, and their autograd.

    y[o, p] = sum over i, j of rows[o, i] * columns[p, j] * x[i, j]      of each image and channel

rows [h_out, h_in] and columns [w_out, w_in] hold one or two shares a line, which add up to 1:
csrc/common/source_index.h. x: [n, c, h_in, w_in]; y: [n, c, h_out, w_out], and behind the channels
of skip [n, c_skip, h_out, w_out]: [n, c_skip + c, h_out, w_out].

    dx[i, j] = sum over o, p of rows[o, i] * columns[p, j] * dy[o, p]
    dskip    = dy's first c_skip channels: a view of it

Data movement in passes: forward reads x and skip and writes y; backward reads dy (those channels
of it that are y's own, in place) and writes dx. Nothing is kept for backward but sizes. dx is
gathered, with neither atomics nor an order that depends on threads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops._library import declare, distinct, positional
from fastcnn.ops.checks import check_image, memory_format_of

OP = "interpolate"

# csrc/common/source_index.h holds the same table: by mode and align_corners.
SAMPLING_NUMBER = {
    ("nearest", False): 0,
    ("nearest-exact", False): 1,
    ("bilinear", False): 2,
    ("bilinear", True): 3,
}
MODES = ("nearest", "nearest-exact", "bilinear")

Pair = tuple[int, int]
Scales = tuple[float | None, float | None]


def _new_image(like: Tensor, sizes: Sequence[Any], channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=format)


def _fwd_fake(x: Tensor, skip: Tensor | None, h: int, w: int, *args: Any) -> Tensor:
    c = x.shape[1] if skip is None else skip.shape[1] + x.shape[1]
    return _new_image(x, (x.shape[0], c, h, w), args[-1])


def _bwd_fake(dy: Tensor, h: int, w: int, *args: Any) -> Tensor:
    return _new_image(dy, (dy.shape[0], dy.shape[1], h, w), args[-1])


declare(
    "upsample_fwd(Tensor x, Tensor? skip, SymInt h, SymInt w, float? scale_h, float? scale_w, "
    "int sampling, bool channels_last) -> Tensor",
    _fwd_fake,
)
declare(
    "upsample_bwd(Tensor dy, SymInt h, SymInt w, float? scale_h, float? scale_w, int sampling, "
    "bool channels_last) -> Tensor",
    _bwd_fake,
)

_fwd = torch.ops.fastcnn.upsample_fwd.default
_bwd = torch.ops.fastcnn.upsample_bwd.default


class UpsampleFunction(torch.autograd.Function):
    """y of x, or skip's channels and then y's. Backward of x and of skip."""

    @staticmethod
    @positional
    def forward(
        x: Tensor,
        skip: Tensor | None,
        h: int,
        w: int,
        scale_h: float | None,
        scale_w: float | None,
        sampling: int,
        channels_last: bool,
    ) -> Tensor:
        return _fwd(x, skip, h, w, scale_h, scale_w, sampling, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, skip, _, _, *ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.size = x.shape[2], x.shape[3]
        ctx.c = x.shape[1]
        ctx.c_skip = 0 if skip is None else skip.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = dskip = None
        if dy is not None and ctx.needs_input_grad[0]:
            own = dy.narrow(1, ctx.c_skip, ctx.c) if ctx.c_skip else dy
            channels_last = ctx.how[-1]
            dx = _bwd(_readable(own, channels_last), *ctx.size, *ctx.how)
        if dy is not None and ctx.needs_input_grad[1]:
            dskip = dy.narrow(1, 0, ctx.c_skip)
        return dx, dskip, None, None, None, None, None, None


def _readable(dy: Tensor, channels_last: bool) -> Tensor:
    """Return dy if it is channels of a dense tensor of that layout, else a dense copy."""
    _, c, h, w = dy.shape
    image, channel, row, pixel = dy.stride()
    if channels_last:
        dense = channel == 1 and pixel >= c and row == w * pixel and image >= h * row
    else:
        dense = pixel == 1 and row == w and channel == h * w and image >= c * channel
    if dense:
        return dy
    return dy.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the output for x is channels_last.

    A tensor that is dense in both layouts counts as what its strides say: 1x1 images that were
    pooled from channels_last ones are upsampled to channels_last ones, as in PyTorch.
    """
    if memory_format_of(x) is torch.channels_last:
        return True
    one_pixel = x.shape[2] == 1 and x.shape[3] == 1
    return one_pixel and x.shape[1] > 1 and x.stride(3) == x.shape[1]


def output_size(
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    recompute_scale_factor: bool | None,
) -> tuple[Pair, Scales]:
    """Return h and w of the output, and the scales that coordinates are computed with, if given."""
    if (size is None) == (scale_factor is None):
        got = "neither" if size is None else "both"
        raise ValueError(f"{OP}: size, scale_factor: expected exactly one of the two, got {got}")
    if scale_factor is None:
        h, w = _pair("size", size, "an integer", (int, torch.SymInt))
        if recompute_scale_factor:
            raise ValueError(
                f"{OP}: recompute_scale_factor: expected a scale_factor to compute the size with, "
                f"got size={size!r}"
            )
        scales: Scales = (None, None)
    else:
        factors = _pair("scale_factor", scale_factor, "a number", (int, float))
        h, w = (
            int(pixels * factor) if factor > 0 and math.isfinite(factor) else 0
            for pixels, factor in zip(input.shape[2:], factors, strict=True)
        )
        scales = (None, None) if recompute_scale_factor else (float(factors[0]), float(factors[1]))
    if h < 1 or w < 1:
        asked = f"size={size!r}" if scale_factor is None else f"scale_factor={scale_factor!r}"
        raise ValueError(f"{OP}: {asked}: expected an output of at least 1x1 pixels, got {h}x{w}")
    return (h, w), scales


def _pair(name: str, value: Any, kind: str, types: tuple[Any, ...]) -> tuple[Any, Any]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    good = [isinstance(v, types) and not isinstance(v, bool) for v in pair]
    if not all(good):
        raise TypeError(f"{OP}: {name}: expected {kind} or a pair of them, got {value!r}")
    if len(pair) != 2:
        raise ValueError(f"{OP}: {name}: expected {kind} or a pair of them, got {value!r}")
    return pair


def sampling_number(op: str, mode: str, align_corners: bool | None) -> int:
    """Return the schema's number of mode and align_corners, or raise ValueError."""
    if mode not in MODES:
        raise ValueError(f"{op}: mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode != "bilinear" and align_corners is not None:
        raise ValueError(
            f"{op}: align_corners: expected None beside mode={mode!r}, since only bilinear has "
            f"it, got {align_corners!r}"
        )
    return SAMPLING_NUMBER[mode, bool(align_corners)]


def _check_skip(x: Tensor, skip: Tensor, h: int, w: int) -> None:
    check_image(OP, "concat", skip)
    if (skip.shape[0], *skip.shape[2:]) != (x.shape[0], h, w):
        expected = f"[{x.shape[0]}, any, {h}, {w}]"
        raise ValueError(f"{OP}: concat: expected sizes {expected}, got {list(skip.shape)}")
    if skip.dtype != x.dtype:
        raise TypeError(f"{OP}: concat: expected {x.dtype} as the input, got {skip.dtype}")
    if skip.device != x.device:
        raise ValueError(f"{OP}: concat: expected device {x.device}, got {skip.device}")


def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
    concat: Tensor | None,
) -> Tensor:
    """Check and apply: see fastcnn.functional.interpolate."""
    check_image(OP, "input", input)
    sampling = sampling_number(OP, mode, align_corners)
    if antialias:
        raise ValueError(f"{OP}: antialias: expected False, which is all there is, got {antialias!r}")
    if 0 in input.shape[2:]:
        raise ValueError(
            f"{OP}: input: expected images of at least 1 pixel, got sizes {list(input.shape)}"
        )
    (h, w), scales = output_size(input, size, scale_factor, recompute_scale_factor)
    channels_last = is_channels_last(input)
    if concat is not None:
        _check_skip(input, concat, h, w)
        layouts = [torch.contiguous_format, torch.channels_last]
        # Of two tensors, one of which is dense in both layouts, the other one decides.
        fits = [
            format
            for format in layouts
            if all(t.is_contiguous(memory_format=format) for t in (input, concat))
        ]
        if not fits:
            expected = layouts[channels_last]
            raise ValueError(
                f"{OP}: concat: expected the input's memory format {expected}, got strides "
                f"{list(concat.stride())}; call concat.contiguous(memory_format={expected}) first"
            )
        if len(fits) == 1:
            channels_last = fits[0] is torch.channels_last
    x, skip = distinct(input, concat)
    return UpsampleFunction.apply(x, skip, h, w, *scales, sampling, channels_last)
