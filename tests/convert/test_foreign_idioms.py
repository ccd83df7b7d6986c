"""What models that fastcnn did not write taught convert, each in its smallest form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import cbr, net
from support.conversions import assert_converts, images, patterns
from torch import Tensor, nn

from fastcnn import convert


def test_an_addition_of_two_patterns_belongs_to_one() -> None:  # fastvit: conv-bn + bn(x)
    model = net(lambda m, x: m.bn2(x) + m.bn(m.conv(x)))
    assert assert_converts(model, images(3, 4, 6, 8)) == ["batch_norm", "conv-bn + residual"]


class _Position(nn.Module):
    """As edgenext's: called with a shape, it makes a tensor of that shape."""

    def forward(self, shape: Any) -> Tensor:
        return torch.zeros(shape) + 1


def test_a_shape_for_an_input_is_no_tensor() -> None:
    """A traced shape that calls itself a tensor would be read as one by torch.zeros."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.position = cbr(nn.ReLU()), _Position()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.position((x.shape[0], 1, 1, x.shape[3])).to(x.dtype)

    model = Model()
    assert_converts(model, images(3, 4, 6, 8))
    assert patterns(convert(model.body)) == ["conv-bn-relu"]


def test_a_concatenation_of_two_resizes_belongs_to_one() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first, second = (F.interpolate(y, scale_factor=2.0) for y in (x, m.conv(x)))
        return torch.cat([first, second], 1)

    model = net(run)
    assert assert_converts(model, images(3, 4, 6, 8)) == ["interpolate", "interpolate-cat"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(10, 12), (70, 90)])
@pytest.mark.filterwarnings("ignore:fastcnn.convert. an interpolate .* its factor keeps a side")
def test_a_factor_that_keeps_the_size(size: tuple[int, int], layout: torch.memory_format) -> None:
    # PyTorch copies small images, and shifts large ones by a pixel.
    factors = tuple(1 + 0.5 / side for side in size)
    model = nn.Sequential(nn.Upsample(scale_factor=factors), cbr(nn.ReLU()))
    x = images(2, 4, *size).contiguous(memory_format=layout)
    assert_converts(model, x)
