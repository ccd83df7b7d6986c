"""Triton's gradients of a convolution against float64; limits as in tests/tolerance.py."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activations import ACTS
from card import thinned
from seeds import seed_all
from test_conv2d_triton import DTYPES, GEOMETRIES, NAMES, SMALL, normalised
from tolerance import assert_as_exact_as_torch
from torch import Tensor
from triton_proof import channels_last, norm_of, normed, without_tf32

from fastcnn.ops.activation import ACT_NUMBER
from fastcnn.ops.norm import Norm
from fastcnn.triton import conv2d_bwd
from fastcnn.triton.conv2d import Prologue, conv2d
from fastcnn.triton.conv2d_bwd import (
    Activated,
    BatchNormGradient,
    Sums,
    conv2d_bwd_input,
    conv2d_bwd_weight,
)
from fastcnn.triton.launch import arch_of, matrix

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    seed_all(0)
    with without_tf32():
        yield


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


@pytest.mark.parametrize(("name", "dtype"), thinned(itertools.product(ALL, DTYPES), 5))
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


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_pixels(dtype: torch.dtype, size: int) -> None:
    # 70 pixels: more parts than sum, a part with no whole step, one part for all.
    geometry = {"padding": (size // 2, size // 2)}
    x = channels_last(2, 16, 7, 5, dtype=dtype)
    weight = channels_last(8, 16, size, size, dtype=dtype)
    dy = output_like(x, weight, geometry)
    _, eager = gradients(dy, x, weight, geometry)
    _, exact = gradients(dy.double(), x.double(), weight.double(), geometry)
    for parts in thinned((1, 2, 3, 100), 3):
        dweight = conv2d_bwd_weight(dy, x, (size, size), **geometry, tile=SMALL, parts=parts)
        assert_as_exact_as_torch(f"{parts} parts", dweight, eager, exact)


def batch_norm_gradient(
    dy: Tensor, raw: Tensor, act: str, training: bool
) -> tuple[BatchNormGradient, Tensor, Tensor]:
    """One, and what it makes of dy: its formula in float32, in dy's type, and exact by autograd.

    In half types the exact one is rounded as the convolution's operands are.
    """
    norm = norm_of(dy.shape[1], dy.dtype)
    t = raw.double().requires_grad_()
    if training:
        var, mean = torch.var_mean(t.detach(), (0, 2, 3), correction=0)
        norm = norm._replace(mean=mean.float(), var=var.float())
    fixed = (None, None) if training else (norm.mean.double(), norm.var.double())
    assert norm.weight is not None
    assert norm.bias is not None
    z = F.batch_norm(t, *fixed, norm.weight.double(), norm.bias.double(), training, 0, norm.eps)
    [exact] = torch.autograd.grad(ACTS[act](z), t, dy.double(), retain_graph=True)

    def of_dz(t: Tensor, sums: Sums | None) -> tuple[Tensor, Tensor, Tensor]:
        bare = norm._replace(weight=torch.ones_like(norm.mean), bias=None)
        dz, xhat = behind(Activated(t, norm, ACT_NUMBER[act]), dy.to(t.dtype)), normed(t, bare)
        g = dz
        if sums is not None:
            first, second = (v.to(t.dtype)[:, None, None] / (t.numel() / t.shape[1]) for v in sums)
            g = dz - first - xhat * second
        scale = norm.weight.to(t.dtype) / (norm.var.to(t.dtype) + norm.eps).sqrt()
        return dz, xhat, scale[:, None, None] * g

    dz, xhat, _ = of_dz(raw.double(), None)
    sums = Sums(*(v.sum((0, 2, 3)).float() for v in (dz, dz * xhat))) if training else None
    eager = of_dz(raw.float(), sums)[2].to(dy.dtype)
    exact = exact if dy.dtype is torch.float32 else exact.to(dy.dtype).double()
    return BatchNormGradient(raw, norm, ACT_NUMBER[act], sums), eager, exact


def behind(activated: Activated, dy: Tensor) -> Tensor:
    """dy taken back to the activation's input, in dy's type."""
    z = normed(activated.raw.to(dy.dtype), activated.norm).requires_grad_()
    return torch.autograd.grad(ACTS[NAMES[activated.act]](z), z, dy)[0]


def check_batch_norms(
    x: Tensor, raw: Tensor, prologue: Prologue, training: bool, geometry: dict[str, Any],
    side: int = 3,
) -> None:  # fmt: skip
    """Both gradients of conv2d(prologue(x)) with a batch norm and the same act behind it."""
    dtype, size, (c_out, c_in) = x.dtype, x.shape[2:], (raw.shape[1], x.shape[1])
    weight = channels_last(c_out, c_in // geometry.get("groups", 1), side, side, dtype=dtype)
    dy, add = channels_last(*raw.shape, dtype=dtype), channels_last(*x.shape, dtype=dtype)
    norm, g, exact_g = batch_norm_gradient(dy, raw, NAMES[prologue.act], training)
    a, exact_a = normalised(x, prologue)
    dweight = conv2d_bwd_weight(
        dy, x, (side, side), **geometry, norm=norm, prologue=prologue, tile=SMALL, parts=2
    )
    activated = Activated(x, *prologue)
    d, sums = conv2d_bwd_input(
        dy, weight, size, **geometry, norm=norm, add=add, activated=activated, tile=SMALL
    )

    eager = gradients(g, a, weight, geometry)
    exact = gradients(exact_g, exact_a, weight.double(), geometry)
    assert_as_exact_as_torch("dweight", dweight, eager[1], exact[1])
    exact_d = behind(activated, exact[0] + add.double())
    eager_d = behind(activated, eager[0].float() + add.float()).to(dtype)
    assert_as_exact_as_torch("d", d, eager_d, exact_d)
    # Sums of the rounded d, which is at hand: float32's roundings of as many terms remain.
    bare = Norm(*prologue.norm[:2], eps=prologue.norm.eps)
    xhat = normed(x.double(), bare)
    assert sums is not None
    for total, terms in ((sums.gradient, d.double()), (sums.times_xhat, d.double() * xhat)):
        limit = (d.numel() // c_in) * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2, 3))
        assert ((total - terms.sum((0, 2, 3))).abs() <= limit).all()


HALF = [("relu", torch.bfloat16), ("gelu", torch.bfloat16), ("silu", torch.float16)]
STRIDED = {"stride": (2, 2), "padding": (1, 1)}


@pytest.mark.parametrize(
    ("act", "dtype"), thinned([*((act, torch.float32) for act in ACTS), *HALF], 4)
)
def test_batch_norms_on_both_sides(act: str, dtype: torch.dtype) -> None:
    # Padding: where no window reaches, g and a are 0, not the offset of a batch norm.
    for geometry, training in (
        ({"padding": (1, 1)}, True), (STRIDED, False), ({**STRIDED, "groups": 16}, True)
    ):  # fmt: skip
        x = channels_last(2, 16, 6, 5, dtype=dtype)
        raw = channels_last(2, 32, *((3, 3) if "stride" in geometry else (6, 5)), dtype=dtype)
        prologue = Prologue(norm_of(16, dtype), ACT_NUMBER[act])
        check_batch_norms(x, raw, prologue, training, geometry)


def moved(t: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    return torch.empty(t.numel() + 1).to(t)[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize(
    ("sizes", "how"),
    thinned(
        itertools.product(
            [(24, 40, "", 6), (24, 37, "", 0), (19, 40, "", 0), (24, 40, "raw", 0),
             (24, 40, "x", 3)],
            [("silu", torch.float32), *HALF],
        ), 7,
    ),
)  # fmt: skip
def test_1x1_with_batch_norms(
    sizes: tuple[int, int, str, int], how: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 6 ragged tiles of dx, two a program in the interpreter. matrices: dy, its raw, and w or x.
    (c_in, c_out, aside, matrices), (act, dtype), read = sizes, how, []
    monkeypatch.setattr(conv2d_bwd, "matrix", lambda *a: (read.append(a), matrix(*a))[1])
    images = {k: channels_last(2, c, 7, 5, dtype=dtype) for k, c in (("x", c_in), ("raw", c_out))}
    x, raw = (moved(t) if k == aside else t for k, t in images.items())
    prologue = Prologue(norm_of(c_in, dtype), ACT_NUMBER[act])
    for training in (True, False):
        check_batch_norms(x, raw, prologue, training, {}, side=1)
    if dtype is torch.float32:  # not as TF32 here: dx's three are read by addresses
        matrices = max(matrices - 3, 0) if aside != "x" else 0
    assert len(read) == 2 * matrices * (arch_of(x) >= 90)


def test_1x1_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a card factors keep 10 bits, 2^-11 off each at the most; the interpreter rounds nothing.
    dy, weight = channels_last(2, 40, 7, 5), channels_last(40, 24, 1, 1)
    by_addresses, _ = conv2d_bwd_input(dy, weight, (7, 5), tile=SMALL)
    monkeypatch.setattr(conv2d_bwd, "allows_tf32", lambda: True)
    by_descriptors, _ = conv2d_bwd_input(dy, weight, (7, 5), tile=SMALL)
    limit = 2**-9 * by_addresses.abs().max().item()
    torch.testing.assert_close(by_descriptors, by_addresses, rtol=0, atol=limit)


def test_nothing_cancels() -> None:
    # Mean 1e4, deviation 1, in float32. A batch's mean is 1e4 exactly, since the second image
    # mirrors the first: else its rounding, half an ulp of 1e4, would be seen in each xhat.
    half = (channels_last(1, 32, 6, 5) * 256).round() / 256
    raw = (torch.cat([half, -half]) + 1e4).contiguous(memory_format=torch.channels_last)
    norm = norm_of(16)
    prologue = Prologue(norm._replace(mean=norm.mean + 1e4), ACT_NUMBER["silu"])
    check_batch_norms(channels_last(2, 16, 6, 5) + 1e4, raw, prologue, True, {"padding": (1, 1)})


@pytest.mark.parametrize("groups", [1, 16])
def test_raw_is_not_read_in_vain(groups: int) -> None:
    # Fixed statistics and no act: g = scale * dy, whatever came out of the convolution.
    geometry = {"padding": (1, 1), "groups": groups}
    x, weight = channels_last(2, 16, 6, 5), channels_last(16, 16 // groups, 3, 3)
    dy, norm = channels_last(2, 16, 6, 5), norm_of(16)._replace(weight=None)
    made = []
    for raw in (torch.zeros_like(dy), torch.full_like(dy, float("inf"))):
        fixed = BatchNormGradient(raw, norm, 0, None)
        made.append(conv2d_bwd_input(dy, weight, (6, 5), **geometry, norm=fixed, tile=SMALL)[0])
        made.append(conv2d_bwd_weight(dy, x, (3, 3), **geometry, norm=fixed, tile=SMALL))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    assert all(t.isfinite().all() for t in made)


def test_empty_batch() -> None:
    dy, weight, x = (channels_last(*s) for s in ((0, 8, 2, 2), (8, 16, 3, 3), (0, 16, 4, 4)))
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


DY = channels_last(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dy": channels_last(1, 8, 5, 4)}, r"dy: expected \(1, 8, 4, 4\)"),
        ({"dy": channels_last(1, 8, 4, 4).half()}, "dy and weight of one type"),
        ({"groups": 3}, "groups: expected a divisor of 48 and 8, got 3"),
        ({"add": channels_last(1, 4, 4, 4)}, r"add: expected \(1, 16, 4, 4\)"),
        ({"norm": BatchNormGradient(torch.ones(8), norm_of(8), 0, None)}, "norm.raw: expected"),
        ({"norm": BatchNormGradient(DY, norm_of(4), 0, None)}, r"norm.norm.mean: expected \[8\]"),
        (
            {"norm": BatchNormGradient(DY, norm_of(8), 8, None)},
            "norm.act: expected a number from 0",
        ),
        (
            {"norm": BatchNormGradient(DY, norm_of(8), 0, Sums(*[torch.ones(9)] * 2))},
            r"norm.sums.gradient: expected \[8\]",
        ),
        (
            {"activated": Activated(channels_last(1, 16, 4, 4), norm_of(16), 9)},
            "activated.act: expected a number from 0 to 7, got 9",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    good = {"dy": channels_last(1, 8, 4, 4), "weight": channels_last(8, 16, 1, 1), "size": (4, 4)}
    with pytest.raises(ValueError, match=said):
        conv2d_bwd_input(**{**good, **options})


def test_more_pixels_than_kernels_count_are_refused() -> None:
    # In int32: a kernel would find all of its pixels outside, and leave y as it was allocated.
    image = torch.empty(2, 1, 2**15, 2**15, device="meta", dtype=torch.half)
    weight = torch.empty(1, 1, 1, 1, device="meta", dtype=torch.half)
    size = (2**15, 2**15)
    for run in (
        lambda: conv2d(image, weight),
        lambda: conv2d_bwd_input(image, weight, size),
        lambda: conv2d_bwd_weight(image, image, (1, 1)),
    ):
        with pytest.raises(ValueError, match="expected at most 2147418112 pixels, got 2147483648"):
            run()
