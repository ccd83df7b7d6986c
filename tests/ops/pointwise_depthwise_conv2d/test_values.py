"""pointwise_depthwise_conv2d: its values against float64, where it is taken, and its errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.conversions import assert_inferred
from support.depthwise_conv2d_cases import STEEPEST, WINDOWS, Window, square
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastcnn import _C, convert
from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.convert.codegen import folded
from fastcnn.ops.conv2d import float32_products, pointwise_depthwise
from fastcnn.ops.conv2d.float32_products import Least
from fastcnn.ops.conv2d.pointwise_depthwise import outruns_two

op = torch.ops.fastcnn.pointwise_depthwise_conv2d_fwd.default
LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MORE = [
    square((1, 72, 61, 59), 3, 1, 1, "several bands of rows, groups of unequal size"),
    square((2, 112, 60, 31), 5, 2, 2, "several bands in steps"),
    square((1, 200, 9, 5), 3, 1, 1, "several groups of vectors"),
]
POINTWISE, DEPTHWISE = ConvGeometry(), ConvGeometry((2, 2), (1, 1), (1, 1), 8)


def tensors(window: Window, dtype: torch.dtype, c_in: int) -> list[Tensor]:
    """x, and weight and bias of both convolutions."""
    g, (n, c, h, w) = seeded(sum(window.sizes) + c_in), window.sizes
    acc = torch.promote_types(dtype, torch.float32)
    sizes: list[tuple[int, ...]] = [(c_in, c), (c,), (c, 1, *window.kernel), (c,)]
    x = torch.randn(n, c_in, h, w, generator=g).to(dtype).contiguous(memory_format=LAST)
    return [x, *[torch.randn(size, generator=g).to(acc) for size in sizes]]


def of_both(
    window: Window, given: list[Tensor], first: Any = None, second: Any = None
) -> tuple[Tensor, Tensor]:
    """Return what both activations are of, in float64."""
    x, w, b, dw_w, dw_b = [t.double() for t in given]
    z = F.conv2d(x, w.t()[:, :, None, None], b)
    between = z if first is None else first(z)
    return z, F.conv2d(between, dw_w, dw_b, *window.geometry, groups=len(b))


def check(window: Window, dtype: torch.dtype, c_in: int, acts: tuple[str, str]) -> None:
    given, (act, dw_act) = tensors(window, dtype, c_in), acts
    x, w, b, dw_w, dw_b = given
    y = op(x, w, b, ACT_NUMBER[act], dw_w, dw_b, *window.geometry, ACT_NUMBER[dw_act])
    assert y.is_contiguous(memory_format=LAST)
    assert y.dtype is dtype
    z, dw_z = of_both(window, given, ACTS[act])
    positive = [t.abs() for t in given]
    terms, _ = of_both(window, positive)  # the first convolution's magnitudes
    # Off by its sum's roundings, times an activation's slope, and by the activation's own.
    error = STEEPEST * walk(c_in + 1, dtype) * terms + walk(1, dtype) * (terms + ACTS[act](z).abs())
    between = ACTS[act](z).abs() + error
    taps = dw_w[0].numel() + 1
    x_like = [between, *positive[3:]]

    def depthwise(image: Tensor, bias: Tensor | None) -> Tensor:
        weight = x_like[1].double()
        return F.conv2d(image, weight, bias, *window.geometry, groups=len(b))

    through = depthwise(error, None)
    magnitude = depthwise(between, x_like[2].double())
    off = STEEPEST * (through + walk(taps, dtype) * magnitude) + walk(1, dtype) * magnitude
    assert_rounded("y", y, ACTS[dw_act](dw_z), off)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [*WINDOWS, *MORE], ids=str)
def test_against_float64(window: Window, dtype: torch.dtype) -> None:
    for c_in in (1, 19):
        check(window, dtype, c_in, ("relu6", "none"))


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype) -> None:
    check(WINDOWS[7], dtype, 7, (act, "relu"))
    check(WINDOWS[8], dtype, 24, ("none", act))
    check(MORE[0], dtype, 16, (act, act))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    threads, given = torch.get_num_threads(), tensors(MORE[0], dtype, 16)
    x, w, b, dw_w, dw_b = given
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(op(x, w, b, 4, dw_w, dw_b, *MORE[0].geometry, 4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_operator() -> None:
    x, w, b, dw_w, dw_b = tensors(WINDOWS[8], torch.float32, 5)
    opcheck(op, (x, w, b, 1, dw_w, dw_b, *WINDOWS[8].geometry, 2))
    opcheck(op, (x, w, None, 1, dw_w, None, *WINDOWS[8].geometry, 2))
    without = [torch.zeros_like(t) for t in (b, dw_b)]
    args = w, 1, dw_w, WINDOWS[8].geometry
    with_zeros = op(x, args[0], without[0], 1, dw_w, without[1], *args[3], 2)
    assert torch.equal(op(x, w, None, 1, dw_w, None, *args[3], 2), with_zeros)
    assert op(x[:0], w, b, 1, dw_w, dw_b, *args[3], 2).shape == (0, 24, 8, 8)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, w, b, dw_w, dw_b)]
        y = op(fake[0], fake[1], fake[2], 1, fake[3], fake[4], *args[3], 2)
    assert y.stride() == op(x, w, b, 1, dw_w, dw_b, *args[3], 2).stride()


def test_errors_name_what_was_expected() -> None:
    x, w, b, dw_w, dw_b = tensors(WINDOWS[8], torch.float32, 5)
    how = (*WINDOWS[8].geometry, 2)
    with pytest.raises(RuntimeError, match="x: expected a dense tensor in channels_last"):
        op(x.contiguous(), w, b, 1, dw_w, dw_b, *how)
    with pytest.raises(RuntimeError, match=r"weight: expected a dense matrix \[5, 24\]"):
        op(x, w[:4], b, 1, dw_w, dw_b, *how)
    with pytest.raises(RuntimeError, match="dw_bias: expected a dense vector of 24"):
        op(x, w, b, 1, dw_w, dw_b[:3], *how)
    with pytest.raises(RuntimeError, match=r"weight: expected a dense tensor \[24, 1, kernel_h"):
        op(x, w, b, 1, dw_w.view(24, 3, 3), dw_b, *how)


def wanted(
    x: Tensor, act: str = "silu", g: ConvGeometry = POINTWISE, dw_g: ConvGeometry = DEPTHWISE
) -> bool:
    weight, dw_weight = torch.empty(8, x.shape[1], 1, 1), torch.empty(8, 1, 3, 3)
    return outruns_two(x, weight, g, act, dw_weight, dw_g)


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By sizes, types and instructions alone, whatever this processor has."""
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx512")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})

    def image(c: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, c, 6, 6, dtype=dtype).contiguous(memory_format=LAST)

    assert wanted(image(16), "relu6")
    assert not wanted(image(17), "relu6")
    assert wanted(image(96))
    assert not wanted(image(97))
    assert wanted(image(192, torch.float16))
    assert not wanted(image(193, torch.float16))
    assert not wanted(image(16, torch.bfloat16)), "no processor that is fast at it was measured"
    assert not wanted(image(16, torch.float64))
    assert not wanted(image(16).contiguous())
    assert not wanted(image(16)[:0])
    assert not wanted(image(16), g=POINTWISE._replace(stride=(2, 2)))
    assert not wanted(image(16), g=POINTWISE._replace(padding=(1, 1)))
    assert not wanted(image(16), dw_g=DEPTHWISE._replace(groups=4))
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    assert not wanted(image(16))


def block(c: int, act: type[nn.Module]) -> nn.Sequential:
    """An inverted residual block's layers, trained for a step."""
    torch.manual_seed(c)
    model = nn.Sequential(
        nn.Conv2d(6, c, 1), nn.BatchNorm2d(c), act(),
        nn.Conv2d(c, c, 3, 2, 1, groups=c, bias=False), nn.BatchNorm2d(c), act(),
        nn.Conv2d(c, 6, 1, bias=False), nn.BatchNorm2d(6),
    ).to(memory_format=LAST)  # fmt: skip
    model(torch.randn(4, 6, 9, 9))
    return model.eval()


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU])
def test_a_converted_block_runs_it(act: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weights are read anew once they have changed."""
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return pointwise_depthwise.pointwise_depthwise_conv2d(*given)

    conv_bn_act = folded.prepare_pair.__globals__
    monkeypatch.setitem(conv_bn_act, "outruns_two", lambda *_: True)
    monkeypatch.setitem(conv_bn_act, "pointwise_depthwise_conv2d", counted)
    model, x = block(24, act), torch.randn(2, 6, 9, 9).to(memory_format=LAST)
    exact = block(24, act).double()
    convert(model, mode="infer")
    for change in range(2):
        with torch.no_grad():
            for times in range(1, 3):
                y = model(x)
                assert len(calls) == 2 * change + times
            assert_inferred(y, exact, x)
            for m in (model, exact):
                m[3].weight.mul_(2)
                m[1].bias.add_(1)
