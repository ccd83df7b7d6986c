"""inverted_residual in inference, compared with oneDNN's 1x1 convolutions and the depthwise one.

Blocks of MobileNetV2, EfficientNet (whose third convolution stands behind squeeze-and-excitation),
MNASNet and ShuffleNetV2, float32, weights packed before. Floor in passes over x: x, and a
residual, read and y written once. FASTCNN_CPU_CAPABILITY=avx2 measures that level.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from where import cases, tiny

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d.inverted_residual import Depthwise, Pointwise, inverted_residual
from fastcnn.ops.conv2d.onednn import EPILOGUES
from fastcnn.ops.conv2d.pointwise import panels
from fastcnn.ops.depthwise_conv2d import depthwise_calling

INPUTS = 4
_reorder = torch.ops.mkldnn._reorder_convolution_weight
_convolve = torch.ops.mkldnn._convolution_pointwise
AROUND: Any = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation and groups of 1x1


class Block(NamedTuple):
    """Images, channels in, between and out (0: no third convolution), side, kernel and stride."""

    n: int
    c_in: int
    c: int
    c_out: int
    side: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return "-".join(map(str, self[:5])) + f"-{self.kernel}x{self.kernel}s{self.stride}"


BLOCKS = [
    Block(8, 16, 96, 24, 112, 3, 2), Block(8, 24, 144, 24, 56, 3, 1),
    Block(8, 24, 144, 40, 56, 5, 2), Block(8, 32, 192, 32, 28, 3, 1),
    Block(8, 40, 240, 0, 28, 5, 1), Block(8, 64, 384, 64, 14, 3, 1),
    Block(8, 96, 576, 96, 14, 3, 1), Block(8, 160, 960, 160, 7, 3, 1),
    Block(8, 192, 1152, 0, 7, 5, 1), Block(8, 58, 58, 58, 28, 3, 1),
    Block(8, 232, 232, 232, 7, 3, 1), Block(1, 24, 144, 24, 56, 3, 1),
]  # fmt: skip
CASES = {str(block): block for block in BLOCKS}


def by_onednn(like: Tensor, part: Pointwise, weight: Tensor) -> Any:
    """Return oneDNN's convolution of images like one, with its epilogue, and a residual's."""
    w = _reorder(weight, *AROUND[:3], 1, list(like.shape))

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor
        if residual is None:
            y = _convolve.default(x, w, part.bias, *AROUND, *EPILOGUES[part.act])
        else:
            y = _convolve.binary(x, residual, w, part.bias, *AROUND, "add", 1.0, None, [], "")
        return y

    return run


@pytest.mark.parametrize("block", cases(CASES, []))
@pytest.mark.parametrize("act", ["relu6", "hardswish", "silu"])
def test_inverted_residual(compare: Any, act: str, block: Block) -> None:
    n, c_in, c, c_out, side = tiny(*block[:5])
    k, stride = block.kernel, block.stride
    g = ConvGeometry((stride, stride), (k // 2, k // 2), (1, 1), c)
    weights = [torch.randn(c, c_in, 1, 1), torch.randn(c, 1, k, k), torch.randn(c_out, c, 1, 1)]
    last = torch.channels_last
    inputs = [torch.randn(n, c_in, side, side).to(memory_format=last) for _ in range(INPUTS)]
    expand = Pointwise(panels(weights[0]), torch.randn(c), act)
    parts = [expand, Depthwise(weights[1], torch.randn(c), act, g)]
    first = by_onednn(inputs[0], expand, weights[0])
    second = depthwise_calling(first(inputs[0]), weights[1], parts[1].bias, g[:3], ACT_NUMBER[act])
    adds = stride == 1 and c_in == c_out
    third = None
    if c_out > 0:
        parts.append(Pointwise(panels(weights[2]), torch.randn(c_out), "none"))
        third = by_onednn(second(first(inputs[0])), parts[2], weights[2])

    def apart(x: Tensor) -> Tensor:
        z: Tensor = second(first(x))
        return z if third is None else third(z, x if adds else None)

    def ours(x: Tensor) -> Tensor:
        return inverted_residual(x, parts, x if adds else None)

    passes = 1 + adds + ours(inputs[0]).numel() / inputs[0].numel()
    compare(ours, apart, inputs, passes, inputs[0])
