"""pointwise_conv2d in inference, compared with oneDNN's convolution, weights packed before.

1x1 convolutions of MobileNetV2, ShuffleNetV2 and ResNet-50 with ReLU6, float32. Floor in passes: x
read and y written once. FASTCNN_CPU_CAPABILITY=avx2 measures that level.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from where import cases, tiny

from fastcnn.ops.conv2d.onednn import EPILOGUES
from fastcnn.ops.conv2d.pointwise import panels, pointwise_conv2d

INPUTS = 4
SHAPES = [  # images, channels in and out, side
    (8, 16, 96, 112), (8, 96, 24, 56), (8, 24, 144, 56), (8, 144, 24, 56), (8, 32, 192, 28),
    (8, 64, 384, 14), (8, 384, 96, 14), (8, 96, 576, 14), (8, 160, 960, 7), (8, 960, 160, 7),
    (8, 320, 1280, 7), (8, 120, 120, 14), (8, 256, 64, 56), (8, 64, 256, 56), (1, 120, 120, 14),
    (1, 960, 160, 7), (1, 32, 64, 4),
]  # fmt: skip
CASES = {"-".join(map(str, shape)): shape for shape in SHAPES}
_reorder = torch.ops.mkldnn._reorder_convolution_weight
_convolve = torch.ops.mkldnn._convolution_pointwise.default
AROUND: Any = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


@pytest.mark.parametrize("shape", cases(CASES, []))
def test_pointwise_conv2d(compare: Any, shape: tuple[int, int, int, int]) -> None:
    n, c_in, c_out, side = tiny(*shape)
    weight, bias = torch.randn(c_out, c_in, 1, 1), torch.randn(c_out)
    made = [torch.randn(n, c_in, side, side) for _ in range(INPUTS)]
    inputs = [x.to(memory_format=torch.channels_last) for x in made]
    packed = panels(weight)
    theirs = _reorder(weight, *AROUND[:3], 1, list(inputs[0].shape))

    def onednn(x: Tensor) -> Tensor:
        y: Tensor = _convolve(x, theirs, bias, *AROUND, *EPILOGUES["relu6"])
        return y

    def ours(x: Tensor) -> Tensor:
        return pointwise_conv2d(x, packed, c_out, bias, "relu6")

    compare(ours, onednn, inputs, 1 + c_out / c_in, inputs[0])
