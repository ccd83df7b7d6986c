"""dropout, forward and backward, beside F.dropout and F.dropout2d (+ add).

Floor in passes over the tensor (docs/performance.md): forward 2 (read x, write y), backward 2 (read
dy, write dx), and one more for a residual, which is read; its gradient is dy itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import beside
from support.shapes import LAYOUTS, RESNET50
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.functional import dropout

# ResNet-50's stages at batch 16: whole blocks of 8 a plane (56x56), and planes that straddle them
# (14x14, 7x7); the last two lie within the cache. A GPU has batch 256: 411, 103 and 13 MB in bf16.
BATCH = on(16, 256)
SHAPES = {
    f"{image.c}x{image.h}x{image.w}": image for image in (RESNET50[2], RESNET50[6], RESNET50[7])
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn: 4 x 51 MB, beyond any cache
P = 0.1  # 1 - p is no multiple of 2^-16: the rare further draws are made
CASES = {
    f"{shape}-{dtype}-{layout}-{kind}": (shape, dtype, LAYOUTS[name], kind)
    for shape in SHAPES
    for dtype in DTYPES
    for layout, name in (("nchw", "nchw"), ("nhwc", "channels_last"))
    for kind in ("", "residual", "channel")
}
GPU_CASES = [
    "256x56x56-bf16-nhwc-",
    "256x56x56-bf16-nhwc-residual",
    "256x56x56-bf16-nhwc-channel",
    "256x56x56-bf16-nchw-",
    "256x56x56-fp32-nhwc-",
    "1024x14x14-bf16-nhwc-",
]


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_training(compare: Any, case: tuple[str, str, torch.memory_format, str]) -> None:
    shape, dtype, layout, kind = case
    sizes = tiny(BATCH, *SHAPES[shape].sizes[1:])
    residual, per_channel = kind == "residual", kind == "channel"

    def image() -> Tensor:
        x = torch.randn(sizes, device=DEVICE).to(DTYPES[dtype], memory_format=layout)
        return x.requires_grad_()

    layers = [
        Layer(image(), image() if residual else None, image().detach()) for _ in range(INPUTS)
    ]

    def ours(layer: Layer) -> Tensor:
        return dropout(layer.x, P, residual=layer.residual, per_channel=per_channel)

    def eager(layer: Layer) -> Tensor:
        y = F.dropout2d(layer.x, P) if per_channel else F.dropout(layer.x, P)
        if layer.residual is not None:
            y += layer.residual
        return y

    def gradients(forward: Callable[[Layer], Tensor]) -> Callable[[Layer], tuple[Tensor, ...]]:
        def run(layer: Layer) -> tuple[Tensor, ...]:
            inputs = [t for t in (layer.x, layer.residual) if t is not None]
            return torch.autograd.grad(forward(layer), inputs, layer.dy)

        return run

    others = {name: gradients(forward) for name, forward in beside(eager).items()}
    compare(gradients(ours), others, layers, 5 if residual else 4, layers[0].dy)
