"""A convolution with an epilogue: the sum, the activation, one kernel for inference.

oneDNN's, or where those are faster depthwise_conv2d.py's, pointwise.py's and winograd.py's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER, eager_activation
from fastcnn.common.checks import check_format, check_like, in_format_of, memory_format_of
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.dtypes import acc_type, as_acc
from fastcnn.ops.conv2d.aten import convolve
from fastcnn.ops.conv2d.float32_products import in_float32, is_slow
from fastcnn.ops.conv2d.onednn_workarounds import onednn_crashes, with_border
from fastcnn.ops.conv2d.pointwise import by_panels, panels, pointwise_conv2d
from fastcnn.ops.conv2d.winograd import EACH_CALL, by_winograd, conv2d_winograd, transformed
from fastcnn.ops.depthwise_conv2d import depthwise_calling, is_depthwise

_convolution_pointwise = torch.ops.mkldnn._convolution_pointwise
_convolution_pointwise_ = torch.ops.mkldnn._convolution_pointwise_
_reorder = torch.ops.mkldnn._reorder_convolution_weight


def _onednn_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, *([torch.bfloat16] if bf16 else []))


# Asked once: torch.compile cannot trace the questions.
_ONEDNN_TYPES = _onednn_types()

# oneDNN's names of the activations, with their parameters: what the convolution's epilogue applies.
EPILOGUES: dict[str, tuple[str, list[float], str]] = {
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
    return x.dtype in _ONEDNN_TYPES or (torch.float32 in _ONEDNN_TYPES and is_slow(x.dtype))


def weight_type(x: Tensor, weight: Tensor, g: ConvGeometry) -> torch.dtype:
    """Return the type in which a convolution reads a weight and a bias, and need not cast them."""
    if by_panels(x, weight, g):
        return acc_type(x)
    own = is_depthwise(x, weight, g.groups)
    return torch.float32 if not own and in_float32(x, weight, g) else x.dtype


# PyTorch's own limit for one image, up to which its convolution leaves oneDNN alone.
_FEW_ELEMENTS = 20480


def leaves_onednn(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether a convolution is too small for what a call of oneDNN costs.

    That is 37 us and more, of PyTorch's matrix product 6; up to these sizes it took 0.17 to 0.87 of
    the time, activation included (ten 1x1 convolutions, one thread of a Xeon with AVX-512).
    """
    few = x.shape[0] == 1 and x.numel() <= _FEW_ELEMENTS
    if not few or g != ConvGeometry() or weight.shape[2:] != (1, 1):
        return False
    return weight_type(x, weight, g) is torch.float32


def packed_onednn(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """Return a weight in oneDNN's layout for images like x, as it is where that is no use.

    oneDNN's operator answers a packed one in channels_last, whatever x is in.
    """
    if memory_format_of(x) is not torch.channels_last or leaves_onednn(x, weight, g):
        return weight
    if by_panels(x, weight, g):
        return weight
    if onednn_crashes(x, weight, *g[:3]) or is_depthwise(x, weight, g.groups):
        return weight  # which is given a border, and which is not oneDNN's
    packed: Tensor = _reorder(weight, g.padding, g.stride, g.dilation, g.groups, list(x.shape))
    return packed


def convolving_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, act: str
) -> Callable[[Tensor], Tensor]:
    """Return what computes act(conv2d(x)) of images like x: which kernel does is asked once."""
    if is_depthwise(x, weight, g.groups):
        return depthwise_calling(x, weight, bias, g[:3], ACT_NUMBER[act])
    if by_panels(x, weight, g):
        in_panels, wide = panels(weight.to(acc_type(x))), as_acc(x, bias)
        return lambda x: pointwise_conv2d(x, in_panels, len(weight), wide, act)
    if by_winograd(x, weight, g, EACH_CALL):
        u = transformed(weight)
        return lambda x: conv2d_winograd(x, u, bias, g.padding, ACT_NUMBER[act])
    if in_float32(x, weight, g):
        like, wide = (
            torch.empty_like(x, dtype=torch.float32),
            None if bias is None else bias.float(),
        )
        inner = convolving_onednn(like, weight.float(), wide, g, act)
        return lambda x: inner(x.float()).to(x.dtype)
    if leaves_onednn(x, weight, g):
        return lambda x: eager_activation(torch.conv2d(x, weight, bias), act, inplace=True)
    if torch.compiler.is_compiling():
        # It fuses plain operations by itself, and knows only half of what oneDNN's returns.
        return lambda x: eager_activation(convolve(x, weight, bias, g), act, inplace=True)
    if onednn_crashes(x, weight, *g[:3]):
        return lambda x: _pointwise(*with_border(x, weight, g), weight, bias, act)
    return lambda x: _pointwise(x, g, weight, bias, act)


def _pointwise(x: Tensor, g: ConvGeometry, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    stride, padding, dilation, groups = g
    y: Tensor = _convolution_pointwise.default(
        x, weight, bias, padding, stride, dilation, groups, *EPILOGUES[act]
    )
    return y


def residual_beside(x: Tensor, residual: Tensor | None, own: bool) -> Tensor | None:
    """Return a residual for kernels of our own, in x's layout; own: it may come in another one."""
    if residual is not None and own:
        return in_format_of(residual, x)
    if residual is not None:
        check_format("conv_bn_act", "residual", residual, memory_format_of(x))
    return residual


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
    if residual is None:
        return convolving_onednn(x, weight, bias, g, act)(x)
    if by_panels(x, weight, g):
        added, in_panels = residual_beside(x, residual, own), panels(weight.to(acc_type(x)))
        return pointwise_conv2d(x, in_panels, len(weight), as_acc(x, bias), act, added)
    if by_winograd(x, weight, g, EACH_CALL):
        added, u = residual_beside(x, residual, own), transformed(weight)
        return conv2d_winograd(x, u, bias, g.padding, ACT_NUMBER[act], added)
    if not is_depthwise(x, weight, g.groups) and in_float32(x, weight, g):
        wide = None if bias is None else bias.float()
        added = residual.float()
        return convolve_onednn(x.float(), weight.float(), wide, g, act, added, own).to(x.dtype)
    x, g = with_border(x, weight, g)
    plain = is_depthwise(x, weight, g.groups) or leaves_onednn(x, weight, g)
    if torch.compiler.is_compiling() or plain:
        y = convolve(x, weight, bias, g)
        if not own:
            check_like("conv_bn_act", "residual", residual, y)
        y += residual
        y = eager_activation(y, act, inplace=True)
    else:
        # In NCHW and with groups it adds in a pass of its own, whose ReLU does not know bfloat16.
        one_pass = memory_format_of(x) is torch.channels_last and g.groups == 1
        relu = "relu" if act == "relu" and (one_pass or x.dtype is torch.float32) else None
        if single := residual.shape[2:] == (1, 1):
            # In channels_last torch 2.11 adds images of one pixel in place only.
            residual = residual.clone()
        arguments = (weight, bias, g.padding, g.stride, g.dilation, g.groups)
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
