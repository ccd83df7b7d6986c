"""squeeze_excite, forward and training step, compared with PyTorch's own steps.

The blocks of EfficientNet-B0 on images of 224^2, and small ones, which are bound by what calls
cost. Floor in passes over the image, where a sample stays in a cache between its passes: forward 2,
backward 3.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.shapes import LAYOUTS
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.functional import squeeze_excite

BATCH, INPUTS = on(8, 128), 4


class Block(NamedTuple):
    """Channels, those between the products, and the image's side."""

    c: int
    mid: int
    side: int
    batch: int = BATCH

    def __str__(self) -> str:
        batch = "" if self.batch == BATCH else f"-n{self.batch}"
        return f"{self.c}-{self.mid}x{self.side}{batch}"


BLOCKS = [
    Block(32, 8, 112), Block(96, 4, 56), Block(144, 6, 56), Block(144, 6, 28), Block(240, 10, 28),
    Block(240, 10, 14), Block(480, 20, 14), Block(672, 28, 14), Block(672, 28, 7),
    Block(1152, 48, 7), Block(96, 4, 7, 1), Block(1152, 48, 7, 1), Block(64, 16, 1, 1),
]  # fmt: skip
TYPES = {
    "fp32-nhwc": (torch.float32, "channels_last"),
    "bf16-nhwc": (torch.bfloat16, "channels_last"),
    "fp32-nchw": (torch.float32, "nchw"),
}
CASES = {
    f"{block}-{kind}": (block, *TYPES[kind])
    for kind in TYPES
    for block in (BLOCKS if kind.endswith("nhwc") else BLOCKS[1::4])
}
GPU_CASES = ["96-4x56-bf16-nhwc", "480-20x14-bf16-nhwc", "1152-48x7-bf16-nhwc"]


def by_torch(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    """Return what torchvision's module computes."""
    z = F.silu(F.conv2d(F.adaptive_avg_pool2d(x, 1), fc1, bias1))
    return F.conv2d(z, fc2, bias2).sigmoid() * x


def ours(*tensors: Tensor) -> Tensor:
    """Return the same by one call."""
    return squeeze_excite(*tensors, act="silu")


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
@pytest.mark.parametrize("what", ["forward", "step"])
def test_squeeze_excite(compare: Any, what: str, case: tuple[Block, torch.dtype, str]) -> None:
    block, dtype, layout = case
    n, c, side = tiny(block.batch, block.c, block.side)
    trains = what == "step"

    def call() -> tuple[list[Tensor], Tensor]:
        x = torch.randn(n, c, side, side).to(DEVICE, dtype, memory_format=LAYOUTS[layout])
        sizes = ((block.mid, c, 1, 1), (block.mid,), (c, block.mid, 1, 1), (c,))
        tensors = [x, *(torch.randn(s, device=DEVICE).to(dtype) * c**-0.5 for s in sizes)]
        return [t.requires_grad_(trains) for t in tensors], torch.randn_like(x)

    def run(fn: Any) -> Any:
        def once(one: tuple[list[Tensor], Tensor]) -> Tensor:
            tensors, dy = one
            y: Tensor = fn(*tensors)
            return torch.autograd.grad(y, tensors, dy)[0] if trains else y

        return once

    inputs = [call() for _ in range(INPUTS)]
    compare(run(ours), run(by_torch), inputs, 5 if trains else 2, inputs[0][0][0].detach())
