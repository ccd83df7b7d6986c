"""pointwise_depthwise_conv2d: a 1x1 convolution and the depthwise one behind it, in inference.

    y = act2(conv2d(act(conv2d(x, w) + b), w2, groups=c) + b2)        of inverted residual blocks
                                                                      (Sandler et al., CVPR 2018)

x: [n, c_in, h, w] in channels_last on the CPU; w: [c_in, c]; w2: [c, 1, kh, kw]; y: [n, c, h_out,
w_out]. The image between the two has up to six times the channels of x, and is the largest of its
network: it is made for some rows and vectors of channels at a time, which stay in the L2 cache
(csrc/cpu/depthwise_conv2d/pointwise.cpp), and of half types in float32. Bytes: x is read and y
written once. There is no backward: in training batch norm's statistics lie between the two.

The time of oneDNN's convolution and of depthwise_conv2d behind it over this, 4 images on one core
of a Xeon (model 207, AVX512-BF16 without AMX, 2 MiB L2 cache, 260 MiB L3), torch 2.13, the thread's
time, in turns, beside other work. In bf16 oneDNN's convolution is of bf16 products:

                                                  fp32                    bf16
    c_in, c, h = w, kernel, stride     ReLU6  hardswish  SiLU        ReLU6  SiLU
    16, 96, 112, 3, 2                   1.70       1.48  1.49         1.55  1.56
    24, 144, 56, 3, 1                   0.95       0.84  1.12         1.35  1.35
    24, 144, 56, 5, 2                   1.06       1.17  1.30         1.60  1.59
    32, 192, 28, 3, 1                   1.02       0.93  1.29         1.50  1.50
    40, 240, 28, 5, 1                   0.90       0.84  1.16         1.46  1.49
    64, 384, 14, 3, 1                   1.11       0.94  1.26         1.70  1.64
    96, 576, 14, 3, 1                   0.89       0.88  1.12         1.46  1.49
    112, 672, 14, 5, 1                  0.79       0.85  0.97         1.33  1.40
    160, 960, 7, 3, 1                   0.89       0.95  1.02         1.53  1.56
    192, 1152, 7, 5, 1                  0.85       0.96  1.04         1.39  1.46
    160, 960, 7, 3, 1, one image        1.06       1.04  1.02         1.47  1.45

Its own products have two thirds of oneDNN's speed, and what it gains is memory's and, of SiLU, the
sigmoid and GELU, oneDNN's own functions. With AVX2 (oneDNN's and this) it takes 0.8 to 1.1 of it in
float32, and is left alone. So the rule: MOST_INPUTS.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import _C
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.checks import memory_format_of
from fastcnn.common.conv_geometry import ConvGeometry, output_size
from fastcnn.common.dtypes import new_image
from fastcnn.common.library import declare
from fastcnn.ops.conv2d.float32_products import is_slow

# Channels of x up to which it is the faster way, by what the first activation costs oneDNN; of half
# types that the processor is slow at, any.
MOST_INPUTS = {"cheap": 16, "costly": 96, "half": 192}
_COSTLY = ("silu", "sigmoid", "gelu")


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: int,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dw_act: int,
) -> Tensor:
    sizes = output_size(x.shape[2:], dw_weight.shape[2:], stride, padding, dilation)
    return new_image(x, (x.shape[0], dw_weight.shape[0], *sizes), channels_last=True)


declare(
    "pointwise_depthwise_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, int act, "
    "Tensor dw_weight, Tensor? dw_bias, int[] stride, int[] padding, int[] dilation, int dw_act) "
    "-> Tensor",
    _fwd_fake,
)
_fwd = torch.ops.fastcnn.pointwise_depthwise_conv2d_fwd.default


def outruns_two(
    x: Tensor, weight: Tensor, g: ConvGeometry, act: str, dw_weight: Tensor, dw_g: ConvGeometry
) -> bool:
    """Whether two convolutions are of this kind, and known to be faster as one."""
    c, c_in, *kernel = weight.shape
    pointwise = kernel == [1, 1] and g == ConvGeometry()
    depthwise = dw_g.groups == c and tuple(dw_weight.shape[:2]) == (c, 1)
    if not pointwise or not depthwise or c == 1 or x.numel() == 0 or x.device.type != "cpu":
        return False
    if memory_format_of(x) is not torch.channels_last or _C.cpu_capability() != "avx512":
        return False
    if is_slow(x.dtype):
        return c_in <= MOST_INPUTS["half"]
    kind = "costly" if act in _COSTLY else "cheap"
    return x.dtype is torch.float32 and c_in <= MOST_INPUTS[kind]


def pointwise_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    dw_weight: Tensor,
    dw_bias: Tensor,
    dw_g: ConvGeometry,
    dw_act: str,
) -> Tensor:
    """Return act2(depthwise(act(conv2d(x, weight) + bias)) + dw_bias), all in acc_type(x).

    weight: [c_in, c].
    """
    y: Tensor = _fwd(
        x, weight, bias, ACT_NUMBER[act], dw_weight, dw_bias, *dw_g[:3],
        ACT_NUMBER[dw_act],
    )  # fmt: skip
    return y
