"""linear_act, forward and training step, compared with F.linear and the activation.

The MLPs of ConvNeXt-T on images of 224^2 and VGG-16's first linear layer. Bound by the product, but
for few rows, which are bound by reading the weight. bf16: by autocast, weights in float32.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.functional import linear_act

BATCH, INPUTS = on(8, 128), 2


class Layer(NamedTuple):
    """Rows for an image, features and the activation."""

    rows: int
    c_in: int
    c_out: int
    act: Any

    def __str__(self) -> str:
        return f"{self.rows}x{self.c_in}-{self.c_out}-{self.act}"


LAYERS = [
    Layer(3136, 96, 384, "gelu"), Layer(3136, 384, 96, "none"), Layer(784, 192, 768, "gelu"),
    Layer(196, 384, 1536, "gelu"), Layer(49, 768, 3072, "gelu"), Layer(1, 25088, 4096, "relu"),
]  # fmt: skip
CASES = {
    f"{layer}-{'bf16' if half else 'fp32'}": (layer, half) for half in (True, False)
    for layer in LAYERS
    if half or layer.act != "none"
}  # fmt: skip
GPU_CASES = ["196x384-1536-gelu-bf16"]


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
@pytest.mark.parametrize("what", ["forward", "step"])
def test_linear_act(compare: Any, what: str, case: tuple[Layer, bool]) -> None:
    layer, half = case
    rows, c_in, c_out = tiny(BATCH * layer.rows, layer.c_in, layer.c_out)
    trains, dtype = what == "step", torch.bfloat16 if half else torch.float32
    weight, bias = torch.randn(c_out, c_in, device=DEVICE), torch.randn(c_out, device=DEVICE)
    parameters = [t.requires_grad_(trains) for t in (weight * c_in**-0.5, bias)]

    def call() -> tuple[Tensor, Tensor]:
        x, dy = (torch.randn(rows, c, device=DEVICE).to(dtype) for c in (c_in, c_out))
        return x.requires_grad_(trains), dy

    def run(fn: Any) -> Any:
        def once(one: tuple[Tensor, Tensor]) -> Tensor:
            x, dy = one
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                y: Tensor = fn(x, *parameters)
            return torch.autograd.grad(y, [x, *parameters], dy)[0] if trains else y

        return once

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if layer.act == "none" else getattr(F, layer.act)(y)

    def ours(*tensors: Tensor) -> Tensor:
        return linear_act(*tensors, act=layer.act)

    inputs = [call() for _ in range(INPUTS)]
    # x and y, and z that the activation reads and writes; backward likewise, and both gradients.
    compare(run(ours), run(by_torch), inputs, 6 if trains else 2, inputs[0][1])
