"""inverted_residual: its values against float64, and its errors."""

import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.depthwise_conv2d_cases import STEEPEST, WINDOWS, Window, square
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d.inverted_residual import Depthwise, Pointwise, inverted_residual
from fastcnn.ops.conv2d.pointwise import panels, pointwise_conv2d

op = torch.ops.fastcnn.inverted_residual_fwd.default
LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MORE = [
    square((1, 72, 61, 59), 3, 1, 1, "several steps and parts of an image"),
    square((2, 112, 60, 31), 5, 2, 2, "several steps, downsampling: the ring turns"),
    square((1, 200, 9, 5), 3, 1, 1, "many channels"),
    Window((1, 130, 40, 31), (3, 3), (1, 1), (6, 6), (6, 6), "dilation, over several steps"),
    square((1, 130, 41, 31), 2, 5, 0, "a stride beyond the kernel: rows that nobody reads"),
    square((1, 130, 40, 31), 3, 1, 7, "padding beyond the kernel: steps that read no row"),
    Window((1, 8, 1, 20), (3, 1), (1, 1), (999, 0), (999, 1), "a kernel far larger than x"),
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
        return inverted_residual(x, parts, residual)

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


@pytest.mark.parametrize("seed", range(40))
def test_random_blocks(seed: int) -> None:
    draw = random.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    kernel, stride, dilation, padding = pair(1, 5), pair(1, 4), pair(1, 3), pair(0, 6)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    sides = [side + draw.randint(0, 30) for side in least]
    sizes = (draw.randint(1, 3), draw.randint(1, 150), *sides)
    window = Window(sizes, kernel, stride, padding, dilation, str(seed))
    c_in, c_out = draw.choice([(5, 17), (40, None), (None, 33), (1, 64)])
    acts = [draw.choice(list(ACTS)) for _ in range(1 + (c_in is not None) + (c_out is not None))]
    check(window, draw.choice(DTYPES), c_in, c_out, acts, adds=draw.random() < 0.5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("window", MORE, ids=str)
def test_the_same_bits_on_any_number_of_threads(window: Window, dtype: torch.dtype) -> None:
    """Which share an image in parts, whose rows begin anew in the ring."""
    threads = torch.get_num_threads()
    block, x, residual = block_of(window, dtype, 16, 24, "silu")
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
        ("project", lambda _: None, "project_bias: expected none without project"),
        ("expand_act", lambda _: 8, "expand_act: expected 0 to 7, got 8"),
        ("project_act", lambda _: -1, "project_act: expected 0 to 7, got -1"),
        ("act", lambda _: 8, "fwd: act: expected 0 to 7, got 8"),
    ],
)
def test_errors_name_what_was_expected(name: str, change: Any, message: str) -> None:
    good = arguments()
    with pytest.raises(RuntimeError, match=message):
        op(**good | {name: change(good[name])})


def test_a_residual_needs_something_that_projects() -> None:
    with pytest.raises(RuntimeError, match="residual: expected none without project"):
        op(**arguments() | {"project": None, "project_bias": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_of_its_three_convolutions(dtype: torch.dtype) -> None:
    block, x, residual = block_of(MORE[0], dtype, 16, 24, "relu6")
    (first, window, last), geometry = block.weights, [list(pair) for pair in MORE[0].geometry]
    act, biases = ACT_NUMBER["relu6"], block.biases
    z = pointwise_conv2d(x, panels(first), len(first), biases[0], "relu6")
    z = torch.ops.fastcnn.depthwise_conv2d_fwd(z, window, biases[1], *geometry, act)
    y = pointwise_conv2d(z, panels(last), len(last), biases[2], "relu6", residual)
    assert torch.equal(block.run(x, residual), y)
