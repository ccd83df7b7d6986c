"""pointwise_depthwise_conv2d in inference, compared with oneDNN's 1x1 convolution and the other.

Inverted residual blocks of MobileNetV2 and EfficientNet, with weights that are packed before. Floor
in passes over x: x read and y written once.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from where import cases, tiny

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d.onednn import convolving_onednn, packed_onednn
from fastcnn.ops.conv2d.pointwise_depthwise import pointwise_depthwise_conv2d
from fastcnn.ops.depthwise_conv2d import depthwise_calling

INPUTS = 4


class Block(NamedTuple):
    """Images, channels of x and y, side, and the depthwise convolution's kernel and stride."""

    n: int
    c_in: int
    c: int
    side: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return (
            f"{self.n}x{self.c_in}-{self.c}-{self.side}-{self.kernel}x{self.kernel}s{self.stride}"
        )


BLOCKS = [
    Block(8, 16, 96, 112, 3, 2), Block(8, 24, 144, 56, 3, 1), Block(8, 24, 144, 56, 5, 2),
    Block(8, 32, 192, 28, 3, 1), Block(8, 40, 240, 28, 5, 1), Block(8, 64, 384, 14, 3, 1),
    Block(8, 96, 576, 14, 3, 1), Block(8, 160, 960, 7, 3, 1), Block(1, 16, 96, 112, 3, 2),
]  # fmt: skip
CASES = {str(block): block for block in BLOCKS}


@pytest.mark.parametrize("block", cases(CASES, []))
@pytest.mark.parametrize("act", ["relu6", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pointwise_depthwise_conv2d(
    compare: Any, dtype: torch.dtype, act: str, block: Block
) -> None:
    n, c_in, c, side = tiny(*block[:4])
    kernel, padding, stride = block.kernel, block.kernel // 2, block.stride
    g = ConvGeometry((stride, stride), (padding, padding), (1, 1), c)
    weight, bias = torch.randn(c, c_in, 1, 1), torch.randn(c)
    transposed = weight.flatten(1).t().contiguous()
    dw_weight, dw_bias = torch.randn(c, 1, kernel, kernel), torch.randn(c)
    inputs = [
        torch.randn(n, c_in, side, side).to(dtype).to(memory_format=torch.channels_last)
        for _ in range(INPUTS)
    ]
    like = torch.empty(n, c, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    packed = packed_onednn(inputs[0], weight.to(dtype), ConvGeometry())
    first = convolving_onednn(inputs[0], packed, bias.to(dtype), ConvGeometry(), act)
    second = depthwise_calling(like, dw_weight, dw_bias, g[:3], ACT_NUMBER[act])

    def apart(x: Tensor) -> Tensor:
        return second(first(x))

    def ours(x: Tensor) -> Tensor:
        return pointwise_depthwise_conv2d(x, transposed, bias, act, dw_weight, dw_bias, g, act)

    passes = 1 + ours(inputs[0]).numel() / inputs[0].numel()
    compare(ours, apart, inputs, passes, inputs[0])
