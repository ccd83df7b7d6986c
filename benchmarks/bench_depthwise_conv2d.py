"""depthwise_conv2d, forward and each gradient, compared with PyTorch's convolution.

The depthwise convolutions of MobileNetV2 and V3, EfficientNet-B0 and ConvNeXt-T on images of 224^2:
each kernel and stride at its largest, and deep where channels are many and pixels few; and wider
kernels, as ConvMixer's and RepLKNet's. Floor in
passes over the input: forward and dx read or write it and y once, dweight reads both. Beside the
table stand GFLOP/s, in extra_info: what kernels of 25 taps and more are bound by.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.shapes import LAYOUTS
from torch import Tensor
from where import DEVICE, cases, on, tiny

import fastcnn  # noqa: F401  (its operators)

ops = torch.ops.fastcnn
BATCH, INPUTS = on(8, 128), 4


class Conv(NamedTuple):
    """A depthwise convolution: channels, input side, kernel, stride."""

    c: int
    side: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.c}x{self.side}-k{self.kernel}-s{self.stride}"


CONVS = [
    Conv(32, 112, 3, 1), Conv(96, 112, 3, 2), Conv(144, 56, 3, 1), Conv(384, 14, 3, 1),
    Conv(960, 7, 3, 1), Conv(240, 28, 3, 2), Conv(144, 56, 5, 2), Conv(240, 28, 5, 1),
    Conv(672, 14, 5, 1), Conv(672, 14, 5, 2), Conv(1152, 7, 5, 1), Conv(96, 56, 7, 1),
    Conv(192, 28, 7, 1), Conv(384, 14, 7, 1), Conv(768, 7, 7, 1), Conv(384, 14, 9, 1),
    Conv(96, 28, 13, 1), Conv(64, 56, 31, 1),
]  # fmt: skip
TYPES = {
    "fp32-nhwc": (torch.float32, "channels_last"),
    "bf16-nhwc": (torch.bfloat16, "channels_last"),
    "fp32-nchw": (torch.float32, "nchw"),
}
CASES = {
    f"{conv}-{kind}": (conv, *TYPES[kind])
    for kind in TYPES
    for conv in (CONVS if kind.endswith("nhwc") else CONVS[2::5])
}
GPU_CASES = ["144x56-k3-s1-bf16-nhwc", "240x28-k5-s1-bf16-nhwc", "96x56-k7-s1-bf16-nhwc"]


class Call(NamedTuple):
    """What one call works on; the weight as kernels take it beside it."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    in_acc: Tensor


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
@pytest.mark.parametrize("result", ["y", "dx", "dweight"])
def test_depthwise_conv2d(compare: Any, result: str, case: tuple[Conv, torch.dtype, str]) -> None:
    conv, dtype, layout = case
    n, c, side = tiny(BATCH, conv.c, conv.side)
    kernel, stride, pad = conv.kernel, [conv.stride] * 2, [conv.kernel // 2] * 2
    window, last = (stride, pad, [1, 1]), layout == "channels_last"

    def call() -> Call:
        x = torch.randn(n, c, side, side, device=DEVICE).to(dtype, memory_format=LAYOUTS[layout])
        weight = torch.randn(c, 1, kernel, kernel, device=DEVICE).to(dtype)
        y = F.conv2d(x, weight, None, *window, groups=c)
        return Call(x, torch.randn_like(y), weight, weight.float())

    def by_torch(one: Call) -> Tensor:
        if result == "y":
            return F.conv2d(one.x, one.weight, None, *window, groups=c)
        wanted = [result == "dx", result == "dweight", False]
        grads = torch.ops.aten.convolution_backward(
            one.dy, one.x, one.weight, None, *window, False, [0, 0], c, wanted
        )
        found: Tensor = grads[wanted.index(True)]
        return found

    def ours(one: Call) -> Tensor:
        if result == "y":
            return ops.depthwise_conv2d_fwd(one.x, one.in_acc, None, *window, 0)
        if result == "dx":
            return ops.depthwise_conv2d_bwd_data(one.dy, one.in_acc, side, side, *window, last)
        return ops.depthwise_conv2d_bwd_weight(one.dy, one.x, kernel, kernel, *window)[0]

    inputs = [call() for _ in range(INPUTS)]
    passes = 1 + inputs[0].dy.numel() / inputs[0].x.numel()
    flops = 2 * inputs[0].dy.numel() * kernel**2
    compare(ours, by_torch, inputs, passes, inputs[0].x, flops=flops)
