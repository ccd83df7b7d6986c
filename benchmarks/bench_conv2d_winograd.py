"""conv2d_winograd on the CPU, forward and each gradient, compared with PyTorch's convolution.

3x3 convolutions of stride 1 of ResNets, VGG and U-Net. Forward has its weight transformed before,
as inference keeps it; dx transforms it in the call. Floor in passes over the input: forward and dx
read or write it and y once, dweight reads both. Beside the table stand GFLOP/s, in extra_info: of
the definition's operations, of which the transformed products are a fourth.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from where import cases, tiny

from fastcnn.ops.conv2d.winograd import conv2d_winograd, conv2d_winograd_bwd, transformed

INPUTS = 4


class Conv(NamedTuple):
    """A convolution: images, channels in and out, side."""

    n: int
    c_in: int
    c_out: int
    side: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c_in}-{self.c_out}-{self.side}"


CONVS = [
    Conv(8, 32, 32, 56), Conv(8, 64, 64, 56), Conv(8, 64, 64, 28), Conv(8, 128, 128, 28),
    Conv(8, 128, 32, 28), Conv(8, 256, 256, 14), Conv(8, 512, 512, 7), Conv(8, 512, 512, 14),
    Conv(8, 256, 256, 56), Conv(4, 64, 64, 256), Conv(1, 64, 64, 56), Conv(1, 256, 256, 14),
]  # fmt: skip
CASES = {str(conv): conv for conv in CONVS}


class Call(NamedTuple):
    """What one call works on."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    u: Tensor


@pytest.mark.parametrize("conv", cases(CASES, []))
@pytest.mark.parametrize("result", ["y", "dx", "dweight"])
def test_conv2d_winograd(compare: Any, result: str, conv: Conv) -> None:
    n, c_in, c_out, side = tiny(*conv)
    wanted = [result == "dx", result == "dweight", False]

    def image(c: int) -> Tensor:
        return torch.randn(n, c, side, side).to(memory_format=torch.channels_last)

    def call() -> Call:
        weight = torch.randn(c_out, c_in, 3, 3).to(memory_format=torch.channels_last)
        return Call(image(c_in), image(c_out), weight, transformed(weight))

    def by_torch(one: Call) -> Tensor:
        if result == "y":
            return F.conv2d(one.x, one.weight, padding=1)
        grads = torch.ops.aten.convolution_backward(
            one.dy, one.x, one.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
        )
        found: Tensor = grads[wanted.index(True)]
        return found

    def ours(one: Call) -> Tensor | None:
        if result == "y":
            return conv2d_winograd(one.x, one.u, None, (1, 1))
        found = conv2d_winograd_bwd(one.dy, one.x, one.weight, (1, 1), (wanted[0], wanted[1]))
        return found[wanted.index(True)]

    inputs = [call() for _ in range(INPUTS)]
    passes = 1 + inputs[0].dy.numel() / inputs[0].x.numel()
    flops = 18 * inputs[0].dy.numel() * c_in
    compare(ours, by_torch, inputs, passes, inputs[0].x, flops=flops)
