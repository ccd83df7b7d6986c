"""conv2d_winograd: its values against the definition in float64, and where it is taken."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.common.activation import ACT_NUMBER, activation
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d import float32_products, winograd
from fastcnn.ops.conv2d.aten import convolve, convolve_bwd
from fastcnn.ops.conv2d.onednn import convolve_onednn
from fastcnn.ops.conv2d.winograd import (
    EACH_CALL,
    KEPT,
    STEP,
    by_winograd,
    conv2d_winograd,
    conv2d_winograd_bwd,
    gain,
    transformed,
)
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d

ops = torch.ops.fastcnn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last
G = ConvGeometry((1, 1), (1, 1), (1, 1), 1)

# The transforms as the literature has them, of the points 0, a, -a, b, -b and infinity: a
# polynomial's coefficients, and its values.
POINTS = torch.tensor([0, 3 / 4, -3 / 4, 4 / 3, -4 / 3], dtype=torch.float64)


def evaluated(count: int, scaled: bool) -> Tensor:
    """Return [6, count]: q^k, or that over the product of q - p, p the other points."""
    powers = POINTS[:, None] ** torch.arange(count)
    differences = POINTS[:, None] - POINTS + torch.eye(len(POINTS), dtype=torch.float64)
    rows = powers / differences.prod(1, keepdim=True) if scaled else powers
    return torch.cat([rows, torch.eye(count, dtype=torch.float64)[-1:]])


def of_image() -> Tensor:
    """Return B', [6, 6]: the coefficients of the product of x - p, p the other points."""
    rows = []
    for without in range(len(POINTS) + 1):
        row = torch.ones(1, dtype=torch.float64)
        for p in [p for i, p in enumerate(POINTS) if i != without]:
            row = F.pad(row, (1, 0)) - p * F.pad(row, (0, 1))
        rows.append(F.pad(row, (0, 6 - len(row))))
    return torch.stack(rows)


def by_definition(
    x: Tensor, weight: Tensor, padding: tuple[int, int], absolute: bool = False
) -> Tensor:
    """Return y by the transforms in float64; absolute: the sums of all terms' magnitudes."""
    signs = (lambda t: t.abs()) if absolute else (lambda t: t)
    b, g, a = map(signs, (of_image(), evaluated(3, True), evaluated(4, False)))
    tiles = tiled(signs(x), 6, padding)
    products = torch.einsum("ir,nctyrs,js,ik,ockl,jl->notyij", b, tiles, b, g, signs(weight), g)
    y = torch.einsum("ip,notyij,jq->notpyq", a, products, a)
    n, c, t, _, s, _ = y.shape
    h, w = (size + 2 * p - 2 for size, p in zip(x.shape[2:], padding, strict=True))
    return y.reshape(n, c, 4 * t, 4 * s)[..., :h, :w]


def weight_gradient(
    dy: Tensor, x: Tensor, padding: tuple[int, int], absolute: bool = False
) -> Tensor:
    """Return dw likewise."""
    signs = (lambda t: t.abs()) if absolute else (lambda t: t)
    b, d, s = map(signs, (of_image(), evaluated(4, True), evaluated(3, False)))
    return torch.einsum(
        "ir,nctyrs,js,ip,notypq,jq,ik,jl->ockl",
        b, tiled(signs(x), 6, padding), b, d, tiled(signs(dy), 4, (0, 0)), d, s, s,
    )  # fmt: skip


def tiled(x: Tensor, size: int, padding: tuple[int, int]) -> Tensor:
    """Return tiles 4 pixels apart, with zeros around, for as many as y needs."""
    pads = []
    for length, p in zip(reversed(x.shape[2:]), reversed(padding), strict=True):
        steps = -(-(length + 2 * p - (size - 4)) // 4)
        pads += [p, 4 * steps + (size - 4) - length - p]
    return F.pad(x, pads).unfold(2, size, 4).unfold(3, size, 4)


def drawn(
    dtype: torch.dtype, *sizes: tuple[int, ...], layout: torch.memory_format = LAST
) -> list[Tensor]:
    generator = seeded(0)
    found = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [t.to(memory_format=layout) if t.dim() == 4 else t for t in found]


def sum_limit(dtype: torch.dtype, terms: int, size: Tensor) -> Tensor:
    """Return the error of a sum of products, transformed before and after: 6 x 6 terms each."""
    return walk(terms + 3 * 36, dtype) * size


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "padding"),
    [
        ((2, 20, 9, 11, 24), (1, 1)),
        ((3, 5, 4, 8, 7), (0, 2)),  # fewer channels than lanes
        ((1, 33, 3, 3, 16), (0, 0)),  # a pixel
        ((2, 16, 1, 2, 17), (2, 1)),  # an image that is smaller than a tile
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_its_values(
    sizes: tuple[int, ...],
    padding: tuple[int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    n, c_in, h, w, c_out = sizes
    out = n, c_out, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    x, weight, bias, dy, added = drawn(
        dtype, (n, c_in, h, w), (c_out, c_in, 3, 3), (c_out,), out, out, layout=layout
    )
    xs, weights, dys = x.double(), weight.double(), dy.double()
    exact = F.conv2d(xs, weights, padding=padding)
    torch.testing.assert_close(by_definition(xs, weights, padding), exact)  # the reference itself

    y = conv2d_winograd(x, transformed(weight), None, padding)
    assert y.is_contiguous(memory_format=layout)
    size = by_definition(xs, weights, padding, absolute=True)
    assert_rounded("y", y, exact, sum_limit(dtype, c_in, size))

    # What follows in inference: the bias, the residual, the activation.
    y = conv2d_winograd(x, transformed(weight), bias, padding, ACT_NUMBER["leaky_relu"], added)
    wide = bias.double()[:, None, None]
    exact = activation(exact + wide + added.double(), "leaky_relu")
    size = size + wide.abs() + added.double().abs()
    assert_rounded("act(y)", y, exact, sum_limit(dtype, c_in + 2, size))

    dx, dweight = conv2d_winograd_bwd(dy, x, weight, padding, (True, True))
    exact_dx, exact_dweight, _ = torch.ops.aten.convolution_backward(
        dys, xs, weights, None, [1, 1], list(padding), [1, 1], False, [0, 0], 1, [True, True, False]
    )
    turned = weights.flip(2, 3).transpose(0, 1)
    back = 2 - padding[0], 2 - padding[1]
    assert dx is not None
    assert dweight is not None
    size = by_definition(dys, turned, back, absolute=True)
    assert_rounded("dx", dx, exact_dx, sum_limit(dtype, c_out, size))
    torch.testing.assert_close(weight_gradient(dys, xs, padding), exact_dweight)
    size = weight_gradient(dys, xs, padding, absolute=True)
    assert_rounded("dweight", dweight, exact_dweight, sum_limit(dtype, dy[:, 0].numel(), size))
    for t in (dx, dweight):
        assert t.is_contiguous(memory_format=layout)
    assert {dx.dtype, dweight.dtype} == {dtype}


def test_more_tiles_than_are_made_at_once() -> None:
    # 8 MiB of numbers, 144 bytes a channel of input and output each: 110 tiles here, of 121.
    x, weight, dy = drawn(torch.float32, (1, 512, 44, 44), (16, 512, 3, 3), (1, 16, 44, 44))
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    size = by_definition(x.double(), weight.double(), (1, 1), absolute=True)
    y = conv2d_winograd(x, transformed(weight), None, (1, 1))
    assert_rounded("y", y, exact, sum_limit(y.dtype, 512, size))
    _, dweight = conv2d_winograd_bwd(dy, x, weight, (1, 1), (False, True))
    assert dweight is not None
    exact = weight_gradient(dy.double(), x.double(), (1, 1))
    size = weight_gradient(dy.double(), x.double(), (1, 1), absolute=True)
    assert_rounded("dweight", dweight, exact, sum_limit(y.dtype, 44 * 44, size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    pytest.importorskip("expecttest")  # which torch's opcheck imports
    x, added = drawn(dtype, (2, 6, 5, 7), (2, 4, 5, 7))
    u, bias = torch.randn(36, 6, 4), torch.randn(4)
    opcheck(ops.conv2d_winograd_fwd, (x, u, bias, added, 1, 1, 4))
    opcheck(ops.conv2d_winograd_fwd, (x, u, None, None, 0, 2, 0))
    opcheck(ops.conv2d_winograd_bwd_weight, (added, x, 1, 1))


def test_no_images() -> None:
    x, dy = (torch.zeros(0, c, 5, 5) for c in (6, 4))
    y = ops.conv2d_winograd_fwd(x, torch.randn(36, 6, 4), None, None, 1, 1, 0)
    assert y.shape == dy.shape
    assert torch.equal(ops.conv2d_winograd_bwd_weight(dy, x, 1, 1), torch.zeros(36, 6, 4))


# Where it is taken


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take it wherever it can be."""
    monkeypatch.setattr(winograd, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(winograd, "_has_kernels", lambda: True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("on", "True"), ("off", "False"), ("no", "expected on or off, got 'no'")],
)
def test_it_can_be_turned_off(value: str, expected: str) -> None:
    code = "from fastcnn.ops.conv2d.winograd import _WANTED; print(_WANTED)"
    env = {**os.environ, "FASTCNN_WINOGRAD": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in (done.stdout if done.returncode == 0 else done.stderr)


@pytest.mark.usefixtures("always")
def test_what_can_be() -> None:
    x = torch.empty(2, 8, 6, 6).to(memory_format=LAST)
    weight = torch.empty(16, 8, 3, 3)
    assert by_winograd(x, weight, G, KEPT)
    assert by_winograd(x.contiguous(), weight, G, KEPT)
    for other in (x[..., ::2], x.double(), x.to("meta")):
        assert not by_winograd(other, weight, G, KEPT)
    for kernel in ((1, 1), (5, 5), (3, 1)):
        assert not by_winograd(x, torch.empty(16, 8, *kernel), G, KEPT)
    for change in (
        {"stride": (1, 2)}, {"dilation": (2, 1)}, {"padding": (1, 3)}, {"groups": 2},
    ):  # fmt: skip
        assert not by_winograd(x, weight, G._replace(**change), KEPT)


def test_half_types_where_products_are_in_float32(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.empty(2, 8, 6, 6).to(memory_format=LAST), torch.empty(16, 8, 3, 3)
    for dtype in (torch.bfloat16, torch.float16):
        for slow in (True, False):
            least = {dtype: float32_products.Least(0, 0)} if slow else {}
            monkeypatch.setattr(float32_products, "LEAST", least)
            assert by_winograd(x.to(dtype), weight, G, KEPT) is slow


def test_the_rule() -> None:
    # What decides: how many products are saved, transforms for each, and the weight's for a tile.
    assert gain(8, 56, 56, 256, 256, 1) > gain(8, 56, 56, 32, 32, 1) > gain(8, 56, 56, 8, 8, 1)
    assert gain(8, 56, 56, 64, 64, 0) > gain(8, 53, 53, 64, 64, 0)
    assert gain(8, 7, 7, 512, 512, 0) > gain(8, 7, 7, 512, 512, 1) > gain(1, 7, 7, 512, 512, 1)
    assert gain(8, 7, 7, 64, 64, 0) > gain(8, 7, 7, 64, 64, 0, transposes=True)
    assert gain(0, 7, 7, 512, 512, 0) == 0
    # And where that leads, as measured: 1.39 and more, and a loss.
    for n, size, c, transforms in ((8, 7, 512, KEPT), (8, 56, 32, STEP), (8, 14, 96, STEP)):
        assert gain(n, size, size, c, c, transforms) >= winograd.LEAST_GAIN
    for n, size, c, transforms in (
        (1, 7, 512, KEPT),
        (8, 7, 576, STEP),
        (8, 14, 48, STEP),
        (16, 7, 512, EACH_CALL),
    ):
        assert gain(n, size, size, c, c, transforms) < winograd.LEAST_GAIN


class Called(TorchDispatchMode):
    """Counts convolutions, by who makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in op.__name__:
            self.names.append(op.__name__.split(".")[0])
        return op(*args, **(kwargs or {}))


FWD, BWD_WEIGHT = "conv2d_winograd_fwd", "conv2d_winograd_bwd_weight"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("half", [True, False])
def test_a_chain_runs_by_it(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    least = {torch.bfloat16: float32_products.Least(0, 0)}
    monkeypatch.setattr(float32_products, "LEAST", least)
    conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=LAST)
    bn = BatchNormAct2d(16)
    x = torch.randn(2, 8, 6, 6).to(memory_format=LAST).requires_grad_()
    with Called() as called, torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = conv_bn_act(x, [(conv, bn)])
        assert called.names == [FWD]
        y.sum().backward()
        assert called.names == [FWD, FWD, BWD_WEIGHT]
        with torch.no_grad():
            conv_bn_act(x, [(conv, bn.eval())])
    assert called.names == [FWD, FWD, BWD_WEIGHT, FWD]
    assert y.dtype is (torch.bfloat16 if half else torch.float32)


@pytest.mark.usefixtures("always")
def test_autocast_casts_nothing_within() -> None:
    x, weight, dy = drawn(torch.float32, (2, 8, 6, 6), (16, 8, 3, 3), (2, 16, 6, 6))

    def results() -> list[Tensor | None]:
        return [convolve(x, weight, None, G), *convolve_bwd(dy, x, weight, None, G, (True,) * 3)]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        for t, expected in zip(results(), plain, strict=True):
            assert t is not None
            assert expected is not None
            assert torch.equal(t, expected)


@pytest.mark.usefixtures("always")
def test_kept_weights_give_the_same_bits() -> None:
    conv, bn = nn.Conv2d(8, 16, 3, padding=1), BatchNormAct2d(16).eval()
    folded = FoldedConv2d(conv, bn, "relu")
    x, added = drawn(torch.float32, (2, 8, 6, 6), (2, 16, 6, 6))
    with torch.no_grad(), Called() as called:
        for residual in (None, added):
            expected = conv_bn_act(x, [(conv, bn)], residual)
            assert torch.equal(folded(x, residual), expected)
    assert called.names == [FWD] * 4
    with torch.no_grad():
        assert len(folded._state._made) == 1  # type: ignore[union-attr]
        folded(torch.cat([x, x]))
        assert len(folded._state._made) == 1  # type: ignore[union-attr]


@pytest.mark.usefixtures("always")
def test_ensembles_of_weights_and_tensors_without_data() -> None:
    conv, bn = nn.Conv2d(8, 16, 3, padding=1), BatchNormAct2d(16).eval()
    x = torch.randn(2, 8, 6, 6)
    weights = torch.stack([conv.weight.detach(), 2 * conv.weight.detach()])

    def call(weight: Tensor) -> Tensor:
        return F.relu(convolve(x, weight, None, G))

    found = torch.func.vmap(call)(weights)
    for y, weight in zip(found, weights, strict=True):
        exact, size = (
            F.conv2d(a, b, padding=1)
            for a, b in ((x.double(), weight.double()), (x.double().abs(), weight.double().abs()))
        )
        assert_rounded("y", y, exact.relu(), walk(8 * 9, y.dtype) * size)
    for training in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training):
            assert conv_bn_act(torch.randn(2, 8, 6, 6), [(conv, bn)]).shape == (2, 16, 6, 6)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_one_image(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few values in float32 are PyTorch's product's, those of half types multiplied in it as well.
    monkeypatch.setattr(float32_products, "LEAST", {dtype: float32_products.Least(0, 0)})
    conv, bn = nn.Conv2d(64, 16, 1, dtype=dtype), BatchNormAct2d(16).eval()
    folded = FoldedConv2d(conv, bn, "relu")
    x, added = drawn(dtype, (1, 64, 7, 7), (1, 16, 7, 7))
    with torch.no_grad():
        for residual in (None, added):
            assert torch.equal(folded(x, residual), conv_bn_act(x, [(conv, bn)], residual))


@pytest.mark.usefixtures("always")
def test_a_residual_of_another_layout() -> None:
    x, weight, added = drawn(torch.float32, (2, 8, 6, 6), (16, 8, 3, 3), (2, 16, 6, 6))
    plain = convolve_onednn(x, weight, None, G, "relu", added, False)
    own = convolve_onednn(x, weight, None, G, "relu", added.contiguous(), True)
    nchw = convolve_onednn(x.contiguous(), weight, None, G, "relu", added.contiguous(), False)
    assert torch.equal(plain, nchw)
    assert torch.equal(plain, own)
    with pytest.raises(ValueError, match=r"residual: expected the input's memory format torch.ch"):
        convolve_onednn(x, weight, None, G, "relu", added.contiguous(), False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.usefixtures("always")
def test_it_compiles_with_sizes_that_change() -> None:
    conv, bn = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=LAST), BatchNormAct2d(16).eval()
    compiled = torch.compile(
        lambda x: conv_bn_act(x, [(conv, bn)]), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n, h in ((2, 6), (3, 9)):
        x = torch.randn(n, 8, h, 7).to(memory_format=LAST)
        assert torch.equal(compiled(x), conv_bn_act(x, [(conv, bn)]))
