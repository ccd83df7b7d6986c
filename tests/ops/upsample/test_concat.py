"""interpolate beside a skip, against torch.cat."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from support.upsample_cases import DTYPES, MODES, image
from torch import nn
from torch.autograd import gradcheck

from fastcnn import functional
from fastcnn.lab import saved_for_backward
from fastcnn.nn import Upsample


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [(3, 4), (16, 32), (1, 1), (0, 2), (5, 16)], ids=str)
def test_concat_is_torchs_cat(
    c: tuple[int, int], layout: str, dtype: torch.dtype, last: bool
) -> None:
    # Channels of no whole vector; of whole ones; one; none; and a skip that moves them off one.
    x = image((2, c[1], 5, 6), dtype, layout)
    skip = image((2, c[0], 10, 12), dtype, layout, 1)
    dy = image((2, sum(c), 10, 12), dtype, layout, 2)
    for how in MODES:
        for wanted in itertools.product([False, True], repeat=2):
            leaves = [t.clone().requires_grad_(w) for t, w in zip((x, skip), wanted, strict=True)]
            beside = {"concat": leaves[1], "concat_last": last}
            y = functional.interpolate(leaves[0], scale_factor=2, **how, **beside)
            alone = x.clone().requires_grad_()
            up = functional.interpolate(alone, scale_factor=2, **how)
            assert torch.equal(y, torch.cat([up, skip] if last else [skip, up], dim=1))
            if c != (1, 1):  # one channel each: both layouts at once, which count as NCHW
                assert y.is_contiguous(memory_format=LAYOUTS[layout])
            if any(wanted):
                y.backward(dy)
            dup, dskip = (dy[:, : c[1]], dy[:, c[1] :]) if last else (dy[:, c[0] :], dy[:, : c[0]])
            up.backward(dup.contiguous(memory_format=LAYOUTS[layout]))
            for leaf, want, expected in zip(leaves, wanted, (alone.grad, dskip), strict=True):
                assert (leaf.grad is not None) == want
                assert not want or torch.equal(leaf.grad, expected)


def test_the_gradient_of_concat_is_a_view() -> None:
    # Neither half of dy is copied: the kernel reads its own channels in place.
    skip = torch.ones(2, 3, 8, 8, requires_grad=True)
    y = functional.interpolate(torch.ones(2, 3, 4, 4), scale_factor=2, concat=skip)
    dy = torch.randn_like(y)
    (dskip,) = torch.autograd.grad(y, skip, dy)
    assert dskip.data_ptr() == dy.data_ptr()


def test_nothing_is_saved_for_backward() -> None:
    x, skip = (torch.ones(2, 3, s, s, requires_grad=True) for s in (4, 8))
    assert saved_for_backward(lambda: functional.interpolate(x, 8, concat=skip)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pixel_images_follow_their_strides_or_their_skip(layout: str) -> None:
    # Both layouts at once: pooled features of a channels_last network go on in channels_last.
    pooled = F.adaptive_avg_pool2d(image((2, 5, 4, 4), torch.float32, layout), 1)
    expected = F.interpolate(pooled, size=4)
    assert functional.interpolate(pooled, 4).stride() == expected.stride()
    skip = image((2, 3, 4, 4), torch.float32, layout)
    y = functional.interpolate(torch.ones(2, 5, 1, 1), 4, concat=skip)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    x, skip = image((1, 2, 3, 4), torch.float64, layout), image((1, 1, 7, 9), torch.float64, layout)
    for how in MODES:
        leaves = [t.clone().requires_grad_() for t in (x, skip)]
        assert gradcheck(
            lambda x, s, h=how: functional.interpolate(x, (7, 9), **h, concat=s), leaves
        )


def test_the_module_is_torchs() -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    for arguments in ({"scale_factor": 2}, {"size": [6, 7], "mode": "bilinear"}):
        ours, torchs = Upsample(**arguments), nn.Upsample(**arguments)
        assert isinstance(ours, nn.Upsample)
        assert repr(ours) == repr(torchs)
        assert_same(ours(x), torchs(x))
    skip = torch.randn(1, 3, 8, 10, dtype=torch.float64)
    assert torch.equal(Upsample(scale_factor=2)(x, skip)[:, :3], skip)
