"""The convolutions of a chain: PyTorch's own, forward and backward, and folded for evaluation.

One is fastcnn's: the weight gradient in bfloat16 on CPUs with AVX512-BF16 (conv2d_bwd_weight.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastcnn.ops.checks import check_like, memory_format_of
from fastcnn.ops.conv2d_bwd_weight import conv2d_bwd_weight, has_conv2d_bwd_weight
from fastcnn.ops.conv_bn_act_step import ConvBnActStep, Geometry
from fastcnn.ops.norm import Norm

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_max_pool = torch.ops.aten.max_pool2d_with_indices.default
_convolution_pointwise = torch.ops.mkldnn._convolution_pointwise
_convolution_pointwise_ = torch.ops.mkldnn._convolution_pointwise_
_max_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


def _onednn_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)


_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)

# Asked once: torch.compile cannot trace the questions.
_ONEDNN_TYPES = _onednn_types()

# oneDNN's names of the activations, with their parameters: what the convolution's epilogue applies.
_EPILOGUES: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "sigmoid": ("sigmoid", [], ""),
    "hardswish": ("hardswish", [], ""),
}
# After a residual its epilogue has none or ReLU; the others are a pass of their own.
AFTER_SUM: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu_,
    "relu6": lambda z: F.relu6(z, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "silu": lambda z: F.silu(z, inplace=True),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid_,
    "hardswish": lambda z: F.hardswish(z, inplace=True),
}


def autocast_dtype(x: Any) -> torch.dtype | None:
    """Return what autocast casts x to, or None where it is off."""
    # Autocast does not know the meta device.
    if not isinstance(x, Tensor) or x.device.type == "meta":
        return None
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else None


def cast(t: Any, dtype: torch.dtype | None) -> Any:
    """Cast as autocast does for a convolution: every floating type but float64."""
    if dtype is None or not isinstance(t, Tensor) or t.dtype not in _AUTOCAST_FROM:
        return t
    return t.to(dtype)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """Return conv2d(x, weight, bias)."""
    x, g = with_columns(x, weight, g)
    return _convolution(x, weight, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups)


def convolve_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight, dbias, with None for what is not wanted."""
    dweight: Tensor | None = None
    if want[1] and has_conv2d_bwd_weight(dy, x, g):
        dweight = conv2d_bwd_weight(dy, x, weight, g)
        want = (want[0], False, want[2])
    elif want[1] and onednn_overruns(weight, g.stride):
        # Cloned, since .contiguous() leaves the strides of what is both layouts as they are.
        nchw = [t.clone(memory_format=torch.contiguous_format) for t in (dy, x, weight)]
        dweight = _convolution_backward(
            *nchw, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
            (False, True, False),
        )[1]  # fmt: skip
        want = (want[0], False, want[2])
    if not any(want):
        return None, dweight, None
    dx, by_torch, dbias = _convolution_backward(
        dy, x, weight, None if bias is None else list(bias.shape),
        g.stride, g.padding, g.dilation, False, (0, 0), g.groups, want,
    )  # fmt: skip
    return dx, by_torch if dweight is None else dweight, dbias


def onednn_overruns(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient would write past its scratch memory in channels_last.

    Of 1x1 convolutions with a stride and fewer input channels than a vector has lanes
    (https://github.com/uxlfoundation/oneDNN/issues/6035, open in torch 2.13: bfloat16 on AVX-512
    corrupts the heap). NCHW takes another way there.
    """
    narrow = tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] < 16
    return weight.device.type == "cpu" and narrow and max(stride) > 1


def with_columns(x: Tensor, weight: Tensor, g: Geometry) -> tuple[Tensor, Geometry]:
    """Return x and g, with zeros in place of padding where onednn_crashes()."""
    if not onednn_crashes(x, weight, g.stride, g.padding, g.dilation):
        return x, g
    columns = g.padding[1]
    return F.pad(x, (columns, columns)), g._replace(padding=(g.padding[0], 0))


def onednn_crashes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether every output column reads padding only, and no column of x.

    oneDNN 3.12 has made no kernel then, and calls it for what follows the sum: the bias of a
    convolution with groups, any epilogue.
    """
    w, k, s, p, d = x.shape[3], weight.shape[3], stride[1], padding[1], dilation[1]
    # A wider x has a column under every window that is not left or right of it.
    if x.device.type != "cpu" or w == 0 or w >= max(s, d):
        return False
    first = range(-p, w + p - d * (k - 1), s)  # each window's first column
    return not any(0 <= at + i * d < w for at in first for i in range(k))


def max_pool(x: Tensor, g: Geometry) -> Tensor:
    """Return max_pool2d(x) where the step has one, else x."""
    if g.pool is None:
        return x
    y, _ = _max_pool(x, *g.pool)
    return y


def max_pool_bwd(dy: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """Return dx. The indices, 8 bytes an output, are not kept: the window is searched again."""
    assert g.pool is not None
    _, indices = _max_pool(x, *g.pool)
    return _max_pool_backward(dy, x, *g.pool, (1, 1), False, indices)


def is_inference(x: Tensor, steps: Sequence[ConvBnActStep], residual: Tensor | None) -> bool:
    """Whether all statistics are fixed, and nobody asks for a gradient."""
    if any(step.training for step in steps):
        return False
    grads = torch.is_grad_enabled()
    tensors = [x, residual, *(t for step in steps for t in step if isinstance(t, Tensor))]
    for t in tensors:
        # oneDNN's operators would drop the tangents of forward-mode differentiation in silence.
        if t is not None and ((grads and t.requires_grad) or unpack_dual(t).tangent is not None):
            return False
    return True


def folds(x: Tensor) -> bool:
    """Whether oneDNN runs a step in inference as one convolution: its types on this processor."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    return x.dtype in _ONEDNN_TYPES


def folded(
    weight: Tensor, conv_bias: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a convolution's weight and bias with the batch norm behind it in them, in a dtype.

    weight' = weight * scale and bias' = (conv_bias - mean) * scale + beta per output channel, with
    scale = gamma / sqrt(var + eps), computed in float32 and rounded once.
    """
    scale = torch.rsqrt(norm.var.float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.mean.float()
    if conv_bias is not None:
        bias = bias + conv_bias
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return (weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)


def convolve_folded(
    x: Tensor, step: ConvBnActStep, g: Geometry, residual: Tensor | None, own: bool
) -> Tensor:
    """Return act(batch_norm(conv2d(x)) + residual), the batch norm folded into the weights.

    own: the residual is of the block's making, and may come in the other layout.

    They are folded at every call, as parameters may change; conv2d_folded.py keeps them.
    """
    weight, bias = folded(step.weight, step.conv_bias, norm_of_step(step), x.dtype)
    return convolve_onednn(x, weight, bias, g, step.act, residual, own)


def norm_of_step(step: ConvBnActStep) -> Norm:
    """Return the batch norm of a step with fixed statistics."""
    assert step.running_mean is not None
    assert step.running_var is not None
    return Norm(step.running_mean, step.running_var, step.bn_weight, step.bn_bias, step.eps)


def convolve_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    act: str,
    residual: Tensor | None,
    own: bool,
    into: bool = False,
) -> Tensor:
    """Return act(conv2d(x) + residual), pooled where the step pools.

    into: write it into the residual, where the kernel that adds can.
    """
    x, g = with_columns(x, weight, g)
    arguments = (weight, bias, g.padding, g.stride, g.dilation, g.groups)
    if torch.compiler.is_compiling():
        # It fuses plain operations by itself, and knows only half of what oneDNN's returns.
        y = convolve(x, weight, bias, g)
        if residual is not None:
            if not own:
                check_like("conv_bn_act", "residual", residual, y)
            y += residual
        y = AFTER_SUM[act](y)
    elif residual is None:
        y = _convolution_pointwise.default(x, *arguments, *_EPILOGUES[act])
    else:
        # In NCHW and with groups it adds in a pass of its own, whose ReLU does not know bfloat16.
        one_pass = memory_format_of(x) is torch.channels_last and g.groups == 1
        relu = "relu" if act == "relu" and (one_pass or x.dtype is torch.float32) else None
        if single := residual.shape[2:] == (1, 1):
            # In channels_last torch 2.11 adds images of one pixel in place only.
            residual = residual.clone()
        into = into and one_pass and residual.is_contiguous(memory_format=torch.channels_last)
        if into or single:
            y = _convolution_pointwise_.binary(residual, x, *arguments, "add", 1.0, relu, [], "")
        else:
            y = _convolution_pointwise.binary(x, residual, *arguments, "add", 1.0, relu, [], "")
            if not own:  # oneDNN has copied another layout
                check_like("conv_bn_act", "residual", residual, y)
        if relu is None:
            y = AFTER_SUM[act](y)
    return max_pool(y, g)
