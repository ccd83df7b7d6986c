"""inverted_residual: a 1x1 convolution, a depthwise one and a 1x1 convolution, in inference.

    z = act(depthwise(expand_act(conv2d(x, expand) + expand_bias)) + bias)
    y = project_act(conv2d(z, project) + project_bias + residual)

The blocks of MobileNetV2 (inverted residuals: Sandler et al., CVPR 2018), MNASNet, ShuffleNetV2 and
EfficientNet. The first or the last of the three may be missing: a depthwise separable convolution,
and what stands before squeeze-and-excitation. x: [n, c_in, h, w] in channels_last on the CPU (the
operator reads some channels of such an image, too; a chain makes them dense before).

The image between has up to six times the channels of x, and is the largest of its network: it is
made for some rows at a time, which stay in the L2 cache, and of half types in float32
(csrc/cpu/pointwise_conv2d/inverted_residual.cpp). Bytes: x, the residual and the weights are read
and y written once. There is no backward: in training batch norm's statistics lie between.

The time of oneDNN's convolutions with depthwise_conv2d between over this one's, float32, one thread
of an AMD EPYC (family 23, model 1: AVX2), torch 2.13, medians of 11 in turns, beside other work:

    n, c_in, c, c_out, h = w, stride         ReLU6  hardswish  SiLU
    8, 32 (no first one), 16, 112, 1          1.14       1.12  1.08
    8, 16, 96, 24, 112, 2                     1.28       1.12  1.38
    8, 24, 144, 24, 56, 1                     1.33       1.27  1.33
    8, 24, 144, 32, 56, 2                     1.23       1.10  1.34
    8, 32, 192, 32, 28, 1                     1.30       1.17  1.30
    8, 64, 384, 64, 14, 1                     1.21       1.19  1.27
    8, 96, 576, 96, 14, 1                     1.13       1.10  1.16
    8, 160, 960, 160, 7, 1                    1.11       1.08  1.14
    8, 160, 960, 320, 7, 1                    1.06       1.06  1.10
    8, 58, 58, 58, 28, 1                      1.20       1.14  1.27
    8, 232, 232, 232, 7, 1                    1.27       1.23  1.27
    1, 24, 144, 24, 56, 1                     1.53       1.39  1.49
    1, 96, 576, 96, 14, 1                     1.28       1.20  1.26
    1, 160, 960, 160, 7, 1                    1.31       1.25  1.29

The first two alone, as before squeeze-and-excitation, have 0.98 to 1.30 of that pair's speed and of
pointwise_conv2d behind them, but for the block without the first one never below 1.01. In bfloat16,
which is multiplied in float32 there, a depthwise convolution and a 1x1 one of 64 to 1024 channels
have 0.99 to 1.07, whole blocks 1.07 to 1.26 (2 images). So with AVX2 all of them are taken. Other
processors with AVX2, whose vectors are not halved, were not measured.

With AVX-512 another kernel of the first two was measured (a Xeon, model 207, AVX512-BF16 without
AMX, 2 MiB L2 cache, 4 images): in float32 1.41 to 1.70 times as fast up to 16 channels of x, above
0.79 to 1.12 with ReLU6 and hardswish and up to 96 channels 1.12 to 1.30 with SiLU; in bfloat16,
which oneDNN multiplies slower there, 1.33 to 1.74. MOST_INPUTS is that rule. This kernel, which
with AVX2 takes 0.78 to 1.03 of the other's time for the pair, was not measured there, and neither
were all three.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import _C
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry, output_size
from fastcnn.common.dtypes import new_image
from fastcnn.common.library import declare
from fastcnn.ops.conv2d.float32_products import is_slow
from fastcnn.ops.conv2d.pointwise import is_pointwise, takes_products

# With AVX-512 channels of x up to which the first two are one call, by what the first activation
# costs oneDNN; of half types that the processor is slow at, any.
MOST_INPUTS = {"cheap": 16, "costly": 96, "half": 192}
_COSTLY = ("silu", "sigmoid", "gelu")


def _fwd_fake(
    x: Tensor,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    expand_act: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: int,
    project: Tensor | None,
    c_out: int,
    project_bias: Tensor | None,
    project_act: int,
    residual: Tensor | None,
) -> Tensor:
    sizes = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    c = weight.shape[0] if project is None else c_out
    return new_image(x, (x.shape[0], c, *sizes), channels_last=True)


declare(
    "inverted_residual_fwd(Tensor x, Tensor? expand, Tensor? expand_bias, int expand_act, "
    "Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int act, "
    "Tensor? project, int c_out, Tensor? project_bias, int project_act, Tensor? residual) "
    "-> Tensor",
    _fwd_fake,
)
_fwd = torch.ops.fastcnn.inverted_residual_fwd.default


class Pointwise(NamedTuple):
    """One of the 1x1 convolutions: panels, and numbers in the accumulate type."""

    weight: Tensor
    bias: Tensor
    act: str


class Depthwise(NamedTuple):
    """The one between them; weight: [c, 1, kernel_h, kernel_w], in the accumulate type."""

    weight: Tensor
    bias: Tensor
    act: str
    geometry: ConvGeometry


def inverted_residual(
    x: Tensor, parts: Sequence[Pointwise | Depthwise], residual: Tensor | None = None
) -> Tensor:
    """Return y, or z where there is no project; parts: the two or three convolutions in order."""
    none = ACT_NUMBER["none"]
    first: tuple[Any, ...] = (None, None, none)
    window: tuple[Any, ...] = ()
    last: tuple[Any, ...] = (None, 0, None, none)
    for part in parts:
        weight, bias, act = part.weight, part.bias, ACT_NUMBER[part.act]
        if isinstance(part, Depthwise):
            window = (weight, bias, *part.geometry[:3], act)
        elif not window:
            first = (weight, bias, act)
        else:
            last = (weight, len(bias), bias, act)
    y: Tensor = _fwd(x, *first, *window, *last, residual)
    return y


class Convolution(NamedTuple):
    """One of a chain, as its weight and arguments say."""

    weight: Tensor
    geometry: ConvGeometry
    act: str


def taken_together(x: Tensor, chain: Sequence[Convolution]) -> int:
    """Return how many of a chain's first convolutions are known to be faster as one: 0, 2 or 3."""
    if not takes_products(x):
        return 0
    first = int(is_pointwise(*chain[0][:2]))
    last = first + 1
    if len(chain) < last or not _is_depthwise(*chain[first][:2]):
        return 0
    projects = len(chain) > last and is_pointwise(*chain[last][:2])
    level = _C.cpu_capability()
    if level == "avx2":
        return last + projects if first or projects else 0
    expands = bool(first) and x.shape[1] <= _most_inputs(x, chain[0].act)
    return last if expands and level == "avx512" else 0


def _most_inputs(x: Tensor, act: str) -> int:
    if is_slow(x.dtype):
        return MOST_INPUTS["half"]
    return MOST_INPUTS["costly" if act in _COSTLY else "cheap"]


def _is_depthwise(weight: Tensor, g: ConvGeometry) -> bool:
    c, in_group = weight.shape[:2]
    return in_group == 1 and c > 1 and g.groups == c
