"""ResNet-50's and U-Net's convolutions with bias and ReLU in 8 bits, vs. PyTorch's in bf16.

Weights are packed. PyTorch runs conv2d with the bias and ReLU in place, in channels_last, on CUDA
by the fastest algorithm that cuDNN finds. There is no floor in bytes to compare a convolution with.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.shapes import RESNET50_CONVS, UNET_CONVS, Conv
from torch import Tensor
from where import DEVICE, cases, on, tiny, tiny_conv

from fastcnn.functional import conv2d_int8, pack_conv2d_int8

INPUTS = 4  # in turn: most are beyond the L2 caches, and all outputs replace each other
BATCH = {"resnet50": on(16, 256), "unet": on(1, 16)}
CASES = {
    f"{network}-{conv}": (conv, BATCH[network])
    for network, convs in (("resnet50", RESNET50_CONVS), ("unet", UNET_CONVS))
    for conv in convs
}
GPU_CASES = [
    "resnet50-64-256-k1-s1-56",
    "resnet50-128-128-k3-s1-28",
    "resnet50-1024-256-k1-s1-14",
    "resnet50-256-256-k3-s1-14",
    "unet-64-64-k3-s1-256",
]


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_convolutions(compare: Any, case: tuple[Conv, int]) -> None:
    conv, (batch,) = tiny_conv(case[0]), tiny(case[1])
    last, sizes = torch.channels_last, (batch, conv.c_in, conv.side, conv.side)
    # Half of what ReLU gives is 0; weights as those of trained networks: few are large.
    numbers = {"dtype": torch.int8, "device": DEVICE}
    images = [torch.randint(-127, 128, sizes, **numbers).clamp_(min=0) for _ in range(INPUTS)]
    weight = torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel).mul(30).clamp(-127, 127)
    weight_scale, bias = torch.rand(conv.c_out) * 0.01 + 1e-3, torch.randn(conv.c_out)
    packed = pack_conv2d_int8(weight.to(DEVICE, torch.int8))
    weight16 = weight.to(DEVICE, torch.bfloat16, memory_format=last)
    bias, weight_scale = bias.to(DEVICE), weight_scale.to(DEVICE)
    bias16 = bias.bfloat16()
    padding = conv.kernel // 2

    def ours(pair: tuple[Tensor, Tensor]) -> Tensor:
        return conv2d_int8(
            pair[0], packed, x_scale=0.02, x_zero_point=0, weight_scale=weight_scale, bias=bias,
            stride=conv.stride, padding=padding, act="relu", out_scale=0.05, out_zero_point=0,
        )  # fmt: skip

    def eager(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.conv2d(pair[1], weight16, bias16, conv.stride, padding).relu_()

    inputs = [
        tuple(image.to(dtype, memory_format=last) for dtype in (torch.uint8, torch.bfloat16))
        for image in images
    ]
    with torch.inference_mode():
        compare(ours, eager, inputs, 0, eager(inputs[0]))
