"""upsample: the operators, what they return, and their autograd.

    y[o, p] = sum over i, j of rows[o, i] * columns[p, j] * x[i, j]      of each image and channel

rows [h_out, h_in] and columns [w_out, w_in] hold one or two shares a line, which add up to 1:
csrc/common/resample.h. x: [n, c, h_in, w_in]; y: [n, c, h_out, w_out], and behind the channels
of skip [n, c_skip, h_out, w_out], or before them (skip_last): [n, c_skip + c, h_out, w_out].

    dx[i, j] = sum over o, p of rows[o, i] * columns[p, j] * dy[o, p]
    dskip    = dy's c_skip channels that were skip's: a view of it

Data movement in passes: forward reads x and skip and writes y; backward reads dy (those channels
of it that are y's own, in place) and writes dx. Nothing is saved for backward but sizes. dx is
gathered, with neither atomics nor an order that depends on threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_image, memory_format_of
from fastcnn.common.dtypes import new_image
from fastcnn.common.library import apply, declare, distinct, once_differentiable, positional
from fastcnn.ops.upsample.arguments import OP, output_size, sampling_number


def _fwd_fake(
    x: Tensor,
    skip: Tensor | None,
    h: int,
    w: int,
    scale_h: float | None,
    scale_w: float | None,
    sampling: int,
    channels_last: bool,
    skip_last: bool,
) -> Tensor:
    c = x.shape[1] if skip is None else skip.shape[1] + x.shape[1]
    return new_image(x, (x.shape[0], c, h, w), channels_last)


def _bwd_fake(dy: Tensor, h: int, w: int, *args: Any) -> Tensor:
    return new_image(dy, (dy.shape[0], dy.shape[1], h, w), args[-1])


declare(
    "upsample_fwd(Tensor x, Tensor? skip, SymInt h, SymInt w, float? scale_h, float? scale_w, "
    "int sampling, bool channels_last, bool skip_last) -> Tensor",
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
    """y of x, or skip's channels and then y's, or then skip's. Backward of x and of skip."""

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
        skip_last: bool,
    ) -> Tensor:
        return _fwd(x, skip, h, w, scale_h, scale_w, sampling, channels_last, skip_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, skip, _, _, *ctx.how, skip_last = inputs
        ctx.set_materialize_grads(False)
        ctx.size = x.shape[2], x.shape[3]
        ctx.c = x.shape[1]
        ctx.c_skip = 0 if skip is None else skip.shape[1]
        ctx.x_at, ctx.skip_at = (0, ctx.c) if skip_last else (ctx.c_skip, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = dskip = None
        if dy is not None and ctx.needs_input_grad[0]:
            own = dy.narrow(1, ctx.x_at, ctx.c) if ctx.c_skip else dy
            channels_last = ctx.how[-1]
            dx = _bwd(_readable(own, channels_last), *ctx.size, *ctx.how)
        if dy is not None and ctx.needs_input_grad[1]:
            dskip = dy.narrow(1, ctx.skip_at, ctx.c_skip)
        return dx, dskip, None, None, None, None, None, None, None


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
    concat_last: bool,
) -> Tensor:
    """Check and apply: see fastcnn.functional.interpolate."""
    check_image(OP, "input", input)
    sampling = sampling_number(OP, mode, align_corners)
    if not isinstance(concat_last, bool):
        raise TypeError(f"{OP}: concat_last: expected a bool, got {type(concat_last).__name__}")
    if antialias:
        raise ValueError(
            f"{OP}: antialias: expected False, which is all there is, got {antialias!r}"
        )
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
    return apply(UpsampleFunction, x, skip, h, w, *scales, sampling, channels_last, concat_last)
