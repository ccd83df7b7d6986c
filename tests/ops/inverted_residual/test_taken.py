"""inverted_residual: which convolutions of a chain it takes, and a converted block that runs it."""

from typing import Any

import pytest
import torch
from support.conversions import assert_inferred
from torch import Tensor, nn

from fastcnn import _C, convert
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d import float32_products, inverted_residual
from fastcnn.ops.conv2d.float32_products import Least
from fastcnn.ops.conv2d.inverted_residual import Convolution, taken_together
from fastcnn.ops.conv_bn_act import together

LAST = torch.channels_last


def convolution(c_in: int, act: str = "silu", **how: Any) -> Convolution:
    return Convolution(torch.empty(8, c_in, 1, 1), ConvGeometry(**how), act)


WINDOW = Convolution(torch.empty(8, 1, 3, 3), ConvGeometry((2, 2), (1, 1), (1, 1), 8), "relu")


def image(c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, c, 6, 6, dtype=dtype).contiguous(memory_format=LAST)


def test_what_is_taken_with_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    first, last = convolution(16), convolution(8)
    assert taken_together(image(16), [first, WINDOW, last]) == 3
    assert taken_together(image(16), [first, WINDOW, WINDOW]) == 2
    assert taken_together(image(16), [first, WINDOW]) == 2
    assert taken_together(image(8), [WINDOW, last, last]) == 2
    assert taken_together(image(8), [WINDOW, WINDOW]) == 0
    assert taken_together(image(8), [WINDOW]) == 0
    assert taken_together(image(16), [first, last, WINDOW]) == 0
    assert taken_together(image(16), [first]) == 0
    assert taken_together(image(16, torch.float16), [first, WINDOW, last]) == 3
    assert taken_together(image(16, torch.bfloat16), [first, WINDOW, last]) == 0, "is fast there"
    assert taken_together(image(16, torch.float64), [first, WINDOW, last]) == 0
    assert taken_together(image(16).contiguous(), [first, WINDOW, last]) == 0
    assert taken_together(image(16)[:0], [first, WINDOW, last]) == 0
    strided = convolution(16, stride=(2, 2))
    assert taken_together(image(16), [strided, WINDOW, last]) == 0
    padded = convolution(8, padding=(1, 1))
    assert taken_together(image(16), [first, WINDOW, padded]) == 2
    grouped = WINDOW._replace(geometry=WINDOW.geometry._replace(groups=4))
    assert taken_together(image(16), [first, grouped, last]) == 0


def test_what_is_taken_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx512")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    for c, dtype, act, count in [
        (16, torch.float32, "relu6", 2),
        (17, torch.float32, "relu6", 0),
        (96, torch.float32, "silu", 2),
        (97, torch.float32, "silu", 0),
        (192, torch.float16, "relu", 2),
        (193, torch.float16, "relu", 0),
    ]:
        chain = [convolution(c, act), WINDOW, convolution(8)]
        assert taken_together(image(c, dtype), chain) == count
    assert taken_together(image(8), [WINDOW, convolution(8)]) == 0
    monkeypatch.setattr(_C, "cpu_capability", lambda: "baseline")
    assert taken_together(image(16), [convolution(16), WINDOW, convolution(8)]) == 0


class Residual(nn.Module):
    """An inverted residual block, or a depthwise separable convolution, with its addition."""

    def __init__(self, c: int, act: type[nn.Module], stride: int, expands: bool = True) -> None:
        super().__init__()
        torch.manual_seed(c)
        c_in = 6 if expands else c
        first = [nn.Conv2d(c_in, c, 1), nn.BatchNorm2d(c), act()] if expands else []
        self.layers = nn.Sequential(
            *first,
            nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), act(),
            nn.Conv2d(c, c_in, 1, bias=False), nn.BatchNorm2d(c_in),
        )  # fmt: skip
        self.adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


@pytest.mark.parametrize("expands", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU])
def test_a_converted_block_runs_it(
    act: type[nn.Module], stride: int, expands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose weights are read anew once they have changed."""
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return inverted_residual.inverted_residual(*given)

    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setitem(together.prepare_together.__globals__, "inverted_residual", counted)

    def block() -> nn.Module:
        model = Residual(24, act, stride, expands).to(memory_format=LAST)
        model(torch.randn(4, 6 if expands else 24, 9, 9))
        return model.eval()

    model, exact = block(), block().double()
    x = torch.randn(2, 6 if expands else 24, 9, 9).to(memory_format=LAST)
    convert(model, mode="infer")
    for change in range(2):
        with torch.no_grad():
            for times in range(1, 3):
                y = model(x)
                assert len(calls) == 2 * change + times
                assert len(calls[-1][1]) == 2 + expands
            assert_inferred(y, exact, x)
            for m in (model, exact):
                m.layers[-2].weight.mul_(2)
                m.layers[1].bias.add_(1)
