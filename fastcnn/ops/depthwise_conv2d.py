"""depthwise_conv2d: the operators, what they return, and their autograd.

    z[n, c, i, j] = bias[c] + sum over a, b of
        weight[c, 0, a, b] * x[n, c, i * stride_h + a * dilation_h - padding_h, likewise j]
    y = act(z)

x: [n, c, h, w]; weight: [c, 1, kh, kw]; bias: [c]; y: [n, c, h_out, w_out], channels_last where
x or the weight is, as PyTorch's. Sums are float32 (float64 for float64), in a fixed order: that of
the kernel's taps, and for dweight that of dy's rows within splits that the shape alone decides,
then of the splits.

Data movement: forward, dx and dweight each read their operands and write their result once: 2
passes over the image with stride 1, and kh * kw multiply-adds a value of y. dbias comes with
dweight. Saved for backward: x, weight and bias. z is not saved: backward of an activation computes
it once more, and dy * act'(z) in the same pass.

Depthwise means one filter a channel: groups = c_in = c_out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER, act_number
from fastcnn.common.autocast import autocast_dtype, cast, cast_dtype
from fastcnn.common.checks import (
    FLOATS,
    HALVES,
    as_convolved,
    check_channels,
    check_image,
    check_parameter_type,
    in_format_of,
    memory_format_of,
)
from fastcnn.common.conv_geometry import Pair, output_size, pair, refuse_window
from fastcnn.common.dtypes import acc_type, as_acc, new_channels, new_image
from fastcnn.common.library import apply, declare, distinct, once_differentiable, positional

OP = "depthwise_conv2d"
_LEAST_CHANNELS = 16  # lanes of an AVX-512 vector

Window = tuple[Pair, Pair, Pair]  # stride, padding, dilation


def _is_channels_last(x: Tensor) -> bool:
    return memory_format_of(x) is torch.channels_last


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: int,
) -> Tensor:
    sizes = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return new_image(x, (*x.shape[:2], *sizes), _is_channels_last(x))


def _bwd_act_fake(dy: Tensor, *args: Any) -> Tensor:
    return _fwd_fake(*args)


def _bwd_data_fake(dy: Tensor, weight: Tensor, h: int, w: int, *rest: Any) -> Tensor:
    return new_image(dy, (*dy.shape[:2], h, w), channels_last=rest[-1])


def _bwd_weight_fake(
    dy: Tensor, x: Tensor, kernel_h: int, kernel_w: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[1], 1, kernel_h, kernel_w), dtype=acc_type(x)), new_channels(x)


_WINDOW = "int[] stride, int[] padding, int[] dilation"
declare(
    f"depthwise_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, {_WINDOW}, int act) -> Tensor",
    _fwd_fake,
)
declare(
    f"depthwise_conv2d_bwd_act(Tensor dy, Tensor x, Tensor weight, Tensor? bias, {_WINDOW}, "
    "int act) -> Tensor",
    _bwd_act_fake,
)
declare(
    f"depthwise_conv2d_bwd_data(Tensor dy, Tensor weight, SymInt h, SymInt w, {_WINDOW}, "
    "bool channels_last) -> Tensor",
    _bwd_data_fake,
)
declare(
    f"depthwise_conv2d_bwd_weight(Tensor dy, Tensor x, SymInt kernel_h, SymInt kernel_w, "
    f"{_WINDOW}) -> (Tensor dweight, Tensor dbias)",
    _bwd_weight_fake,
)

_fwd = torch.ops.fastcnn.depthwise_conv2d_fwd.default
_bwd_act = torch.ops.fastcnn.depthwise_conv2d_bwd_act.default
_bwd_data = torch.ops.fastcnn.depthwise_conv2d_bwd_data.default
_bwd_weight = torch.ops.fastcnn.depthwise_conv2d_bwd_weight.default


def _weight_as_acc(x: Tensor, weight: Tensor) -> Tensor:
    """Return the weight as kernels take it: dense, in the accumulate type."""
    return weight.to(acc_type(x)).contiguous(memory_format=torch.contiguous_format)


def is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether a convolution has a filter a channel, and these kernels take its image."""
    if groups == 1 or x.device.type != "cpu" or x.dtype not in FLOATS:
        return False
    one_each = groups == weight.shape[0] == x.shape[1] and weight.shape[1] == 1
    return one_each and memory_format_of(x) is not None


def outruns_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the CPU's kernels are known to be faster than PyTorch's, without an activation.

    With backward they are, but for fewer channels than a vector has: dweight of 3x3 takes PyTorch
    1.0 to 7 times as long, of 5x5 and more up to 80. Forward alone in channels_last 3x3 to 5x5 in
    float32 has 0.8 to 1.0 of oneDNN's speed, kernels that have no loops of their own (below 3, and
    4) as little; 3x3 and 5x5 in bfloat16 1.1 to 1.6, from 7x7 on 0.95 to 5 (docs/performance.md).
    """
    if not _is_channels_last(x):
        return True
    if x.shape[1] < _LEAST_CHANNELS:
        return False
    needed = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    kernel_w = weight.shape[3]
    half = cast_dtype(x, autocast_dtype(x)) in HALVES
    return needed or kernel_w >= 7 or (half and kernel_w in (3, 5))


def depthwise_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, act: int = ACT_NUMBER["none"]
) -> Tensor:
    """Return act(conv2d(x, weight) + bias)."""
    return depthwise_calling(x, weight, bias, window, act)(x)


def depthwise_calling(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, act: int
) -> Callable[[Tensor], Tensor]:
    """Return what computes it of images of x's dtype: the weight is converted once."""
    arguments = _weight_as_acc(x, weight), as_acc(x, bias), *window, act
    return lambda x: _fwd(as_convolved(x, weight), *arguments)


def depthwise_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, window: Window, want: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, with None for what is not wanted.

    dy in x's layout; dbias in the accumulate type.
    """
    dx = dweight = dbias = None
    if want[0]:
        in_acc = _weight_as_acc(x, weight)
        dx = _bwd_data(dy, in_acc, *x.shape[2:], *window, _is_channels_last(x))
    if want[1] or want[2]:  # the bias's bits are the same alone, which a sum of PyTorch's has not
        dweight, dbias = _bwd_weight(dy, x, *weight.shape[2:], *window)
        dweight = dweight.to(weight.dtype)
    return dx, dweight if want[1] else None, dbias if want[2] else None


class DepthwiseConv2dFunction(torch.autograd.Function):
    """y = act(conv2d(x, weight) + bias)."""

    @staticmethod
    @positional
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, act: int) -> Tensor:
        return depthwise_fwd(x, weight, bias, window, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, ctx.window, ctx.act = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        x, weight, bias = ctx.saved_tensors
        dy = in_format_of(dy, x)
        if ctx.act != ACT_NUMBER["none"]:
            dy = _bwd_act(dy, x, _weight_as_acc(x, weight), as_acc(x, bias), *ctx.window, ctx.act)
        dx, dweight, dbias = depthwise_bwd(dy, x, weight, ctx.window, ctx.needs_input_grad[:3])
        dbias = dbias if dbias is None or bias is None else dbias.to(bias.dtype)
        return dx, dweight, dbias, None, None


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{OP}: weight: expected a Tensor, got {type(weight).__name__}")
    c = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != c or weight.shape[1] != 1:
        raise ValueError(
            f"{OP}: weight: expected sizes [{c}, 1, kernel_h, kernel_w], one filter for each "
            f"channel of the input, got {list(weight.shape)}; torch.nn.functional.conv2d has other "
            f"convolutions"
        )
    check_parameter_type(OP, "weight", weight, x)


def _check_window(x: Tensor, weight: Tensor, window: Window) -> None:
    stride, padding, dilation = window
    sizes, kernel = x.shape[2:], weight.shape[2:]
    sound = min(stride) >= 1 and min(padding) >= 0 and min(dilation) >= 1
    if not sound or min(output_size(sizes, kernel, stride, padding, dilation)) < 1:
        refuse_window(OP, list(sizes), list(kernel), stride, padding, dilation)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    act: str,
) -> Tensor:
    """Check, cast, apply: see fastcnn.functional.depthwise_conv2d."""
    dtype = autocast_dtype(input)
    input, weight, bias = (cast(t, dtype) for t in (input, weight, bias))
    check_image(OP, "input", input)
    _check_weight(weight, input)
    if bias is not None:
        check_channels(OP, "bias", bias, input.shape[1], input)
    window = (
        pair(OP, "stride", stride),
        pair(OP, "padding", padding),
        pair(OP, "dilation", dilation),
    )
    _check_window(input, weight, window)
    number = act_number(OP, act)
    y: Tensor = apply(DepthwiseConv2dFunction, *distinct(input, weight, bias), window, number)
    return y
