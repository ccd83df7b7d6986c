"""A convolution with an epilogue: the sum, the activation, one kernel for inference.

oneDNN's, or where those are faster depthwise_conv2d.py's and winograd.py's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER, eager_activation
from fastcnn.common.checks import check_format, check_like, in_format_of, memory_format_of
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d.aten import convolve
from fastcnn.ops.conv2d.float32_products import LEAST, in_float32
from fastcnn.ops.conv2d.onednn_workarounds import onednn_crashes, with_border
from fastcnn.ops.conv2d.winograd import by_winograd, conv2d_winograd, transformed
from fastcnn.ops.depthwise_conv2d import depthwise_fwd, is_depthwise

_reorder = torch.ops.mkldnn._reorder_convolution_weight
_convolution_pointwise = torch.ops.mkldnn._convolution_pointwise
_convolution_pointwise_ = torch.ops.mkldnn._convolution_pointwise_


def _onednn_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, *([torch.bfloat16] if bf16 else []), *LEAST)


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


def folds(x: Tensor) -> bool:
    """Whether oneDNN runs a step in inference as one convolution: its types on this processor."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    return x.dtype in _ONEDNN_TYPES


def weight_type(x: Tensor, weight: Tensor, g: ConvGeometry) -> torch.dtype:
    """Return the type in which convolve_onednn() reads a weight and a bias, and need not cast."""
    if is_depthwise(x, weight, g.groups):
        return x.dtype
    wide = by_winograd(x, weight, g) or in_float32(x, weight, g)
    return torch.float32 if wide else x.dtype


# x, the activation, the residual, whether it is of the caller's making, and may be written into
Convolution = Callable[[Tensor, str, Tensor | None, bool, bool], Tensor]


def prepared(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Convolution:
    """Return convolve_onednn() of images as x, its weight laid out as the kernel reads it."""
    if by_winograd(x, weight, g):
        return of_transformed(transformed(weight), bias, g)
    crashes = onednn_crashes(x, weight, g.stride, g.padding, g.dilation)
    packs = memory_format_of(x) is torch.channels_last and not crashes
    if packs and not is_depthwise(x, weight, g.groups):  # whose kernels know no packed weight
        weight = _reorder(weight, g.padding, g.stride, g.dilation, g.groups, list(x.shape))
    return lambda x, act, residual, own, into: convolve_onednn(
        x, weight, bias, g, act, residual, own, into
    )


def of_transformed(u: Tensor, bias: Tensor | None, g: ConvGeometry) -> Convolution:
    """Return it of a weight that winograd.py has transformed."""
    return lambda x, act, residual, own, _: _by_winograd(x, u, bias, g, act, residual, own)


def _by_winograd(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    act: str,
    residual: Tensor | None,
    own: bool,
) -> Tensor:
    if residual is not None and own:
        residual = in_format_of(residual, x)
    elif residual is not None:
        check_format("conv_bn_act", "residual", residual, memory_format_of(x))
    return conv2d_winograd(x, u, bias, g.padding, ACT_NUMBER[act], residual)


def convolve_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    act: str,
    residual: Tensor | None,
    own: bool,
    into: bool = False,
) -> Tensor:
    """Return act(conv2d(x) + residual).

    into: write it into the residual, where the kernel that adds can.
    """
    depthwise = is_depthwise(x, weight, g.groups)
    if depthwise and residual is None:
        return depthwise_fwd(x, weight, bias, g[:3], ACT_NUMBER[act])
    if by_winograd(x, weight, g):
        return _by_winograd(x, transformed(weight), bias, g, act, residual, own)
    if not depthwise and in_float32(x, weight, g):
        wide = [None if t is None else t.float() for t in (bias, residual)]
        return convolve_onednn(x.float(), weight.float(), wide[0], g, act, wide[1], own).to(x.dtype)
    x, g = with_border(x, weight, g)
    arguments = (weight, bias, g.padding, g.stride, g.dilation, g.groups)
    if depthwise or torch.compiler.is_compiling():
        # A compiler fuses plain operations by itself, and knows only half of what oneDNN's returns.
        y = convolve(x, weight, bias, g)
        if residual is not None:
            if not own:
                check_like("conv_bn_act", "residual", residual, y)
            y += residual
        y = eager_activation(y, act, inplace=True)
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
        if relu is None:  # after a residual oneDNN's epilogue has none or ReLU
            y = eager_activation(y, act, inplace=True)
    return y
