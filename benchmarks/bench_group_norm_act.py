"""group_norm_act, forward and backward, vs. F.group_norm + relu; LayerNorm2d vs. eager's.

Floor in passes over the tensor (docs/performance.md): forward 3, backward 5; for LayerNorm2d, whose
pixels stay in the cache, 2 and 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import beside
from support.shapes import GROUP_NORM, LAYOUTS, Image
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.functional import group_norm_act
from fastcnn.nn import LayerNorm2d

# A GPU's L2 of 60 MB takes eight times the batch: 51 to 268 MB in bf16.
BATCHES = on(1, 8)
LAYER_NORM = Image(BATCHES * 16, 192, 28, 28, "ConvNeXt-T, stage 2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn, together beyond the last-level cache
TYPES = {
    f"{dtype}-{layout}": (DTYPES[dtype], LAYOUTS[name])
    for dtype in DTYPES
    for layout, name in (("nchw", "nchw"), ("nhwc", "channels_last"))
}
CASES = {
    f"{image}-{groups}-{kind}": (image, groups, *TYPES[kind])
    for image, groups in ((one._replace(n=BATCHES * one.n), groups) for one, groups in GROUP_NORM)
    for kind in TYPES
}
GPU_CASES = [
    "128x256x56x56-32-bf16-nhwc",
    "128x256x56x56-32-bf16-nchw",
    "64x320x64x64-32-bf16-nhwc",
    "32x64x256x256-8-fp32-nhwc",
    "256x128x28x28-128-bf16-nchw",
]
LAYER_NORM_ON_GPU = ["bf16-nchw", "bf16-nhwc"]


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor


Forward = Callable[[Layer], Tensor]


def layers(image: Image, dtype: torch.dtype, layout: torch.memory_format) -> list[Layer]:
    n, c, h, w = tiny(*image.sizes)

    def tensor() -> Tensor:
        return torch.randn(n, c, h, w, device=DEVICE).to(dtype, memory_format=layout)

    return [
        Layer(
            tensor().requires_grad_(),
            tensor(),
            torch.ones(c, requires_grad=True, dtype=dtype, device=DEVICE),
            torch.zeros(c, requires_grad=True, dtype=dtype, device=DEVICE),
        )
        for _ in range(INPUTS)
    ]


def gradients(forward: Forward) -> Callable[[Layer], tuple[Tensor, ...]]:
    return lambda layer: torch.autograd.grad(
        forward(layer), [layer.x, layer.weight, layer.bias], layer.dy
    )


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_training(compare: Any, case: tuple[Image, int, torch.dtype, torch.memory_format]) -> None:
    image, groups, dtype, layout = case
    (groups,) = tiny(groups)

    def ours(layer: Layer) -> Tensor:
        return group_norm_act(layer.x, groups, layer.weight, layer.bias)

    def eager(layer: Layer) -> Tensor:
        return F.relu_(F.group_norm(layer.x, groups, layer.weight, layer.bias))

    inputs = layers(image, dtype, layout)
    others = {name: gradients(forward) for name, forward in beside(eager).items()}
    compare(gradients(ours), others, inputs, 8, inputs[0].dy)


@pytest.mark.parametrize("case", cases(TYPES, LAYER_NORM_ON_GPU))
def test_layer_norm_2d(compare: Any, case: tuple[torch.dtype, torch.memory_format]) -> None:
    # Eager is torchvision's class: permute, layer_norm, permute back.
    inputs = layers(LAYER_NORM, *case)
    c = inputs[0].x.shape[1]
    module = LayerNorm2d(c, dtype=case[0], device=DEVICE)

    def ours(layer: Layer) -> Tensor:
        return module(layer.x)

    def eager(layer: Layer) -> Tensor:
        y = F.layer_norm(layer.x.permute(0, 2, 3, 1), (c,), module.weight, module.bias, module.eps)
        return y.permute(0, 3, 1, 2)

    def results(forward: Forward) -> Callable[[Layer], tuple[Tensor, ...]]:
        return lambda layer: torch.autograd.grad(
            forward(layer), [layer.x, module.weight, module.bias], layer.dy
        )

    others = {name: results(forward) for name, forward in beside(eager).items()}
    compare(results(ours), others, inputs, 5, inputs[0].dy)
