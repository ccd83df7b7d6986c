"""Triton's gradients of a convolution against float64; limits as in tests/tolerance.py."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import ACTS
from test_conv2d_triton import DTYPES, GEOMETRIES, SMALL, normalised
from tolerance import assert_as_exact_as_torch
from torch import Tensor
from triton_proof import DEVICE, channels_last

from fastcnn.triton.conv2d import Prologue
from fastcnn.triton.conv2d_bwd import (
    Activated,
    BatchNormGradient,
    conv2d_bwd_input,
    conv2d_bwd_weight,
)


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def numbers(channels: int) -> Tensor:
    return torch.randn(channels).to(DEVICE)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight, None, **geometry), [x, weight], dy)


def output_like(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    return channels_last(
        *F.conv2d(x.float(), weight.float(), None, **geometry).shape, dtype=x.dtype
    )


# Where dx meets taps by phases: strides beside dilations, windows narrower than the stride.
PHASES = {
    "1x1, stride 3": ((2, 16, 7, 8), (8, 16, 1, 1), {"stride": (3, 3)}),
    "window beside the stride": ((1, 16, 9, 7), (8, 16, 2, 3), {"stride": (3, 2)}),
    "stride and dilation with a divisor": (
        (1, 16, 11, 12), (8, 16, 3, 3), {"stride": (2, 4), "padding": (2, 1), "dilation": (4, 2)},
    ),
    "stride and dilation without": (
        (1, 16, 13, 12), (8, 16, 3, 3), {"stride": (3, 2), "padding": (3, 2), "dilation": (2, 3)},
    ),
    "rows that no window reads": ((1, 16, 8, 9), (8, 16, 3, 3), {"stride": (4, 4)}),
    "phases without a pixel": ((2, 16, 1, 2), (8, 16, 3, 3), {"stride": (2, 3), "padding": (1, 1)}),
}  # fmt: skip
ALL = {**GEOMETRIES, **PHASES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_geometries(name: str, dtype: torch.dtype) -> None:
    sizes, window, geometry = ALL[name]
    geometry = {"groups": 1, **geometry}
    x, weight = channels_last(*sizes, dtype=dtype), channels_last(*window, dtype=dtype)
    dy = output_like(x, weight, geometry)
    dx, sums = conv2d_bwd_input(dy, weight, sizes[2:], **geometry, tile=SMALL)
    dweight = conv2d_bwd_weight(dy, x, window[2:], **geometry, tile=SMALL)
    assert sums is None
    eager = gradients(dy, x, weight, geometry)
    exact = gradients(dy.double(), x.double(), weight.double(), geometry)
    for k, *three in zip(("dx", "dweight"), (dx, dweight), eager, exact, strict=True):
        assert three[0].dtype is dtype
        assert three[0].is_contiguous(memory_format=torch.channels_last)
        assert_as_exact_as_torch(k, *three)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_pixels(dtype: torch.dtype) -> None:
    # 70 pixels: more parts than sum, a part with no whole step, one part for all.
    geometry = {"padding": (1, 1)}
    x, weight = channels_last(2, 16, 7, 5, dtype=dtype), channels_last(8, 16, 3, 3, dtype=dtype)
    dy = output_like(x, weight, geometry)
    _, eager = gradients(dy, x, weight, geometry)
    _, exact = gradients(dy.double(), x.double(), weight.double(), geometry)
    for parts in (1, 2, 3, 100):
        dweight = conv2d_bwd_weight(dy, x, (3, 3), **geometry, tile=SMALL, parts=parts)
        assert_as_exact_as_torch(f"{parts} parts", dweight, eager, exact)


def batch_norm_gradient(dz: Tensor) -> tuple[BatchNormGradient, Tensor]:
    """One, and what it makes of dz in dz's type."""
    raw, four = channels_last(*dz.shape, dtype=dz.dtype), [numbers(dz.shape[1]) for _ in range(4)]
    slope, offset, factor, mean = (t[:, None, None] for t in four)
    g = slope * dz.float() + offset + factor * (raw.float() - mean)
    return BatchNormGradient(raw, *four), g.to(dz.dtype)


def behind(activated: Activated, dy: Tensor) -> Tensor:
    """dy taken back to the activation's input, in dy's type."""
    scale, bias = (t.to(dy.dtype)[:, None, None] for t in activated[1:3])
    z = (activated.raw.to(dy.dtype) * scale + bias).requires_grad_()
    return torch.autograd.grad(ACTS[activated.act](z), z, dy)[0]


HALF = [("relu", torch.bfloat16), ("gelu", torch.bfloat16), ("silu", torch.float16)]


@pytest.mark.parametrize(("act", "dtype"), [*((act, torch.float32) for act in ACTS), *HALF])
def test_batch_norms_on_both_sides(act: str, dtype: torch.dtype) -> None:
    # Padding: where no window reaches, g and a are 0, not the offset of a batch norm.
    strided = {"stride": (2, 2), "padding": (1, 1)}
    for geometry in ({"padding": (1, 1)}, strided, {**strided, "groups": 16}):
        x = channels_last(2, 16, 6, 5, dtype=dtype)
        weight = channels_last(32, 16 // geometry.get("groups", 1), 3, 3, dtype=dtype)
        prologue = Prologue(numbers(16), numbers(16), act)
        dz = output_like(x, weight, geometry)
        norm, g = batch_norm_gradient(dz)
        a = normalised(x, prologue)
        dweight = conv2d_bwd_weight(
            dz, x, (3, 3), **geometry, norm=norm, prologue=prologue, tile=SMALL, parts=2
        )
        add = channels_last(2, 16, 6, 5, dtype=dtype)
        mean, rstd = numbers(16), numbers(16).abs()
        activated = Activated(x, *prologue[:2], mean, rstd, act)
        d, sums = conv2d_bwd_input(
            dz, weight, (6, 5), **geometry, norm=norm, add=add, activated=activated, tile=SMALL
        )

        eager = gradients(g, a, weight, geometry)
        exact = gradients(g.double(), a.double(), weight.double(), geometry)
        assert_as_exact_as_torch("dweight", dweight, eager[1], exact[1])
        exact_d = behind(activated, exact[0] + add.double())
        assert_as_exact_as_torch(
            "d", d, behind(activated, eager[0].float() + add.float()).to(dtype), exact_d
        )
        # Sums of the rounded d, which is at hand: float32's roundings of 60 terms remain.
        xhat = (x.double() - mean[:, None, None]) * rstd[:, None, None]
        assert sums is not None
        for total, terms in ((sums.gradient, d.double()), (sums.times_xhat, d.double() * xhat)):
            limit = 60 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2, 3))
            assert ((total - terms.sum((0, 2, 3))).abs() <= limit).all()


def test_empty_batch() -> None:
    dy, weight, x = (
        channels_last(0, 8, 2, 2),
        channels_last(8, 16, 3, 3),
        channels_last(0, 16, 4, 4),
    )
    dx, _ = conv2d_bwd_input(dy, weight, (4, 4))
    assert dx.shape == x.shape
    assert torch.equal(conv2d_bwd_weight(dy, x, (3, 3)), torch.zeros_like(weight))


def test_the_same_bits_twice() -> None:
    x, weight = channels_last(2, 16, 6, 5), channels_last(16, 16, 3, 3)
    dy = output_like(x, weight, {})
    both = [
        (conv2d_bwd_input(dy, weight, (6, 5))[0], conv2d_bwd_weight(dy, x, (3, 3), parts=3))
        for _ in range(2)
    ]
    assert all(itertools.starmap(torch.equal, zip(*both, strict=True)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dy": channels_last(1, 8, 5, 4)}, r"dy: expected \(1, 8, 4, 4\)"),
        ({"dy": channels_last(1, 8, 4, 4).half()}, "dy and weight of one type"),
        ({"groups": 3}, "groups: expected a divisor of 48 and 8, got 3"),
        ({"add": channels_last(1, 4, 4, 4)}, r"add: expected \(1, 16, 4, 4\)"),
        ({"norm": BatchNormGradient(*[torch.ones(8)] * 5)}, r"norm.raw: expected"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    good = {"dy": channels_last(1, 8, 4, 4), "weight": channels_last(8, 16, 1, 1), "size": (4, 4)}
    with pytest.raises(ValueError, match=said):
        conv2d_bwd_input(**{**good, **options})
