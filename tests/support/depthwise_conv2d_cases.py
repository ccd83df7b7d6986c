"""Depthwise convolutions: windows at each edge of a kernel, and how near results must be.

The oracle is torch.nn.functional.conv2d in float64, whose gradients are autograd's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import margin, unit_roundoff, walk
from torch import Tensor

Pair = tuple[int, int]
STEEPEST = 1.5  # of the activations' derivatives: hardswish at 3; none bends by more than 1


class Window(NamedTuple):
    """Sizes of an input [n, c, h, w], a kernel and its geometry, and why the case is there."""

    sizes: tuple[int, int, int, int]
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    reason: str

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair]:
        return self.stride, self.padding, self.dilation

    def __str__(self) -> str:
        return self.reason


def square(
    sizes: tuple[int, int, int, int], kernel: int, stride: int, padding: int, why: str
) -> Window:
    return Window(sizes, (kernel, kernel), (stride, stride), (padding, padding), (1, 1), why)


WINDOWS = [
    square((1, 1, 1, 1), 1, 1, 0, "one value of everything"),
    square((2, 1, 9, 9), 3, 1, 1, "one channel: both layouts at once"),
    square((2, 24, 1, 1), 3, 1, 1, "one pixel, which meets the kernel's centre alone"),
    square((2, 24, 1, 1), 1, 1, 1, "one pixel that becomes nine: the layouts part"),
    square((2, 20, 3, 3), 3, 1, 0, "nine pixels that become one"),
    square((2, 3, 9, 11), 3, 1, 1, "fewer channels than any vector has"),
    square((2, 32, 14, 14), 3, 1, 1, "whole vectors of channels, whole tiles of columns"),
    square((2, 33, 14, 15), 3, 1, 1, "one channel and one column more than that"),
    square((1, 24, 16, 16), 3, 2, 1, "downsampling, even sizes"),
    square((3, 40, 15, 29), 3, 2, 1, "odd sizes: the tiles of dx begin at both parities"),
    square((2, 40, 14, 28), 5, 1, 2, "5x5"),
    square((2, 17, 13, 17), 5, 2, 2, "5x5, downsampling"),
    square((1, 96, 7, 7), 7, 1, 3, "7x7 over 7x7: each window is cut by a border"),
    square((2, 16, 21, 23), 7, 2, 3, "7x7, downsampling"),
    square((1, 130, 8, 8), 7, 1, 3, "7x7, two blocks of channels, the second of two"),
    square((2, 48, 9, 9), 2, 2, 0, "2x2, which has no loops of its own"),
    square((1, 16, 12, 12), 9, 1, 4, "9x9, likewise"),
    square((2, 24, 16, 17), 4, 4, 0, "as patches are embedded; a last column in no window"),
    square((1, 16, 33, 35), 3, 17, 1, "a long stride: pixels in no window"),
    square((2, 16, 5, 4), 3, 1, 4, "more padding than kernel: windows without an image"),
    square((2, 16, 5, 4), 5, 2, 7, "likewise in steps"),
    Window((2, 16, 9, 20), (1, 3), (1, 2), (0, 1), (1, 1), "unequal sides"),
    Window((2, 16, 20, 9), (5, 1), (2, 1), (2, 0), (1, 1), "unequal sides, the other way"),
    Window((2, 16, 9, 10), (3, 5), (2, 1), (1, 2), (1, 1), "stride in h alone"),
    Window((2, 24, 13, 15), (3, 3), (1, 1), (2, 2), (2, 2), "dilation"),
    Window((2, 24, 13, 15), (3, 3), (2, 2), (4, 3), (4, 3), "dilation in steps"),
    square((5, 64, 31, 30), 3, 1, 1, "several tasks of the weight's gradient"),
    square((1, 2, 140, 150), 3, 1, 1, "NCHW: several bands of a plane"),
    square((1, 2, 141, 149), 5, 2, 2, "NCHW: several bands in steps"),
    square((2, 40, 17, 19), 13, 1, 6, "13x13: 7, 5 and 1 taps of a row at a time"),
    square((1, 24, 20, 20), 10, 2, 4, "10x10, downsampling: 7 and 3 taps"),
]  # fmt: skip


class Case(NamedTuple):
    """The tensors of a call, y's gradient and the activation."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    geometry: tuple[Pair, Pair, Pair]
    act: str


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair) -> Tensor:
    return F.conv2d(x, weight, bias, *geometry, groups=x.shape[1])


def made(
    window: Window,
    dtype: torch.dtype,
    layout: str,
    act: str = "none",
    bias: bool = True,
    param_dtype: torch.dtype | None = None,
) -> Case:
    """Random tensors; dy is 0 where a rounding of z decides about its factor."""
    g, c = seeded(sum(window.sizes)), window.sizes[1]
    param_dtype = param_dtype or dtype
    x = torch.randn(window.sizes, generator=g).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(c, 1, *window.kernel, generator=g).to(param_dtype)
    added = torch.randn(c, generator=g).to(param_dtype) if bias else None
    z = convolved(*wide(x, weight, added), *window.geometry)
    dy = torch.randn(z.shape, generator=g).to(dtype)
    case = Case(x, weight, added, dy, window.geometry, act)
    return case._replace(dy=away_from_jumps(case))


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach().double() for t in tensors)


def away_from_jumps(case: Case) -> Tensor:
    z = convolved(*wide(case.x, case.weight, case.bias), *case.geometry)
    near = margin(case.x.dtype) * (1 + z.abs()) + _z_error(case)
    return case.dy.masked_fill(near_nondifferentiable(z, case.act, near), 0)


def results(fn: object, case: Case) -> dict[str, Tensor]:
    """y and the gradients of what has one."""
    x, weight, bias = (
        None if t is None else t.detach().requires_grad_() for t in (case.x, case.weight, case.bias)
    )
    y = fn(x, weight, bias, *case.geometry, act=case.act)  # type: ignore[operator]
    leaves = {"dx": x, "dweight": weight} | ({} if bias is None else {"dbias": bias})
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Pair, act: str = "none"
) -> Tensor:
    return ACTS[act](convolved(x, weight, bias, *geometry))


def exact(case: Case) -> dict[str, Tensor]:
    x, weight, bias = wide(case.x, case.weight, case.bias)
    assert x is not None
    assert weight is not None
    return results(eager, case._replace(x=x, weight=weight, bias=bias))


def _z_error(case: Case) -> Tensor:
    x, weight, bias = (None if t is None else t.abs() for t in wide(*case[:3]))
    assert weight is not None
    terms = weight[0].numel() + 1
    return walk(terms, case.x.dtype) * convolved(x, weight, bias, *case.geometry)


def errors(case: Case) -> dict[str, Tensor]:
    """What each result may be off by before it is rounded into its dtype.

    A sum is off by walk() of its terms' magnitudes; dz = dy * act'(z) by what z is off by, and by
    its own rounding into the images' dtype; both reach the gradients through |weight| and |x|.
    """
    x, weight, bias = (None if t is None else t.abs().requires_grad_() for t in wide(*case[:3]))
    assert x is not None
    assert weight is not None
    dtype, dy, z_error = case.x.dtype, case.dy.double().abs(), _z_error(case)
    z = convolved(x, weight, bias, *case.geometry)
    found = {"y": STEEPEST * z_error + (walk(1, dtype) * z.detach() if case.act != "none" else 0)}
    dz_error = torch.zeros_like(dy)
    if case.act != "none":
        dz_error = dy * (z_error + STEEPEST * (walk(1, dtype) + unit_roundoff(dtype)))
        dy = STEEPEST * dy
    leaves = {"dx": x, "dweight": weight} | ({} if bias is None else {"dbias": bias})
    values = max(z[:, 0].numel(), 1)
    for name, leaf in leaves.items():
        terms = weight[0].numel() if name == "dx" else values
        through = [
            torch.autograd.grad(z, leaf, of, retain_graph=True)[0]
            for of in (walk(terms, dtype) * dy, dz_error)
        ]
        found[name] = through[0] + through[1]
    return found
