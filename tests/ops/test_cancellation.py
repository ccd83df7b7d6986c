"""Data in which digits cancel: an outlier, a jump or a mean far from 0, where sums are long.

The variance is made around a moving center and the backward's sums are long; each case is one whose
wrong answer was seen: the variance off by up to 12 %, dbias by 5e-4, where PyTorch errs by 1e-6.
"""

import pytest
import torch
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import Tensor

from fastcnn.functional import batch_norm_act, group_norm_act
from fastcnn.nn import LayerNorm2d

EPS = torch.finfo(torch.float32).eps


def first_value(x: Tensor) -> Tensor:
    x[0, :, 0, 0] = 1e6
    return x


def first_image(x: Tensor) -> Tensor:
    x[0] = 1e6
    return x


def first_image_is_not_far(x: Tensor) -> Tensor:
    x[1:] += 1e4
    return x


def second_half(x: Tensor) -> Tensor:
    x[len(x) // 2 :] += 1e4
    return x


def every_other_image(x: Tensor) -> Tensor:
    x[::2] += 1e4
    return x


def trend(x: Tensor) -> Tensor:
    return x + torch.linspace(0, 1e4, len(x)).view(-1, 1, 1, 1)


CASES = [
    (first_value, (8192, 16, 1, 2)),  # 2 values make the first center of 8192
    (first_image, (2048, 16, 2, 2)),
    (first_image, (512, 64, 7, 7)),
    (first_image_is_not_far, (8192, 16, 1, 2)),
    (first_image_is_not_far, (8192, 1, 1, 2)),
    (second_half, (512, 8, 4, 4)),
    (every_other_image, (512, 8, 4, 4)),
    (trend, (512, 8, 4, 4)),
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("change", "sizes"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_variance_keeps_its_digits(
    change: object, sizes: tuple[int, ...], layout: torch.memory_format
) -> None:
    # Terms of float32 added up m times lose at most m / 2 of their last bits, and chunks are of at
    # most 8192 values: 8192 EPS. What is lost without the second look at a chunk is 1e-3 and more.
    x = torch.randn(sizes, generator=seeded(0))
    x = change(x).contiguous(memory_format=layout)  # type: ignore[operator]
    running_var = torch.zeros(sizes[1])
    batch_norm_act(x, torch.zeros(sizes[1]), running_var, training=True, momentum=1.0)
    exact = x.double().var((0, 2, 3))
    assert ((running_var - exact).abs() <= 8192 * EPS * exact).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "sizes", [(64, 4, 112, 112), (64, 16, 28, 28), (1024, 8, 7, 7), (32, 128, 64, 64)], ids=str
)
def test_long_sums_of_one_value(sizes: tuple[int, ...], layout: torch.memory_format) -> None:
    # Every rounding goes the same way, so that m terms lose m / 2 of their last bits. dx of a
    # constant dy is 0 but for roundings of dy itself.
    x = torch.randn(sizes, generator=seeded(0))
    x = x.contiguous(memory_format=layout).requires_grad_()
    bias = torch.zeros(sizes[1], requires_grad=True)
    y = batch_norm_act(x, None, None, None, bias, training=True, act="none")
    y.backward(torch.full_like(y, 0.1))
    exact = 0.1 * x.numel() / sizes[1]
    # NCHW: 8192 terms, in a vector of 8 or more. channels_last: 256 rows.
    terms = 1024 if layout is torch.contiguous_format else 256
    assert (bias.grad - exact).abs().max() <= terms / 2 * EPS * exact
    assert x.grad.abs().max() <= 512 * EPS


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sizes", [(16, 128, 96, 96), (1, 8, 512, 512)], ids=str)
def test_long_sums_of_one_value_in_group_norms(
    sizes: tuple[int, ...], layout: torch.memory_format
) -> None:
    # As above. Summed in a row, 9216 terms a column lost 1e-4.
    c = sizes[1]
    x = torch.randn(sizes, generator=seeded(0))
    x = x.contiguous(memory_format=layout).requires_grad_()
    exact = 0.1 * x.numel() / c
    pixels, bias = LayerNorm2d(c), torch.zeros(c, requires_grad=True)
    for y, own in ((group_norm_act(x, 4, None, bias, act="none"), bias), (pixels(x), pixels.bias)):
        dx, dbias = torch.autograd.grad(y, [x, own], torch.full_like(y, 0.1))
        assert (dbias - exact).abs().max() <= 512 * EPS * exact
        assert dx.abs().max() <= 512 * EPS
