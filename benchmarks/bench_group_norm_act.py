"""group_norm_act, forward and backward, beside F.group_norm + relu; LayerNorm2d beside eager's.

Floor in passes over the tensor (docs/performance.md): forward 3, backward 5; for LayerNorm2d, whose
pixels stay in the cache, 2 and 3.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from shapes import GROUP_NORM, LAYOUTS, Image
from torch import Tensor

from fastcnn.functional import group_norm_act
from fastcnn.nn import LayerNorm2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn, together beyond the last-level cache
IN_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=["nchw", "nhwc"])


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


def layers(image: Image, dtype: torch.dtype, layout: torch.memory_format) -> list[Layer]:
    def tensor() -> Tensor:
        return torch.randn(image.sizes).to(dtype, memory_format=layout)

    return [
        Layer(
            tensor().requires_grad_(), tensor(),
            torch.ones(image.c, requires_grad=True, dtype=dtype),
            torch.zeros(image.c, requires_grad=True, dtype=dtype),
        )
        for _ in range(INPUTS)
    ]  # fmt: skip


def gradients(y: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [layer.x, layer.weight, layer.bias], layer.dy)


@IN_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("image", "groups"), GROUP_NORM, ids=str)
def test_training(
    compare: Any, image: Image, groups: int, dtype: str, layout: torch.memory_format
) -> None:
    def ours(layer: Layer) -> tuple[Tensor, ...]:
        return gradients(group_norm_act(layer.x, groups, layer.weight, layer.bias), layer)

    def eager(layer: Layer) -> tuple[Tensor, ...]:
        y = F.group_norm(layer.x, groups, layer.weight, layer.bias)
        return gradients(F.relu_(y), layer)

    inputs = layers(image, DTYPES[dtype], layout)
    compare(ours, eager, inputs, 8, inputs[0].dy)


@IN_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_2d(compare: Any, dtype: str, layout: torch.memory_format) -> None:
    # ConvNeXt-T's second stage. Eager is torchvision's class: permute, layer_norm, permute back.
    image = Image(16, 192, 28, 28, "ConvNeXt-T, stage 2")
    module = LayerNorm2d(image.c, dtype=DTYPES[dtype])

    def results(y: Tensor, layer: Layer) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [layer.x, module.weight, module.bias], layer.dy)

    def ours(layer: Layer) -> tuple[Tensor, ...]:
        return results(module(layer.x), layer)

    def eager(layer: Layer) -> tuple[Tensor, ...]:
        y = torch.nn.LayerNorm.forward(module, layer.x.permute(0, 2, 3, 1))
        return results(y.permute(0, 3, 1, 2), layer)

    inputs = layers(image, DTYPES[dtype], layout)
    compare(ours, eager, inputs, 5, inputs[0].dy)
