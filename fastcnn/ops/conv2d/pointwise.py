"""pointwise_conv2d: a 1x1 convolution in channels_last on the CPU, with its epilogue, in inference.

    y = act(conv2d(x, weight) + bias + residual)

x: [n, c_in, h, w] in channels_last (the operator reads some channels of such an image, too; a chain
makes them dense before); weight: [c_out, c_in, 1, 1], as panels() lays it out; residual and y:
[n, c_out, h, w]. Products and sums are in the accumulate type. Bytes: x, the weight, the residual
and y once (csrc/cpu/pointwise_conv2d/).

The time of oneDNN's convolution over this one's, float32, ReLU6, one thread of an AMD EPYC (family
23, model 1: AVX2, vectors halved, 32 KiB and 512 KiB of own caches), torch 2.13, medians of 15 in
turns, beside other work; and GFLOP/s of this one (the fastest shape in a quiet moment: 43):

    n, c_in, c_out, h = w   oneDNN/own   GFLOP/s
    8, 16, 96, 112           1.16       26
    8, 96, 24, 56            1.01       25
    8, 24, 144, 56           1.12       30
    8, 144, 24, 56           1.05       27
    8, 32, 192, 28           1.14       30
    8, 64, 384, 14           1.06       30
    8, 384, 96, 14           1.06       33
    8, 96, 576, 14           1.01       33
    8, 160, 960, 7           1.06       34
    8, 960, 160, 7           1.07       36
    8, 320, 1280, 7          1.03       35
    8, 120, 120, 14          1.10       33
    8, 256, 64, 56           1.01       32
    8, 64, 256, 56           0.99       33
    1, 120, 120, 14          1.40       29
    1, 960, 160, 7           1.15       31

Below some 40 us a call the rest is what a call of oneDNN costs: one image of 8 to 1024 channels on
1 to 28 pixels a side takes oneDNN 1.2 to 2.9 times as long, and PyTorch's matrix product, to which
it leaves some of these, 1.2 to 1.9 times. No other processor with AVX2 was measured, and half types
only within inverted_residual; with AVX-512 nothing was: there it is oneDNN's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import _C
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.checks import memory_format_of
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.dtypes import new_image
from fastcnn.common.library import declare
from fastcnn.ops.conv2d.float32_products import is_exporting, is_slow

PANEL = 16  # columns, as csrc/pointwise_conv2d.h has them


def _fwd_fake(
    x: Tensor, weight: Tensor, c_out: int, bias: Tensor | None, residual: Tensor | None, act: int
) -> Tensor:
    return new_image(x, (x.shape[0], c_out, *x.shape[2:]), channels_last=True)


declare(
    "pointwise_conv2d_fwd(Tensor x, Tensor weight, int c_out, Tensor? bias, Tensor? residual, "
    "int act) -> Tensor",
    _fwd_fake,
)
_fwd = torch.ops.fastcnn.pointwise_conv2d_fwd.default


def is_pointwise(weight: Tensor, g: ConvGeometry) -> bool:
    """Whether a convolution makes each pixel of the one at its place alone."""
    return weight.shape[2:] == (1, 1) and g == ConvGeometry()


def takes_products(x: Tensor) -> bool:
    """Whether the kernels take images like x, and their products are in float32 anyhow."""
    if x.device.type != "cpu" or not (x.dtype is torch.float32 or is_slow(x.dtype)):
        return False
    if is_exporting() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return memory_format_of(x) is torch.channels_last and x.numel() > 0


def by_panels(x: Tensor, weight: Tensor, g: ConvGeometry) -> bool:
    """Whether a convolution of x is made by pointwise_conv2d: where that is known to be faster."""
    return is_pointwise(weight, g) and takes_products(x) and _C.cpu_capability() == "avx2"


def panels(weight: Tensor) -> Tensor:
    """Return a weight [c_out, c_in, 1, 1] as the kernels read it: [panels, c_in, PANEL]."""
    rows = weight.flatten(1)
    c_out, c_in = rows.shape
    padded = F.pad(rows, (0, 0, 0, -c_out % PANEL))
    return padded.view(-1, PANEL, c_in).transpose(1, 2).contiguous()


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    c_out: int,
    bias: Tensor | None,
    act: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Return act(conv2d(x, weight) + bias + residual); weight: panels, as bias in acc_type(x)."""
    y: Tensor = _fwd(x, weight, c_out, bias, residual, ACT_NUMBER[act])
    return y
