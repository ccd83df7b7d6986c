"""batch_norm_act, forward and backward in training, beside F.batch_norm + add + relu.

Floor in passes over the tensor (docs/performance.md): forward 3, backward 5, and one more each for
a residual.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from shapes import LAYOUTS, RESNET50
from torch import Tensor

from fastcnn.functional import batch_norm_act

# ResNet-50's first and last stage at batch 16: beyond the last-level cache, and within it.
BATCH = 16
SHAPES = {
    f"{image.c}x{image.h}x{image.w}": image for image in (RESNET50[0], RESNET50[2], RESNET50[7])
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn: 4 x 51 MB and more, beyond any cache


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(
    compare: Any, shape: str, dtype: str, layout: torch.memory_format, residual: bool
) -> None:
    _, c, h, w = SHAPES[shape].sizes

    def image() -> Tensor:
        x = torch.randn(BATCH, c, h, w).to(DTYPES[dtype], memory_format=layout)
        return x.requires_grad_()

    layers = [
        Layer(
            image(), image() if residual else None, image().detach(),
            torch.ones(c, requires_grad=True), torch.zeros(c, requires_grad=True),
            torch.zeros(c), torch.ones(c),
        )
        for _ in range(INPUTS)
    ]  # fmt: skip

    def gradients(y: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        inputs = [t for t in (layer.x, layer.residual, layer.weight, layer.bias) if t is not None]
        return torch.autograd.grad(y, inputs, layer.dy)

    def ours(layer: Layer) -> tuple[Tensor, ...]:
        y = batch_norm_act(
            layer.x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
            training=True, residual=layer.residual, act="relu",
        )  # fmt: skip
        return gradients(y, layer)

    def eager(layer: Layer) -> tuple[Tensor, ...]:
        y = F.batch_norm(
            layer.x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True
        )
        if layer.residual is not None:
            y += layer.residual
        return gradients(F.relu_(y), layer)

    compare(ours, eager, layers, 10 if residual else 8, layers[0].dy)
