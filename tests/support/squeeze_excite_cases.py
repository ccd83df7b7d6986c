"""Squeeze-and-excitation: sizes at each edge of a kernel, and how near results must be.

The oracle is torch's own functions step by step in float64, whose gradients are autograd's.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import walk
from torch import Tensor

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
STEEPEST = 1.5  # of the activations' derivatives: hardswish at 3; none bends by more than 1
NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


class Sizes(NamedTuple):
    """Of an input, and the channels between fc1 and fc2, None without fc2; why it is there."""

    n: int
    c: int
    h: int
    w: int
    mid: int | None
    reason: str

    def __str__(self) -> str:
        return self.reason


SIZES = [
    Sizes(1, 1, 1, 1, 1, "one value of everything"),
    Sizes(3, 1, 9, 7, 2, "one channel: both layouts at once"),
    Sizes(2, 24, 1, 1, 6, "one pixel: the mean is the input"),
    Sizes(2, 3, 9, 11, 2, "fewer channels than any vector has"),
    Sizes(3, 40, 1, 2, 8, "two pixels, fewer than a wide row"),
    Sizes(8, 96, 7, 7, 4, "EfficientNet: whole vectors"),
    Sizes(2, 33, 14, 15, 9, "one channel and one column more than that"),
    Sizes(1, 8, 41, 43, 2, "several parts of a sample, and a rest"),
    Sizes(2, 257, 5, 3, 16, "more channels than pixels"),
    Sizes(1, 2, 140, 150, 1, "NCHW: more than one piece of a plane"),
    Sizes(17, 16, 6, 5, None, "one product (ESE); more samples than parts"),
]


class Case(NamedTuple):
    """The tensors of a call, y's gradient, and the activations."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    dy: Tensor
    act: str
    gate: str

    @property
    def parameters(self) -> dict[str, Tensor]:
        values = zip(NAMES, self[1:5], strict=True)
        return {name: t for name, t in values if t is not None}


def made(
    sizes: Sizes,
    dtype: torch.dtype,
    layout: str,
    act: str = "relu",
    gate: str = "sigmoid",
    bias: bool = True,
    param_dtype: torch.dtype | None = None,
) -> Case:
    """Random tensors; dy is 0 where a rounding decides about a hardsigmoid's factor."""
    n, c, h, w, mid, _ = sizes
    g, kind = seeded(n + c + h + w), param_dtype or dtype
    x = torch.randn(n, c, h, w, generator=g).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    x += 1  # a mean that is not nothing

    def fc(out: int, into: int) -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(out, into, 1, 1, generator=g) * into**-0.5
        added = torch.randn(out, generator=g) if bias else None
        return weight.to(kind), None if added is None else added.to(kind)

    fc1 = fc(mid or c, c)
    fc2 = (None, None) if mid is None else fc(c, mid)
    dy = torch.randn(n, c, h, w, generator=g).to(dtype)
    case = Case(x, *fc1, *fc2, dy, act, gate)
    return case._replace(dy=away_from_jumps(case))


def wide(case: Case) -> Case:
    return Case(*(t.detach().double() if isinstance(t, Tensor) else t for t in case))


def eager(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    z = F.conv2d(x.mean((2, 3), keepdim=True), fc1_weight, fc1_bias)
    if fc2_weight is not None:
        z = F.conv2d(ACTS[act](z), fc2_weight, fc2_bias)
    return x * GATES[gate](z)


def results(fn: Any, case: Case) -> dict[str, Tensor]:
    """y and the gradients of what there is."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in case[:5]]
    y = fn(*leaves, act=case.act, gate=case.gate)
    given = [(f"d{k}", t) for k, t in zip(("x", *NAMES), leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(y, [t for _, t in given], case.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip((name for name, _ in given), grads, strict=True))}


def exact(case: Case) -> dict[str, Tensor]:
    return results(eager, wide(case))


class Value(NamedTuple):
    """Exact values, and what they may be off by."""

    value: Tensor
    error: Tensor


def _product(a: Value, b: Value, dtype: torch.dtype) -> Value:
    """a @ b, with a sum's roundings over its terms."""
    size = a.value.abs() @ b.value.abs()
    through = a.error @ b.value.abs() + a.value.abs() @ b.error + a.error @ b.error
    return Value(a.value @ b.value, through + walk(a.value.shape[1], dtype) * size)


def _exactly(t: Tensor) -> Value:
    return Value(t, torch.zeros_like(t))


def _linear(t: Value, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Value:
    z, error = _product(t, _exactly(weight[:, :, 0, 0].t()), dtype)
    if bias is None:
        return Value(z, error)
    return Value(z + bias, error + walk(1, dtype) * (z.abs() + bias.abs()))


def steps(case: Case) -> dict[str, Value]:
    """What lies between x and y and, without dy's jumps, between dy and dx; each with its error.

    A function's value is off by at most its steepest derivative times what its argument is off by.
    """
    dtype, c = case.x.dtype, wide(case)
    pixels = c.x.shape[2:].numel()
    mean = Value(c.x.mean((2, 3)), walk(pixels, dtype) * c.x.abs().mean((2, 3)))
    found = {"mean": mean}
    into, fc, bias = mean, c.fc1_weight, c.fc1_bias
    if c.fc2_weight is not None:
        z1 = found["z1"] = _linear(mean, c.fc1_weight, c.fc1_bias, dtype)
        h = ACTS[c.act](z1.value)
        into = found["hidden"] = Value(h, STEEPEST * z1.error + walk(1, dtype) * h.abs())
        fc, bias = c.fc2_weight, c.fc2_bias
    z2 = found["z2"] = _linear(into, fc, bias, dtype)
    gate = GATES[c.gate](z2.value)
    found["gate"] = Value(gate, z2.error / 4 + walk(1, dtype) * gate)

    terms = c.dy * c.x
    d = Value(terms.sum((2, 3)), walk(pixels, dtype) * terms.abs().sum((2, 3)))
    bends = 0.1 if c.gate == "sigmoid" else 0.0
    d = found["dz2"] = _times_derivative(d, z2, GATES[c.gate], 0.25, bends, dtype)
    if c.fc2_weight is not None:
        d = _product(d, _exactly(c.fc2_weight[:, :, 0, 0]), dtype)
        d = found["dz1"] = _times_derivative(d, found["z1"], ACTS[c.act], STEEPEST, 1.0, dtype)
    found["dmean"] = _product(d, _exactly(c.fc1_weight[:, :, 0, 0]), dtype)
    return found


def away_from_jumps(case: Case) -> Tensor:
    """dy, 0 for channels whose hardsigmoid may be on either side of a bend.

    fc1's output reaches all channels: the cases' seeds keep it away from its activation's.
    """
    made = steps(case)
    if case.fc2_weight is not None:
        z1 = made["z1"]
        assert not near_nondifferentiable(z1.value, case.act, z1.error).any()
    if case.gate != "hardsigmoid":
        return case.dy
    near = (made["z2"].value.abs() - 3).abs() <= made["z2"].error
    return case.dy.masked_fill(near[:, :, None, None], 0)


def _times_derivative(
    d: Value, z: Value, fn: Any, steepest: float, bends: float, dtype: torch.dtype
) -> Value:
    """d * fn'(z)."""
    at = z.value.detach().requires_grad_()
    (slope,) = torch.autograd.grad(fn(at).sum(), at)
    slope_error = bends * z.error + walk(1, dtype) * steepest
    size = d.value.abs()
    error = d.error * (slope.abs() + slope_error) + size * slope_error
    return Value(d.value * slope, error + walk(1, dtype) * size * slope.abs())


def errors(case: Case) -> dict[str, Tensor]:
    """What each result may be off by before it is rounded into its dtype."""
    dtype, c, f = case.x.dtype, wide(case), steps(case)
    found = {"y": c.x.abs() * (f["gate"].error + walk(1, dtype))[:, :, None, None]}
    dmean, pixels = f["dmean"], c.x.shape[2:].numel()
    shift = (dmean.error + walk(1, dtype) * dmean.value.abs())[:, :, None, None] / pixels
    found["dx"] = c.dy.abs() * (f["gate"].error + walk(1, dtype))[:, :, None, None] + shift
    layers = [("fc1", "dz2", "mean")]
    if c.fc2_weight is not None:
        layers = [("fc2", "dz2", "hidden"), ("fc1", "dz1", "mean")]
    for name, dz, into in layers:
        d = f[dz]
        across = Value(d.value.t(), d.error.t())
        found[f"d{name}_weight"] = _product(across, f[into], dtype).error[:, :, None, None]
        size = d.value.abs().sum(0)
        found[f"d{name}_bias"] = d.error.sum(0) + walk(d.value.shape[0], dtype) * size
    return found
