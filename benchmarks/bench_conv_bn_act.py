"""ResNet-50's blocks, forward and backward in training, beside the same modules one by one.

Most of the time is the convolutions', which are PyTorch's on both sides, in channels_last, where
they are at their best. There is no floor in bytes to compare with.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastcnn.lab import eager_twin
from fastcnn.models.resnet import Bottleneck
from fastcnn.nn import BatchNormAct2d

BATCH = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # in turn: 4 x 6 MB and more, and a block's own activations many times that


class Stage(NamedTuple):
    """The blocks of a stage on 224x224 images: channels inside, and the side of their output."""

    planes: int
    side: int


STAGES = {f"stage{i}": Stage(32 * 2**i, 112 // 2**i) for i in (1, 2, 3, 4)}


def bottleneck(planes: int, projection: bool) -> Bottleneck:
    """The first block of a stage, with a projection, or one of the others."""
    if not projection:
        return Bottleneck(4 * planes, planes)
    stride, c_in = (1, 64) if planes == 64 else (2, 2 * planes)
    shortcut = nn.Conv2d(c_in, 4 * planes, 1, stride, bias=False)
    beside = nn.Sequential(shortcut, BatchNormAct2d(4 * planes, act="none"))
    return Bottleneck(c_in, planes, stride, beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["projection", "identity"])
@pytest.mark.parametrize("stage", STAGES)
def test_blocks(compare: Any, stage: str, kind: str, dtype: str) -> None:
    planes, side = STAGES[stage]
    ours = bottleneck(planes, kind == "projection").to(
        DTYPES[dtype], memory_format=torch.channels_last
    )
    eager = eager_twin(ours)
    side *= ours.conv2.stride[0]

    def image() -> Tensor:
        x = torch.randn(BATCH, ours.conv1.in_channels, side, side).to(DTYPES[dtype])
        return x.to(memory_format=torch.channels_last).requires_grad_()

    inputs = [image() for _ in range(INPUTS)]
    with torch.no_grad():
        dy = torch.randn_like(ours(inputs[0]))

    def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), [x, *model.parameters()], dy)

    compare(lambda x: step(ours, x), lambda x: step(eager, x), inputs, 0, dy)
