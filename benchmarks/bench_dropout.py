"""dropout, forward and backward, beside F.dropout and F.dropout2d (+ add).

Floor in passes over the tensor (docs/performance.md): forward 2 (read x, write y), backward 2 (read
dy, write dx), and one more for a residual, which is read; its gradient is dy itself.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from shapes import LAYOUTS, RESNET50
from torch import Tensor

from fastcnn.functional import dropout

# ResNet-50's stages at batch 16: whole blocks of 8 a plane (56x56), and planes that straddle them
# (14x14, 7x7); the last two lie within the cache.
BATCH = 16
SHAPES = {
    f"{image.c}x{image.h}x{image.w}": image for image in (RESNET50[2], RESNET50[6], RESNET50[7])
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ["", "residual", "channel"]
INPUTS = 4  # sets of tensors in turn: 4 x 51 MB, beyond any cache
P = 0.1  # 1 - p is no multiple of 2^-16: the rare further draws are made


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(
    compare: Any, shape: str, dtype: str, layout: torch.memory_format, kind: str
) -> None:
    _, c, h, w = SHAPES[shape].sizes
    residual, per_channel = kind == "residual", kind == "channel"

    def image() -> Tensor:
        x = torch.randn(BATCH, c, h, w).to(DTYPES[dtype], memory_format=layout)
        return x.requires_grad_()

    layers = [
        Layer(image(), image() if residual else None, image().detach()) for _ in range(INPUTS)
    ]

    def gradients(y: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        inputs = [t for t in (layer.x, layer.residual) if t is not None]
        return torch.autograd.grad(y, inputs, layer.dy)

    def ours(layer: Layer) -> tuple[Tensor, ...]:
        y = dropout(layer.x, P, residual=layer.residual, per_channel=per_channel)
        return gradients(y, layer)

    def eager(layer: Layer) -> tuple[Tensor, ...]:
        y = F.dropout2d(layer.x, P) if per_channel else F.dropout(layer.x, P)
        if layer.residual is not None:
            y += layer.residual
        return gradients(y, layer)

    compare(ours, eager, layers, 5 if residual else 4, layers[0].dy)
