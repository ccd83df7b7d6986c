"""Triton's convolution against float64: in the interpreter, or on a GPU where there is one.

Limits as in support/tolerance.py. Tiles are small, so that each case has several, whole ones and
ragged ones.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conv2d_triton_cases import (
    BEHIND,
    DTYPES,
    GEOMETRIES,
    HALF,
    NAMES,
    SMALL,
    in_two_types,
)
from support.device import DEVICE, slow_unless, thinned
from support.seeds import seed_all
from support.tolerance import assert_rounded, unit_roundoff, walk
from support.triton_interpreter import (
    Bounded,
    activated,
    before_act,
    channels_last,
    given,
    norm_of,
    without_tf32,
)
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.triton import conv2d_fwd
from fastcnn.triton.conv2d_fwd import Tile, conv2d
from fastcnn.triton.device import arch_of, matrix
from fastcnn.triton.support import allows_tf32
from fastcnn.triton.validate import checked_norm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    seed_all(0)
    with without_tf32():
        yield


def convolved(a: Bounded, weight: Tensor, *geometry: Any) -> Bounded:
    """conv2d(a, weight), summed in float32."""
    weight = weight.double()
    exact = F.conv2d(a.exact, weight, None, *geometry)
    terms = walk(weight[0].numel(), torch.float32)
    return Bounded(exact, F.conv2d(terms * a.exact.abs() + a.error, weight.abs(), None, *geometry))


def assert_statistics(found: Any, y: Bounded, dtype: torch.dtype) -> None:
    """Mean and biased variance of what a convolution gives, rounded to its type."""
    raw, error = (t.transpose(0, 1).flatten(1) for t in y)
    mean, pixels = raw.mean(1, keepdim=True), raw.shape[1]
    error = error + unit_roundoff(dtype) * raw.abs()  # half an ulp each, at most
    sums = walk(pixels, torch.float32)
    off = (error + sums * raw.abs()).mean(1)  # of the mean
    assert_rounded("mean", found.mean, mean[:, 0], off)
    # (raw - mean)^2, whose error is twice that of raw - mean, and what its square adds.
    apart, each = (raw - mean).abs(), error + off[:, None] + walk(1, torch.float32) * raw.abs()
    off = ((2 * apart + each) * each + sums * apart.square()).mean(1)
    assert_rounded("var", found.var, raw.var(1, correction=0), off)


def check(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    tile: Tile | None = SMALL,
    **parts: Any,
) -> None:
    geometry, behind = ConvGeometry(stride, padding, dilation, groups), Epilogue(**parts)
    y, statistics = conv2d(x, weight, geometry, behind, tile)
    product = convolved(given(x), weight, *geometry)
    if statistics is not None:
        assert_statistics(statistics, product, x.dtype)
        # They are of values rounded to y's type, and so is what stands behind.
        rounding = unit_roundoff(x.dtype) * (product.exact.abs() + product.error)
        product = Bounded(product.exact, product.error + rounding)
    z = before_act(product, behind.norm, behind.residual)
    assert y.dtype is x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounded("y", y, *activated(z, NAMES[behind.act]))


@pytest.mark.parametrize(("name", "dtype"), in_two_types(GEOMETRIES, 2))
def test_geometries(name: str, dtype: torch.dtype) -> None:
    x, weight, geometry = GEOMETRIES[name]
    check(channels_last(*x, dtype=dtype), channels_last(*weight, dtype=dtype), **geometry)


@pytest.mark.parametrize(
    ("act", "dtype"),
    slow_unless(lambda *how: how in (HALF[0], ("gelu", torch.float32)), thinned(BEHIND, 5)),
)
def test_activations(act: str, dtype: torch.dtype) -> None:
    for size in (1, 3):
        x, weight = (
            channels_last(2, 16, 4, 5, dtype=dtype),
            channels_last(8, 16, size, size, dtype=dtype),
        )
        check(x, weight, padding=(size // 2, size // 2), act=ACT_NUMBER[act])


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[1:])]
)
def test_everything_behind(dtype: torch.dtype) -> None:
    # Each in one of the types: they differ where values are read and written alone.
    x = channels_last(1, 16, 5, 7, dtype=dtype)
    norm = norm_of(24, dtype)
    affine: list[dict[str, Any]] = [
        {},
        {"norm": norm},
        {"norm": norm._replace(weight=None, bias=None)},
    ]
    residuals = [{}, {"residual": channels_last(1, 24, 5, 7, dtype=dtype)}]
    statistics = [{}, {"statistics": True}]
    every = list(itertools.product((1, 3), affine, residuals, statistics))
    for size, *three in thinned(every[DTYPES.index(dtype) :: len(DTYPES)], 3):
        behind = {k: v for options in three for k, v in options.items()}
        weight = channels_last(24, 16, size, size, dtype=dtype)
        check(x, weight, padding=(size // 2, size // 2), **behind)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_depthwise_with_everything_behind(dtype: torch.dtype) -> None:
    x, weight = channels_last(2, 20, 6, 5, dtype=dtype), channels_last(20, 1, 3, 3, dtype=dtype)
    behind = {
        "norm": norm_of(20)._replace(bias=None),
        "act": ACT_NUMBER["relu"],
        "statistics": True,
        "residual": channels_last(2, 20, 6, 5, dtype=dtype),
    }
    check(x, weight, padding=(1, 1), groups=20, **behind)
    check(x, weight, padding=(1, 1), groups=20, tile=None)


def test_a_norm_comes_whole() -> None:
    # Triton 3.6 compiles no tuple with a None in it; the interpreter does not mind.
    mean, var, *_ = norm_of(16)
    found = checked_norm(16, Norm(mean, var))
    assert found is not None
    assert torch.equal(found.weight, torch.ones(16, device=DEVICE))
    assert torch.equal(found.bias, torch.zeros(16, device=DEVICE))
    assert found[:2] == (mean, var)
    assert checked_norm(16, None) is None


def test_nothing_cancels() -> None:
    # Mean 1e4, deviation 1: x * scale + bias in float32 has an error of 6e-4, and E[x^2] - E[x]^2
    # one of 6 in a variance of 1.
    x, weight = channels_last(2, 16, 7, 7) + 1e4, torch.zeros(16, 16, 1, 1)
    weight[range(16), range(16)] = 1
    weight = weight.contiguous(memory_format=torch.channels_last).to(DEVICE)
    norm = norm_of(16)
    norm = norm._replace(mean=norm.mean + 1e4)
    check(x, weight, norm=norm)
    check(x, weight, statistics=True)


def test_many_tiles_are_merged() -> None:
    # 76 tiles of 16 pixels, more than merge_statistics takes at once, the last with one pixel.
    x, weight = channels_last(1, 16, 1, 75 * 16 + 1), channels_last(16, 16, 1, 1)
    check(x, weight, tile=SMALL._replace(m=16), statistics=True)


def test_the_same_bits_twice() -> None:
    x, weight = channels_last(2, 16, 6, 5), channels_last(16, 16, 3, 3)
    first, second = (
        conv2d(x, weight, behind=Epilogue(statistics=True), tile=SMALL) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))  # type: ignore[arg-type]


def test_default_tiles() -> None:
    for dtype, c in itertools.product(DTYPES, (3, 64, 100)):
        check(
            channels_last(1, c, 4, 4, dtype=dtype),
            channels_last(8, c, 1, 1, dtype=dtype),
            tile=None,
        )


def test_whether_tf32_is_allowed_is_read_where_it_is_set() -> None:
    # In the mixture that without_tf32() makes.
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        print(torch.backends.cudnn.allow_tf32)
    assert not allows_tf32()
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert allows_tf32()


def test_empty_batch() -> None:
    y, _ = conv2d(channels_last(0, 16, 4, 4), channels_last(8, 16, 3, 3))
    assert y.shape == (0, 8, 2, 2)


X, W = (1, 8, 4, 4), (8, 8, 1, 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: (channels_last(*X).double(), channels_last(*W).double()), "float16, bfloat16"),
        (lambda: (channels_last(*X), channels_last(*W).half()), "one type"),
        (lambda: (torch.randn(X), channels_last(*W)), "x: expected 4 dimensions in channels_last"),
        (lambda: (channels_last(*X)[0], channels_last(*W)), "x: expected 4 dimensions"),
        (lambda: (channels_last(*X), channels_last(8, 3, 1, 1)), "groups dividing c_out"),
        (
            lambda: (channels_last(*X), channels_last(7, 4, 1, 1), ConvGeometry(groups=2)),
            "groups",
        ),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    x, *others = make()
    with pytest.raises(ValueError, match=said):
        conv2d(x, *others)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"behind": Epilogue(Norm(*[torch.ones(7)] * 2))}, r"bn_mean: expected \[8\]"),
        (
            {"behind": Epilogue(norm_of(8)._replace(bias=torch.ones(16)[::2]))},
            r"bn_bias: expected \[8\], contiguous",
        ),
        (
            {"behind": Epilogue(norm_of(8)._replace(weight=torch.ones(8).double()))},
            "bn_weight: .* of torch.float64",
        ),
        ({"behind": Epilogue(residual=torch.randn(X))}, "residual: expected"),
        ({"behind": Epilogue(act=8)}, "conv2d: act: expected a number from 0 to 7, got 8"),
        ({"behind": Epilogue(act=-1)}, "conv2d: act: expected a number from 0 to 7, got -1"),
        ({"geometry": ConvGeometry(stride=(0, 1))}, "stride: expected"),
        ({"geometry": ConvGeometry(padding=(-1, 0))}, "padding: expected"),
        (
            {"geometry": ConvGeometry(dilation=(5, 5)), "weight": (8, 8, 2, 2)},
            "larger than the padded image",
        ),
    ],
)
def test_which_options_are_refused(options: dict[str, Any], said: str) -> None:
    weight = channels_last(*options.pop("weight", W))
    with pytest.raises(ValueError, match=said):
        conv2d(channels_last(*X), weight, **options)


def test_more_pixels_than_kernels_count_are_refused() -> None:
    # In int32: a kernel would find all of its pixels outside, and leave y as it was allocated.
    image = torch.empty(2, 1, 2**15, 2**15, device="meta", dtype=torch.half)
    weight = torch.empty(1, 1, 1, 1, device="meta", dtype=torch.half)
    with pytest.raises(ValueError, match="expected at most 2147418112 pixels, got 2147483648"):
        conv2d(image, weight)


POINTWISE = {  # whether the descriptors of x and weight are asked for
    "as it is": (24, 0, True),
    "rows that are no 16 bytes": (19, 0, False),
    "an address that is no 16 bytes": (24, 1, False),
}


@pytest.mark.parametrize("how", POINTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1x1_by_descriptors(how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # 6 ragged tiles, two a program in the interpreter.
    (c_in, moved, expected), read = POINTWISE[how], []
    monkeypatch.setattr(conv2d_fwd, "matrix", lambda *a: (read.append(a), matrix(*a))[1])
    x, weight = (
        channels_last(2, c_in, 7, 5, dtype=dtype),
        channels_last(40, c_in, 1, 1, dtype=dtype),
    )
    if moved:
        x = torch.empty(x.numel() + 1).to(x)[1:].as_strided(x.shape, x.stride()).copy_(x)
    check(x, weight, statistics=True)
    assert len(read) == 2 * (expected and arch_of(x) >= 90)
