"""upsample by 2, forward and backward, beside F.interpolate and, behind a skip, torch.cat.

Floor in passes over the output (docs/performance.md): forward 1/4 read and 1 written, backward 1
read and 1/4 written. A skip of as many channels as the output's is read and written once in forward
and never moved in backward.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes import LAYOUTS
from torch import Tensor

from fastcnn.functional import interpolate

# The inputs of a U-Net's decoder: a wide and a narrow one.
SHAPES = {"64x56x56": (16, 64, 56, 56), "128x64x64": (8, 128, 64, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn: 4 x 32 MB and more, beyond any cache


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bilinear-skip"])
@pytest.mark.parametrize("shape", SHAPES)
def test_doubled(
    compare: Any, shape: str, mode: str, dtype: str, layout: torch.memory_format
) -> None:
    n, c, h, w = SHAPES[shape]
    kind, _, skip = mode.partition("-")

    def image(channels: int, factor: int) -> Tensor:
        x = torch.randn(n, channels, factor * h, factor * w)
        return x.to(DTYPES[dtype], memory_format=layout)

    def one() -> tuple[Tensor, ...]:
        x = image(c, 1).requires_grad_()
        return (x, image(c, 2).requires_grad_(), image(2 * c, 2)) if skip else (x, image(c, 2))

    def ours(t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        concat = t[1] if skip else None
        y = interpolate(t[0], scale_factor=2, mode=kind, concat=concat)  # type: ignore[arg-type]
        return torch.autograd.grad(y, t[:-1], t[-1])

    def eager(t: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y = F.interpolate(t[0], scale_factor=2, mode=kind)
        if skip:
            y = torch.cat([t[1], y], dim=1)
        return torch.autograd.grad(y, t[:-1], t[-1])

    inputs = [one() for _ in range(INPUTS)]
    compare(ours, eager, inputs, 4.5 if skip else 2.5, image(c, 2))
