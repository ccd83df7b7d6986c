"""inverted_residual: its values against float64, where it is taken, and its errors."""

from typing import Any, NamedTuple

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
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.convert.codegen import folded
from fastcnn.ops.conv2d import float32_products, inverted_residual
from fastcnn.ops.conv2d.float32_products import Least
from fastcnn.ops.conv2d.inverted_residual import Convolution, Depthwise, Pointwise, taken_together
from fastcnn.ops.conv2d.pointwise import panels

op = torch.ops.fastcnn.inverted_residual_fwd.default
LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MORE = [
    square((1, 72, 61, 59), 3, 1, 1, "several steps and parts of an image"),
    square((2, 112, 60, 31), 5, 2, 2, "several steps, downsampling: the ring turns"),
    square((1, 200, 9, 5), 3, 1, 1, "many channels"),
]


class Block(NamedTuple):
    """Numbers of a block: weights [o, i, 1, 1] and [c, 1, kh, kw], biases and activations."""

    weights: list[Tensor]  # of two or three convolutions
    biases: list[Tensor]
    acts: list[str]
    window: Window
    at: int  # which of them is the depthwise one

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        parts: list[Pointwise | Depthwise] = []
        for i, (w, b, act) in enumerate(zip(*self[:3], strict=True)):
            g = ConvGeometry(*self.window.geometry, len(w))
            depthwise = i == self.at
            parts.append(Depthwise(w, b, act, g) if depthwise else Pointwise(panels(w), b, act))
        return inverted_residual.inverted_residual(x, parts, residual)

    def exact(
        self, x: Tensor, residual: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return y in float64, and by how much it may be off before it is rounded."""
        y, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
        for i, (w, b, act) in enumerate(zip(*self[:3], strict=True)):
            depthwise, last = i == self.at, i + 1 == len(self.weights)
            how: Any = (*self.window.geometry, len(w)) if depthwise else ()
            z = F.conv2d(y, w.double(), b.double(), *how)
            terms = F.conv2d(y.abs() + error, w.double().abs(), b.double().abs(), *how)
            error = F.conv2d(error, w.double().abs(), None, *how)
            if last and residual is not None:
                z, terms = z + residual.double(), terms + residual.double().abs()
            # Off by its sum's roundings, times an activation's slope, and by the activation's own.
            error = STEEPEST * (error + walk(w[0].numel() + 2, dtype) * terms)
            error = error + walk(1, dtype) * (terms + ACTS[act](z).abs())
            y = ACTS[act](z)
        return y, error


def block_of(
    window: Window, dtype: torch.dtype, c_in: int | None, c_out: int | None, acts: str | list[str]
) -> tuple[Block, Tensor, Tensor | None]:
    """A block, x, and a residual where something projects; c_in, c_out: None: no such one."""
    g, (n, c, h, w) = seeded(sum(window.sizes) + 3 * (c_in or 0) + (c_out or 0)), window.sizes
    acc = torch.promote_types(dtype, torch.float32)
    sizes: list[tuple[int, ...]] = [(c, 1, *window.kernel)]
    if c_in is not None:
        sizes.insert(0, (c, c_in, 1, 1))
    if c_out is not None:
        sizes.append((c_out, c, 1, 1))
    weights = [torch.randn(size, generator=g).to(acc) for size in sizes]
    biases = [torch.randn(size[0], generator=g).to(acc) for size in sizes]
    acts = [acts] * len(sizes) if isinstance(acts, str) else acts
    x = torch.randn(n, c_in or c, h, w, generator=g).to(dtype).contiguous(memory_format=LAST)
    block = Block(weights, biases, acts, window, int(c_in is not None))
    if c_out is None:
        return block, x, None
    like = F.conv2d(x[:, :1].double(), weights[0][:1, :1, :1, :1].double()).float()
    like = F.conv2d(like, torch.zeros(1, 1, *window.kernel), None, *window.geometry)
    residual = torch.randn(n, c_out, *like.shape[2:], generator=g).to(dtype)
    return block, x, residual.contiguous(memory_format=LAST)


def check(
    window: Window,
    dtype: torch.dtype,
    c_in: int | None,
    c_out: int | None,
    acts: str | list[str],
    adds: bool = True,
) -> None:
    block, x, residual = block_of(window, dtype, c_in, c_out, acts)
    residual = residual if adds else None
    y = block.run(x, residual)
    assert y.is_contiguous(memory_format=LAST)
    assert y.dtype is dtype
    exact, error = block.exact(x, residual, dtype)
    assert_rounded("y", y, exact, error)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [*WINDOWS, *MORE], ids=str)
def test_against_float64(window: Window, dtype: torch.dtype) -> None:
    check(window, dtype, 1, None, "relu6")
    check(window, dtype, 19, 21, ["relu6", "relu6", "none"])
    check(window, dtype, None, 16, "relu", adds=False)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype) -> None:
    check(WINDOWS[7], dtype, 7, 5, [act, "relu", "none"])
    check(WINDOWS[8], dtype, 24, 40, ["none", act, act])
    check(MORE[0], dtype, 16, None, act)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """Which share an image in parts, whose rows begin anew in the ring."""
    threads, (block, x, residual) = (
        torch.get_num_threads(),
        block_of(MORE[0], dtype, 16, 24, "silu"),
    )
    try:
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(block.run(x, residual))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_channels_of_an_image(dtype: torch.dtype) -> None:
    """What torch.chunk gives is read where it is."""
    for c_in in (16, None):
        block, x, residual = block_of(MORE[0], dtype, c_in, 24, "relu")
        wide = torch.cat([x, x, x], 1).contiguous(memory_format=LAST)
        part = wide[:, x.shape[1] : 2 * x.shape[1]]
        assert torch.equal(block.run(part, residual), block.run(x, residual))


def arguments(c_in: int = 5, c_out: int = 6) -> dict[str, Any]:
    block, x, residual = block_of(WINDOWS[8], torch.float32, c_in, c_out, "relu6")
    (expand, weight, project), biases = block.weights, block.biases
    stride, padding, dilation = (list(pair) for pair in WINDOWS[8].geometry)
    first = {"expand": panels(expand), "expand_bias": biases[0], "expand_act": 1}
    window = {"stride": stride, "padding": padding, "dilation": dilation, "act": 2}
    last = {"project": panels(project), "c_out": c_out, "project_bias": biases[2]}
    between = {"weight": weight, "bias": biases[1], **window}
    return {"x": x, **first, **between, **last, "project_act": 0, "residual": residual}


def test_operator() -> None:
    good = arguments()
    opcheck(op, tuple(good.values()))
    none = {"expand_bias": None, "bias": None, "project_bias": None, "residual": None}
    opcheck(op, tuple((good | none).values()))
    zero = {k: torch.zeros_like(good[k]) for k in none}
    assert torch.equal(op(**good | none), op(**good | zero))
    assert op(**good | {"x": good["x"][:0], "residual": None}).shape == (0, 6, 8, 8)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(t) if isinstance(t, Tensor) else t for k, t in good.items()}
        y = op(**fake)
    assert y.stride() == op(**good).stride()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.contiguous(), "x: expected channels_last, or channels of a tensor in it"),
        ("x", lambda t: t[0], "x: expected 4 dimensions"),
        ("expand", lambda t: t[:1], r"expand: expected dense panels \[2, 5, 16\]"),
        ("bias", lambda t: t[:3], "bias: expected a dense vector of 24"),
        ("weight", lambda t: t.view(8, 3, 3, 3), r"weight: expected a dense tensor \[8, 1, kernel"),
        ("project", lambda t: t[:, :5], r"project: expected dense panels \[1, 24, 16\]"),
        ("c_out", lambda _: 0, "c_out: expected 1 to"),
        ("residual", lambda t: t.contiguous(), "residual: expected the channels_last layout"),
        ("project", lambda _: None, "residual: expected none without project"),
        ("expand_act", lambda _: 8, "act: expected 0 to 7, got 8"),
    ],
)
def test_errors_name_what_was_expected(name: str, change: Any, message: str) -> None:
    good = arguments()
    with pytest.raises(RuntimeError, match=message):
        op(**good | {name: change(good[name])})


def convolution(c_in: int, act: str = "silu", **how: Any) -> Convolution:
    return Convolution(torch.empty(8, c_in, 1, 1), ConvGeometry(**how), act)


WINDOW = Convolution(torch.empty(8, 1, 3, 3), ConvGeometry((2, 2), (1, 1), (1, 1), 8), "relu")


def image(c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, c, 6, 6, dtype=dtype).contiguous(memory_format=LAST)


def test_what_is_taken_with_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    first, last = convolution(16), convolution(8)
    assert taken_together(image(16), [first, WINDOW, last]) == 3
    assert taken_together(image(16), [first, WINDOW, WINDOW]) == 2
    assert taken_together(image(16), [first, WINDOW]) == 2
    assert taken_together(image(8), [WINDOW, last, last]) == 2
    assert taken_together(image(8), [WINDOW, WINDOW]) == 0
    assert taken_together(image(8), [WINDOW]) == 0
    assert taken_together(image(16), [first, last, WINDOW]) == 0
    assert taken_together(image(16), [first]) == 0
    assert taken_together(image(16, torch.float16), [first, WINDOW, last]) == 3
    assert taken_together(image(16, torch.bfloat16), [first, WINDOW, last]) == 0, "is fast there"
    assert taken_together(image(16, torch.float64), [first, WINDOW, last]) == 0
    assert taken_together(image(16).contiguous(), [first, WINDOW, last]) == 0
    assert taken_together(image(16)[:0], [first, WINDOW, last]) == 0
    strided = convolution(16, stride=(2, 2))
    assert taken_together(image(16), [strided, WINDOW, last]) == 0
    padded = convolution(8, padding=(1, 1))
    assert taken_together(image(16), [first, WINDOW, padded]) == 2
    grouped = WINDOW._replace(geometry=WINDOW.geometry._replace(groups=4))
    assert taken_together(image(16), [first, grouped, last]) == 0


def test_what_is_taken_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx512")
    monkeypatch.setattr(float32_products, "LEAST", {torch.float16: Least(0, 0)})
    for c, dtype, act, count in [
        (16, torch.float32, "relu6", 2),
        (17, torch.float32, "relu6", 0),
        (96, torch.float32, "silu", 2),
        (97, torch.float32, "silu", 0),
        (192, torch.float16, "relu", 2),
        (193, torch.float16, "relu", 0),
    ]:
        chain = [convolution(c, act), WINDOW, convolution(8)]
        assert taken_together(image(c, dtype), chain) == count
    assert taken_together(image(8), [WINDOW, convolution(8)]) == 0
    monkeypatch.setattr(_C, "cpu_capability", lambda: "baseline")
    assert taken_together(image(16), [convolution(16), WINDOW, convolution(8)]) == 0


class Residual(nn.Module):
    """An inverted residual block, or a depthwise separable convolution, with its addition."""

    def __init__(self, c: int, act: type[nn.Module], stride: int, expands: bool = True) -> None:
        super().__init__()
        torch.manual_seed(c)
        c_in = 6 if expands else c
        first = [nn.Conv2d(c_in, c, 1), nn.BatchNorm2d(c), act()] if expands else []
        self.layers = nn.Sequential(
            *first,
            nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), act(),
            nn.Conv2d(c, c_in, 1, bias=False), nn.BatchNorm2d(c_in),
        )  # fmt: skip
        self.adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


@pytest.mark.parametrize("expands", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU])
def test_a_converted_block_runs_it(
    act: type[nn.Module], stride: int, expands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose weights are read anew once they have changed."""
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return inverted_residual.inverted_residual(*given)

    monkeypatch.setattr(_C, "cpu_capability", lambda: "avx2")
    monkeypatch.setitem(folded.prepare_together.__globals__, "inverted_residual", counted)

    def block() -> nn.Module:
        model = Residual(24, act, stride, expands).to(memory_format=LAST)
        model(torch.randn(4, 6 if expands else 24, 9, 9))
        return model.eval()

    model, exact = block(), block().double()
    x = torch.randn(2, 6 if expands else 24, 9, 9).to(memory_format=LAST)
    convert(model, mode="infer")
    for change in range(2):
        with torch.no_grad():
            for times in range(1, 3):
                y = model(x)
                assert len(calls) == 2 * change + times
                assert len(calls[-1][1]) == 2 + expands
            assert_inferred(y, exact, x)
            for m in (model, exact):
                m.layers[-2].weight.mul_(2)
                m.layers[1].bias.add_(1)
