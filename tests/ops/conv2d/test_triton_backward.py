"""Triton's gradients of a convolution against float64; limits as in support/tolerance.py."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.conv2d_triton_cases import (
    BEFORE_AND_BEHIND,
    GEOMETRIES,
    HALF,
    NAMES,
    SMALL,
    in_two_types,
    normalised,
)
from support.device import slow_unless, thinned
from support.norm_cases import STEEPEST, Normalised, norm_errors
from support.seeds import seed_all
from support.tolerance import assert_rounded, walk
from support.triton_interpreter import (
    ONE,
    Bounded,
    before_act,
    centre,
    channels_last,
    derivative,
    given,
    norm_of,
    per_channel,
    without_tf32,
)
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.common.conv_operands import Gradient, Input, Sums
from fastcnn.triton import conv2d_bwd
from fastcnn.triton.conv2d_bwd import conv2d_bwd_input, conv2d_bwd_weight
from fastcnn.triton.conv2d_fwd import conv2d
from fastcnn.triton.device import arch_of, matrix

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    seed_all(0)
    with without_tf32():
        yield


def gradients(
    g: Bounded, a: Bounded, weight: Tensor, geometry: dict[str, Any]
) -> tuple[Bounded, Bounded]:
    """conv2d's gradients of its input and its weight, summed in float32."""

    def backward(g: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        a, weight = (t.detach().requires_grad_() for t in (a, weight))
        return torch.autograd.grad(F.conv2d(a, weight, None, **geometry), [a, weight], g)

    weight = weight.double()
    exact = backward(g.exact, a.exact, weight)
    g_size, a_size = (t.exact.abs() + t.error for t in (g, a))
    dx_size, dw_size = backward(g_size, a_size, weight.abs())
    dx_error, _ = backward(g.error, a_size, weight.abs())
    # Of a product: an error times the other factor, and the other way round.
    dw_error = backward(g.error, a_size, weight)[1] + backward(g_size, a.error, weight)[1]
    dx_terms, dw_terms = (
        walk(n, torch.float32) for n in (weight[:, 0].numel(), g.exact[:, 0].numel())
    )
    return (
        Bounded(exact[0], dx_terms * dx_size + dx_error),
        Bounded(exact[1], dw_terms * dw_size + dw_error),
    )


def output_like(x: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    return channels_last(
        *F.conv2d(x.float(), weight.float(), None, **geometry).shape, dtype=x.dtype
    )


# Where dx meets taps by phases: strides beside dilations, windows narrower than the stride.
PHASES = {
    "1x1, stride 3": ((2, 16, 7, 8), (8, 16, 1, 1), {"stride": (3, 3)}),
    "window beside the stride": ((1, 16, 9, 7), (8, 16, 2, 3), {"stride": (3, 2)}),
    "stride and dilation with a divisor": (
        (1, 16, 11, 12),
        (8, 16, 3, 3),
        {"stride": (2, 4), "padding": (2, 1), "dilation": (4, 2)},
    ),
    "stride and dilation without": (
        (1, 16, 13, 12),
        (8, 16, 3, 3),
        {"stride": (3, 2), "padding": (3, 2), "dilation": (2, 3)},
    ),
    "rows that no window reads": ((1, 16, 8, 9), (8, 16, 3, 3), {"stride": (4, 4)}),
    "phases without a pixel": ((2, 16, 1, 2), (8, 16, 3, 3), {"stride": (2, 3), "padding": (1, 1)}),
}
ALL = {**GEOMETRIES, **PHASES}


@pytest.mark.parametrize(("name", "dtype"), in_two_types(ALL, 3))
def test_geometries(name: str, dtype: torch.dtype) -> None:
    sizes, window, geometry = ALL[name]
    geometry = {"groups": 1, **geometry}
    x, weight = channels_last(*sizes, dtype=dtype), channels_last(*window, dtype=dtype)
    dy = output_like(x, weight, geometry)
    d, how = Gradient(dy), ConvGeometry(**geometry)
    dx, sums = conv2d_bwd_input(d, weight, sizes[2:], how, tile=SMALL)
    dweight = conv2d_bwd_weight(d, Input(x), window[2:], how, tile=SMALL)
    assert sums is None
    bounded = gradients(given(dy), given(x), weight, geometry)
    for k, t, (exact, error) in zip(("dx", "dweight"), (dx, dweight), bounded, strict=True):
        assert t.dtype is dtype
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert_rounded(k, t, exact, error)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_parts_of_the_pixels(dtype: torch.dtype, size: int) -> None:
    # 70 pixels: more parts than sum, a part with no whole step, one part for all.
    geometry = {"padding": (size // 2, size // 2)}
    x = channels_last(2, 16, 7, 5, dtype=dtype)
    weight = channels_last(8, 16, size, size, dtype=dtype)
    dy = output_like(x, weight, geometry)
    _, (exact, error) = gradients(given(dy), given(x), weight, geometry)
    for parts in thinned((1, 2, 3, 100), 3):
        d, how = Gradient(dy), ConvGeometry(**geometry)
        dweight = conv2d_bwd_weight(d, Input(x), (size, size), how, SMALL, parts)
        assert_rounded(f"{parts} parts", dweight, exact, error)


def batch_norm_gradient(
    dy: Tensor, raw: Tensor, act: str, training: bool
) -> tuple[Gradient, Bounded]:
    """One, dy kept from where the activation's derivative jumps, and what is made of it.

    The exact one is autograd's, rounded as the convolution's factors are.
    """
    norm, dims = norm_of(dy.shape[1], dy.dtype), (0, 2, 3)
    assert norm.weight is not None
    assert norm.bias is not None
    t = raw.double()
    if training:
        var, mean = torch.var_mean(t, dims, correction=0)
        norm = norm._replace(mean=mean.float(), var=var.float())
    z = before_act(given(raw), norm)
    unsure = near_nondifferentiable(z.exact, act, z.error)
    dy = dy.clone().masked_fill_(unsure, 0)  # in place: its layout
    fixed = (None, None) if training else (norm.mean.double(), norm.var.double())
    affine = norm.weight.double(), norm.bias.double()

    def forward(t: Tensor) -> Tensor:
        return ACTS[act](F.batch_norm(t, *fixed, *affine, training, 0, norm.eps))

    leaf = t.clone().requires_grad_()
    (exact,) = torch.autograd.grad(forward(leaf), leaf, dy.double())
    (mean, std), weight, bias = centre(norm), *(per_channel(v, 0) for v in norm[2:4])
    errors = norm_errors(
        Normalised(
            t, mean, std, weight, bias, 0.0, dy.double(),
            lambda t: t.mean(dims, keepdim=True), m := t[:, 0].numel(),
            lambda t: t.sum(dims), m, training,
        ),
        torch.float32,
    )  # fmt: skip
    dz = dy.double() * derivative(z, act).exact
    xhat = (t - mean) / std
    sums = Sums(*(v.sum(dims).float() for v in (dz, dz * xhat))) if training else None
    g = Bounded(exact, errors["dx"]).read(dy.dtype)
    return Gradient(dy, raw, norm, ACT_NUMBER[act], sums), g


def check_batch_norms(
    a: Input, raw: Tensor, training: bool, geometry: dict[str, Any], side: int = 3
) -> None:
    """Both gradients of conv2d(act(norm(x))) with a batch norm and the same act behind it."""
    x, how = a.x, ConvGeometry(**geometry)
    dtype, size, (c_out, c_in) = x.dtype, x.shape[2:], (raw.shape[1], x.shape[1])
    weight = channels_last(c_out, c_in // geometry.get("groups", 1), side, side, dtype=dtype)
    dy, add = channels_last(*raw.shape, dtype=dtype), channels_last(*x.shape, dtype=dtype)
    behind, g = batch_norm_gradient(dy, raw, NAMES[a.act], training)
    dweight = conv2d_bwd_weight(behind, a, (side, side), how, SMALL, parts=2)
    d, sums = conv2d_bwd_input(behind, weight, size, how, add, a, SMALL)

    dx, dw = gradients(g, normalised(a), weight, geometry)
    assert_rounded("dweight", dweight, *dw)
    assert a.norm is not None
    before = before_act(given(x), a.norm)
    factor, total = derivative(before, NAMES[a.act]), dx.exact + add.double()
    off = dx.error + ONE * (dx.exact.abs() + add.double().abs())
    off = STEEPEST * off + total.abs() * factor.error
    assert_rounded("d", d, total * factor.exact, off)
    # Sums of the rounded d, which is at hand, and of as many terms.
    mean, std = centre(a.norm)
    xhat, xhat_error = (x.double() - mean) / std, ONE * (x.double().abs() + mean.abs()) / std
    assert sums is not None
    terms = walk(d[:, 0].numel(), torch.float32)
    for k, total, factor, factor_error in (
        ("sum", sums.gradient, torch.ones_like(xhat), torch.zeros_like(xhat)),
        ("sum of d * xhat", sums.times_xhat, xhat, xhat_error),
    ):
        each = d.double() * factor
        off = terms * each.abs() + d.double().abs() * factor_error
        assert_rounded(k, total, each.sum((0, 2, 3)), off.sum((0, 2, 3)))


STRIDED = {"stride": (2, 2), "padding": (1, 1)}


@pytest.mark.parametrize(
    ("act", "dtype"),
    slow_unless(
        lambda *how: how in (HALF[0], ("gelu", torch.float32)), thinned(BEFORE_AND_BEHIND, 4)
    ),
)
def test_batch_norms_on_both_sides(act: str, dtype: torch.dtype) -> None:
    # Padding: where no window reaches, g and a are 0, not the offset of a batch norm.
    for geometry, training in (
        ({"padding": (1, 1)}, True),
        (STRIDED, False),
        ({**STRIDED, "groups": 16}, True),
    ):
        x = channels_last(2, 16, 6, 5, dtype=dtype)
        raw = channels_last(2, 32, *((3, 3) if "stride" in geometry else (6, 5)), dtype=dtype)
        a = Input(x, norm_of(16, dtype), ACT_NUMBER[act])
        check_batch_norms(a, raw, training, geometry)


POINTWISE = [
    (24, 40, "", 6),
    (24, 37, "", 0),
    (19, 40, "", 0),
    (24, 40, "raw", 0),
    (24, 40, "x", 3),
]


def moved(t: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    return torch.empty(t.numel() + 1).to(t)[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize(
    ("sizes", "how"),
    slow_unless(
        lambda sizes, how: how[1] is torch.float32 or (sizes, how) == (POINTWISE[0], HALF[0]),
        thinned(itertools.product(POINTWISE, [("silu", torch.float32), *HALF]), 7),
    ),
)
def test_1x1_with_batch_norms(
    sizes: tuple[int, int, str, int], how: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 6 ragged tiles of dx, two a program in the interpreter. matrices: dy, its raw, and w or x.
    (c_in, c_out, aside, matrices), (act, dtype), read = sizes, how, []
    monkeypatch.setattr(conv2d_bwd, "matrix", lambda *a: (read.append(a), matrix(*a))[1])
    images = {k: channels_last(2, c, 7, 5, dtype=dtype) for k, c in (("x", c_in), ("raw", c_out))}
    x, raw = (moved(t) if k == aside else t for k, t in images.items())
    a = Input(x, norm_of(c_in, dtype), ACT_NUMBER[act])
    for training in (True, False):
        check_batch_norms(a, raw, training, {}, side=1)
    if dtype is torch.float32:  # not as TF32 here: dx's three are read by addresses
        matrices = max(matrices - 3, 0) if aside != "x" else 0
    assert len(read) == 2 * matrices * (arch_of(x) >= 90)


def test_1x1_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU factors keep 10 bits: they change by 2^-10 of themselves at most, cut off or rounded.
    # The interpreter rounds nothing.
    dy, weight = channels_last(2, 40, 7, 5), channels_last(40, 24, 1, 1)
    monkeypatch.setattr(conv2d_bwd, "allows_tf32", lambda: True)
    dx, _ = conv2d_bwd_input(Gradient(dy), weight, (7, 5), tile=SMALL)
    (exact, error), _ = gradients(given(dy), given(dx), weight, {})
    size, _ = gradients(given(dy.abs()), given(dx), weight.abs(), {})
    assert_rounded("dx", dx, exact, error + (2 * 2**-10 + 2**-20) * size.exact)


def test_nothing_cancels() -> None:
    # Mean 1e4, deviation 1, in float32. A batch's mean is 1e4 exactly, since the second image
    # mirrors the first: else its rounding, half an ulp of 1e4, would be seen in each xhat.
    half = (channels_last(1, 32, 6, 5) * 256).round() / 256
    raw = (torch.cat([half, -half]) + 1e4).contiguous(memory_format=torch.channels_last)
    norm = norm_of(16)
    x, norm = channels_last(2, 16, 6, 5) + 1e4, norm._replace(mean=norm.mean + 1e4)
    check_batch_norms(Input(x, norm, ACT_NUMBER["silu"]), raw, True, {"padding": (1, 1)})


@pytest.mark.parametrize("groups", [1, 16])
def test_raw_is_not_read_in_vain(groups: int) -> None:
    # Fixed statistics and no act: g = scale * dy, whatever came out of the convolution.
    geometry = ConvGeometry(padding=(1, 1), groups=groups)
    x, weight = channels_last(2, 16, 6, 5), channels_last(16, 16 // groups, 3, 3)
    dy, norm = channels_last(2, 16, 6, 5), norm_of(16)._replace(weight=None)
    made = []
    for raw in (torch.zeros_like(dy), torch.full_like(dy, float("inf"))):
        fixed = Gradient(dy, raw, norm)
        made.append(conv2d_bwd_input(fixed, weight, (6, 5), geometry, tile=SMALL)[0])
        made.append(conv2d_bwd_weight(fixed, Input(x), (3, 3), geometry, tile=SMALL))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    assert all(t.isfinite().all() for t in made)


def test_empty_batch() -> None:
    dy, weight, x = (channels_last(*s) for s in ((0, 8, 2, 2), (8, 16, 3, 3), (0, 16, 4, 4)))
    dx, _ = conv2d_bwd_input(Gradient(dy), weight, (4, 4))
    assert dx.shape == x.shape
    dweight = conv2d_bwd_weight(Gradient(dy), Input(x), (3, 3))
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_the_same_bits_twice() -> None:
    x, weight = channels_last(2, 16, 6, 5), channels_last(16, 16, 3, 3)
    d, a = Gradient(output_like(x, weight, {})), Input(x)
    both = [
        (conv2d_bwd_input(d, weight, (6, 5))[0], conv2d_bwd_weight(d, a, (3, 3), parts=3))
        for _ in range(2)
    ]
    assert all(itertools.starmap(torch.equal, zip(*both, strict=True)))


DY = channels_last(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d": Gradient(channels_last(1, 8, 5, 4))}, r"dy: expected \(1, 8, 4, 4\)"),
        ({"d": Gradient(channels_last(1, 8, 4, 4).half())}, "dy and weight of one type"),
        ({"geometry": ConvGeometry(groups=3)}, "groups: expected a divisor of 48 and 8, got 3"),
        ({"add": channels_last(1, 4, 4, 4)}, r"add: expected \(1, 16, 4, 4\)"),
        ({"d": Gradient(DY, torch.ones(8), norm_of(8))}, "out_raw: expected"),
        ({"d": Gradient(DY, DY, norm_of(4))}, r"out_mean: expected \[8\]"),
        ({"d": Gradient(DY, DY, norm_of(8), 8)}, "out_act: expected a number from 0"),
        (
            {"d": Gradient(DY, DY, norm_of(8), 0, Sums(*[torch.ones(9)] * 2))},
            r"sum: expected \[8\]",
        ),
        (
            {"before": Input(channels_last(1, 16, 4, 4), norm_of(16), 9)},
            "in_act: expected a number from 0 to 7, got 9",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    good = {"d": Gradient(DY), "weight": channels_last(8, 16, 1, 1), "size": (4, 4)}
    with pytest.raises(ValueError, match=said):
        conv2d_bwd_input(**{**good, **options})


def test_more_pixels_than_kernels_count_are_refused() -> None:
    # In int32: a kernel would find all of its pixels outside, and leave y as it was allocated.
    image = torch.empty(2, 1, 2**15, 2**15, device="meta", dtype=torch.half)
    weight = torch.empty(1, 1, 1, 1, device="meta", dtype=torch.half)
    size = (2**15, 2**15)
    for run in (
        lambda: conv2d(Input(image), weight),
        lambda: conv2d_bwd_input(Gradient(image), weight, size),
        lambda: conv2d_bwd_weight(Gradient(image), Input(image), (1, 1)),
    ):
        with pytest.raises(ValueError, match="expected at most 2147418112 pixels, got 2147483648"):
            run()
