"""ResNet-50's convolutions with bias and ReLU in 8 bits, packed weights, beside PyTorch's bf16.

PyTorch runs conv2d with the bias and ReLU in place, in channels_last. There is no floor in bytes to
compare a convolution with.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import RESNET50_CONVS, Conv
from torch import Tensor

from fastcnn.functional import conv2d_int8, pack_conv2d_int8

BATCH = 16
INPUTS = 4  # in turn: most are beyond the L2 caches, and all outputs replace each other
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("conv", RESNET50_CONVS, ids=str)
def test_convolutions(compare: Any, conv: Conv, device: str) -> None:
    if device == "cuda":
        pytest.skip("no CUDA kernel yet")
    last, sizes = torch.channels_last, (BATCH, conv.c_in, conv.side, conv.side)
    # Half of what ReLU gives is 0; weights as those of trained networks: few are large.
    images = [torch.randint(-127, 128, sizes).clamp(min=0) for _ in range(INPUTS)]
    weight = torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel).mul(30).clamp(-127, 127)
    weight_scale, bias = torch.rand(conv.c_out) * 0.01 + 1e-3, torch.randn(conv.c_out)
    packed = pack_conv2d_int8(weight.to(torch.int8))
    weight16 = weight.to(device, torch.bfloat16, memory_format=last)
    bias16 = bias.to(device, torch.bfloat16)
    padding = conv.kernel // 2

    def ours(pair: tuple[Tensor, Tensor]) -> Tensor:
        return conv2d_int8(
            pair[0], packed, x_scale=0.02, x_zero_point=0, weight_scale=weight_scale, bias=bias,
            stride=conv.stride, padding=padding, act="relu", out_scale=0.05, out_zero_point=0,
        )  # fmt: skip

    def eager(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.conv2d(pair[1], weight16, bias16, conv.stride, padding).relu_()

    inputs = [
        (
            image.to(device, torch.uint8, memory_format=last),
            image.to(device, torch.bfloat16, memory_format=last),
        )
        for image in images
    ]
    with torch.inference_mode():
        compare(ours, eager, inputs, 0, eager(inputs[0]))
