"""upsample by 2, forward and backward, beside F.interpolate and, behind a skip, torch.cat.

Floor in passes over the output (docs/performance.md): forward 1/4 read and 1 written, backward 1
read and 1/4 written. A skip of as many channels as the output's is read and written once in forward
and never moved in backward. On a GPU the bilinear backward is measured alone as well, where
PyTorch's adds by atomics.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from candidates import beside
from support.shapes import LAYOUTS
from torch import Tensor
from where import DEVICE, ON_GPU, cases, on, tiny

from fastcnn.functional import interpolate

# The inputs of a U-Net's decoder: a wide and a narrow one. A GPU's are U-Net's widest and its
# second at 256x256 and batch 32: outputs of 537 and 134 MB in bf16.
SHAPES = on(
    {"64x56x56": (16, 64, 56, 56), "128x64x64": (8, 128, 64, 64)},
    {"128x128x128": (32, 128, 128, 128), "512x32x32": (32, 512, 32, 32)},
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn: 4 x 32 MB and more, beyond any cache
CASES = {
    f"{shape}-{mode}-{dtype}-{layout}": (shape, mode, dtype, LAYOUTS[name])
    for shape in SHAPES
    for mode in ("bilinear", "nearest", "bilinear-skip")
    for dtype in DTYPES
    for layout, name in (("nchw", "nchw"), ("nhwc", "channels_last"))
}
GPU_CASES = [
    "128x128x128-bilinear-bf16-nhwc",
    "128x128x128-bilinear-bf16-nchw",
    "128x128x128-nearest-bf16-nhwc",
    "128x128x128-bilinear-skip-bf16-nhwc",
    "512x32x32-bilinear-bf16-nhwc",
]
BACKWARD = {name: case for name, case in CASES.items() if case[1] == "bilinear"}
BACKWARD_ON_GPU = ["128x128x128-bilinear-bf16-nhwc", "128x128x128-bilinear-bf16-nchw"]

Case = tuple[str, str, str, torch.memory_format]
Tensors = tuple[Tensor, ...]  # x, a skip, and the gradient of y


def tensors(case: Case) -> Tensors:
    shape, mode, dtype, layout = case
    n, c, h, w = tiny(*SHAPES[shape])

    def image(channels: int, factor: int) -> Tensor:
        x = torch.randn(n, channels, factor * h, factor * w, device=DEVICE)
        return x.to(DTYPES[dtype], memory_format=layout)

    x = image(c, 1).requires_grad_()
    if mode.endswith("-skip"):
        return x, image(c, 2).requires_grad_(), image(2 * c, 2)
    return x, image(c, 2)


def gradients(forward: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: torch.autograd.grad(forward(t), t[:-1], t[-1])


def ways(mode: str) -> tuple[Callable[[Tensors], Tensor], ...]:
    """Return ours and eager's."""
    kind, _, skip = mode.partition("-")

    def ours(t: Tensors) -> Tensor:
        concat = t[1] if skip else None
        return interpolate(t[0], scale_factor=2, mode=kind, concat=concat)  # type: ignore[arg-type]

    def eager(t: Tensors) -> Tensor:
        y = F.interpolate(t[0], scale_factor=2, mode=kind)
        return torch.cat([t[1], y], dim=1) if skip else y

    return ours, eager


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_doubled(compare: Any, case: Case) -> None:
    inputs = [tensors(case) for _ in range(INPUTS)]
    ours, eager = ways(case[1])
    others = {name: gradients(forward) for name, forward in beside(eager).items()}
    y = inputs[0][-1][:, : SHAPES[case[0]][1]]  # without a skip's channels
    compare(gradients(ours), others, inputs, 4.5 if len(inputs[0]) == 3 else 2.5, y)


@pytest.mark.skipif(not ON_GPU, reason="backward alone is measured on a GPU")
@pytest.mark.parametrize("case", cases(BACKWARD, BACKWARD_ON_GPU))
def test_backward(compare: Any, case: Case) -> None:
    inputs = [tensors(case) for _ in range(INPUTS)]

    def backward(forward: Callable[[Tensors], Tensor]) -> Callable[[int], Tensors]:
        outputs = [forward(t) for t in inputs]
        return lambda i: torch.autograd.grad(
            outputs[i], inputs[i][0], inputs[i][-1], retain_graph=True
        )

    ours, eager = map(backward, ways("bilinear"))
    compare(ours, eager, range(INPUTS), 1.25, inputs[0][-1])
