"""pointwise_conv2d: its values against float64, where it is taken, and its errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.conversions import assert_inferred
from support.depthwise_conv2d_cases import STEEPEST
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastcnn import _C, convert
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.functional import conv_bn_act
from fastcnn.ops.conv2d import float32_products, onednn
from fastcnn.ops.conv2d.float32_products import Least
from fastcnn.ops.conv2d.pointwise import by_panels, panels, pointwise_conv2d
from fastcnn.ops.conv_bn_act import folded
from fastcnn.ops.conv_bn_act.step import ConvBnActStep

op = torch.ops.fastcnn.pointwise_conv2d_fwd.default
LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = [
    ((1, 1, 1, 1), 1, "one value of everything"),
    ((2, 3, 5, 4), 16, "one panel; rows that no tile comes out even with"),
    ((1, 7, 11, 1), 17, "a panel and a column"),
    ((2, 24, 7, 7), 40, "three vectors of AVX-512, whose last is half empty"),
    ((3, 19, 6, 9), 24, "three of AVX2"),
    ((1, 96, 13, 12), 80, "several tiles of columns and rows"),
    ((1, 5, 1, 3), 300, "few rows: tasks have a part of the columns each"),
    ((4, 700, 9, 8), 33, "several blocks of rows"),
    ((0, 5, 4, 4), 8, "no image"),
]


def tensors(sizes: tuple[int, ...], c_out: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and residual."""
    n, c_in, h, w = sizes
    g = seeded(sum(sizes) + c_out)
    acc = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, c_in, h, w, generator=g).to(dtype).contiguous(memory_format=LAST)
    residual = torch.randn(n, c_out, h, w, generator=g).to(dtype).contiguous(memory_format=LAST)
    weight, bias = torch.randn(c_out, c_in, 1, 1, generator=g), torch.randn(c_out, generator=g)
    return [x, weight.to(acc), bias.to(acc), residual]


def check(sizes: tuple[int, ...], c_out: int, dtype: torch.dtype, act: str, adds: bool) -> None:
    x, weight, bias, residual = tensors(sizes, c_out, dtype)
    added = residual if adds else None
    y = pointwise_conv2d(x, panels(weight), c_out, bias, act, added)
    assert y.is_contiguous(memory_format=LAST)
    assert y.dtype is dtype
    z = F.conv2d(x.double(), weight.double(), bias.double())
    terms = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs())
    if adds:
        z, terms = z + residual.double(), terms + residual.double().abs()
    # Off by its sum's roundings, times an activation's slope, and by the activation's own.
    error = STEEPEST * walk(x.shape[1] + 2, dtype) * terms
    exact = ACTS[act](z)
    assert_rounded("y", y, exact, error + walk(1, dtype) * (terms + exact.abs()))


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "c_out"), [s[:2] for s in SIZES], ids=[s[2] for s in SIZES])
def test_against_float64(sizes: tuple[int, ...], c_out: int, dtype: torch.dtype) -> None:
    check(sizes, c_out, dtype, "relu6", adds=True)
    check(sizes, c_out, dtype, "none", adds=False)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype) -> None:
    check((2, 9, 5, 5), 21, dtype, act, adds=True)


@pytest.mark.every_level
def test_not_a_number_comes_through() -> None:
    for act in ("none", "relu", "relu6"):
        x, weight, bias, _ = tensors((1, 3, 4, 4), 20, torch.float32)
        x[0, 1, 2, 3] = float("nan")
        y = pointwise_conv2d(x, panels(weight), 20, bias, act)
        assert y[0, :, 2, 3].isnan().all()
        assert not y[0, :, :2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_whatever_stands_beside(dtype: torch.dtype) -> None:
    """On any number of threads, of few rows and of many, and of some channels of an image."""
    x, weight, bias, _ = tensors((4, 700, 9, 8), 33, dtype)
    threads, w = torch.get_num_threads(), panels(weight)
    y = pointwise_conv2d(x, w, 33, bias, "silu")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(y, pointwise_conv2d(x, w, 33, bias, "silu"))
    finally:
        torch.set_num_threads(threads)
    row = x[1:2, :, 3:4].contiguous(memory_format=LAST)
    assert torch.equal(y[1:2, :, 3:4], pointwise_conv2d(row, w, 33, bias, "silu"))
    wide = torch.cat([x[:, :3], x], 1).contiguous(memory_format=LAST)
    assert torch.equal(y, pointwise_conv2d(wide[:, 3:], w, 33, bias, "silu"))


def arguments() -> dict[str, Any]:
    x, weight, bias, residual = tensors((2, 5, 4, 4), 20, torch.float32)
    more = {"bias": bias, "residual": residual, "act": 1}
    return {"x": x, "weight": panels(weight), "c_out": 20, **more}


def test_operator() -> None:
    good = arguments()
    opcheck(op, tuple(good.values()))
    none = {"bias": None, "residual": None}
    opcheck(op, tuple((good | none).values()))
    zero = {k: torch.zeros_like(good[k]) for k in none}
    assert torch.equal(op(**good | none), op(**good | zero))
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(t) if isinstance(t, Tensor) else t for k, t in good.items()}
        y = op(**fake)
    assert y.stride() == op(**good).stride()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.contiguous(), "x: expected channels_last, or channels of a tensor in it"),
        ("x", lambda t: t[0], "x: expected 4 dimensions"),
        ("weight", lambda t: t[:1], r"weight: expected dense panels \[2, 5, 16\]"),
        ("bias", lambda t: t[:3], "bias: expected a dense vector of 20"),
        ("residual", lambda t: t.contiguous(), "residual: expected the channels_last layout"),
        ("c_out", lambda _: 0, "c_out: expected 1 to"),
        ("act", lambda _: 8, "act: expected 0 to 7, got 8"),
    ],
)
def test_errors_name_what_was_expected(name: str, change: Any, message: str) -> None:
    good = arguments()
    with pytest.raises(RuntimeError, match=message):
        op(**good | {name: change(good[name])})


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sizes, types and instructions alone, whatever this processor has."""
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    plain, weight = ConvGeometry(), torch.empty(8, 4, 1, 1)

    def image(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, 4, 6, 6, dtype=dtype).contiguous(memory_format=LAST)

    assert by_panels(image(), weight, plain)
    assert by_panels(image(torch.float16), weight, plain)
    assert not by_panels(image(torch.bfloat16), weight, plain), "this processor is fast at it"
    assert not by_panels(image(torch.float64), weight, plain)
    assert not by_panels(image().contiguous(), weight, plain)
    assert not by_panels(image()[:0], weight, plain)
    assert not by_panels(image(), torch.empty(8, 4, 1, 2), plain)
    assert not by_panels(image(), weight, plain._replace(stride=(2, 2)))
    assert not by_panels(image(), weight, plain._replace(padding=(1, 0)))
    assert not by_panels(image(), torch.empty(8, 2, 1, 1), plain._replace(groups=2))
    for level in ("avx512", "baseline"):
        monkeypatch.setattr(_C, "cpu_capability", lambda level=level: level)
        assert not by_panels(image(), weight, plain), "nothing was measured there"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.Conv2d(20, 6, 1), nn.BatchNorm2d(6),
    ).to(memory_format=LAST)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_converted_networks_and_chains_run_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a weight that is kept and with one that is folded at each call: to the same bits."""
    calls = []

    def counted(*given: Any, **more: Any) -> Tensor:
        calls.append(given)
        return pointwise_conv2d(*given, **more)

    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    monkeypatch.setattr(folded, "pointwise_conv2d", counted)
    monkeypatch.setattr(onednn, "pointwise_conv2d", counted)
    model, exact = network().eval().to(dtype), network().eval().to(dtype).double()
    x = torch.randn(2, 6, 9, 9).to(dtype).to(memory_format=LAST)
    steps = [
        ConvBnActStep(
            conv.weight, conv.bias, running_mean=bn.running_mean, running_var=bn.running_var,
            bn_weight=bn.weight, bn_bias=bn.bias, act=act,
        )
        for conv, bn, act in ((model[0], model[1], "relu"), (model[3], model[4], "none"))
    ]  # fmt: skip
    with torch.no_grad():
        y = conv_bn_act(x, steps)
        assert len(calls) == 2
        convert(model, mode="infer")
        for times in (1, 2):
            z = model(x)
            assert len(calls) == 2 + 2 * times
        assert torch.equal(z, y)
        if dtype is torch.float32:
            assert_inferred(z, exact, x)
