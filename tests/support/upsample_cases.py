"""Calls of interpolate: what they get, what must come out, and how near.

Bilinear: against torch.nn.functional.interpolate in float64; gradients are autograd's. The nearest
modes move numbers as they are, so forward is compared bit for bit, with torch in float32; their
gradients with the reference's, since PyTorch's float64 has float64 coordinates and picks others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from support.norm_cases import CPU, Place
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, walk
from torch import Tensor

from fastcnn import functional
from fastcnn.reference.upsample import matrix as reference_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    {"mode": "bilinear", "align_corners": False},
    {"mode": "bilinear", "align_corners": True},
]


class Resize(NamedTuple):
    """Sizes of a batch, how it is resized, and why the case is there."""

    sizes: tuple[int, int, int, int]
    to: dict[str, Any]
    reason: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))}-{self.to}"


CASES = [
    Resize((2, 3, 5, 7), {"scale_factor": 2}, "doubled, an odd plane"),
    Resize((1, 64, 6, 6), {"scale_factor": 2}, "channels_last: whole vectors of channels"),
    Resize((2, 21, 4, 5), {"scale_factor": 4}, "a segmentation head: channels in a short vector"),
    Resize((1, 5, 40, 37), {"scale_factor": 2}, "rows of several vectors, with a rest"),
    Resize((1, 2, 3, 900), {"scale_factor": (1, 2)}, "columns in several tiles"),
    Resize((2, 4, 5, 7), {"size": (5, 7)}, "the identity"),
    Resize((2, 4, 5, 7), {"size": (5, 14)}, "the identity in one axis"),
    Resize((2, 3, 1, 1), {"size": (4, 6)}, "1-pixel input: pooled features, spread out again"),
    Resize((2, 3, 1, 1), {"size": 1}, "1 pixel to 1 pixel"),
    Resize((2, 3, 6, 5), {"size": 1}, "1-pixel output: align_corners would divide by 0"),
    Resize((2, 3, 6, 5), {"size": (1, 9)}, "one row"),
    Resize((1, 3, 10, 11), {"scale_factor": 2.3}, "coordinates by the factor, not the ratio"),
    Resize((1, 3, 10, 11), {"scale_factor": 2.3, "recompute_scale_factor": True}, "by the ratio"),
    Resize((1, 3, 7, 40), {"scale_factor": 1.1}, "a factor that leaves 7 pixels 7"),
    Resize((2, 3, 37, 41), {"scale_factor": 1 / 3.7}, "downsampling: pixels that are in no output"),
    Resize((1, 17, 37, 41), {"scale_factor": 1 / 3.7}, "likewise, by vectors of channels"),
    Resize((1, 3, 30, 50), {"scale_factor": 0.7}, "fewer pixels, by vectors of the row"),
    Resize((1, 1, 10, 30), {"scale_factor": 0.1}, "0.1 is inexact: 10 * 0.1 rounds to 1"),
    Resize((1, 1, 29, 100), {"scale_factor": 0.29}, "100 * 0.29 rounds to just below 29"),
    Resize((1, 2, 3, 3), {"scale_factor": (3, 1 / 3)}, "up in h, down in w"),
    Resize((1, 2, 4, 9), {"size": (30, 5)}, "likewise, no whole ratio"),
    Resize((1, 2, 2, 3), {"scale_factor": 13}, "long ranges in backward"),
    Resize((1, 33, 50, 70), {"scale_factor": (2.3, 1.9)}, "several tasks in either layout"),
]


def image(sizes: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    """Values that float32 holds exactly, so that it can be the oracle of a float64 case."""
    g = seeded(seed)
    t = torch.randn(sizes, generator=g).to(dtype)
    return t.contiguous(memory_format=LAYOUTS[layout])


def run(fn: Callable[..., Tensor], x: Tensor, dy: Tensor | None, **how: Any) -> list[Tensor]:
    """y and, if there is dy, dx."""
    x = x.detach().requires_grad_(dy is not None)
    y = fn(x, **how)
    if dy is not None:
        y.backward(dy.expand(y.shape))
    return [y.detach(), *([] if x.grad is None else [x.grad])]


def check(
    case: Resize, dtype: torch.dtype, layout: str, how: dict[str, Any], place: Place = CPU
) -> None:
    how = {**case.to, **how}
    x = image(case.sizes, dtype, layout)
    bilinear = how["mode"] == "bilinear"
    expected = F.interpolate(x, **how)
    dy = image(expected.shape, dtype, layout, 1)
    there = x.to(place.device), dy.to(place.device)
    with place.around():
        y, dx = (t.cpu() for t in run(functional.interpolate, *there, **how))
    assert y.dtype == dx.dtype == dtype
    assert y.stride() == expected.stride()
    assert dx.stride() == x.stride()
    exact_y, exact_dx = run(lambda t, **_: resized(t, how), x.double(), dy.double())
    if bilinear:
        exact_y, exact_dx = run(F.interpolate, x.double(), dy.double(), **how)
    else:
        assert torch.equal(y.float(), F.interpolate(x.float(), **how))
    errors = resize_errors(x, dy, *axes(x, how))
    assert_rounded("y", y, exact_y, errors["y"])
    assert_rounded("dx", dx, exact_dx, errors["dx"])


Axis = tuple[Tensor, Tensor]  # interpolation weights, [size_out, size], and how far each is off


def axis(
    size: int,
    size_out: int,
    scale: float | None,
    mode: str,
    align_corners: bool,
    dtype: torch.dtype,
) -> Axis:
    """Of one axis, in float64.

    A coordinate is made of at most four rounded operations, of values up to its own size and 1. It
    moves a weight by as much as it is off; beside an integer another pixel's weight.
    """
    weights = reference_matrix(size, size_out, scale, mode, align_corners)
    if mode != "bilinear" or size == size_out:
        return weights, torch.zeros_like(weights)
    place = weights @ torch.arange(size, dtype=torch.float64) + 1
    around = F.max_pool1d((weights != 0).double()[None], 3, 1, 1)[0]
    return weights, walk(1, dtype) * place[:, None] * around


def axes(x: Tensor, how: dict[str, Any]) -> list[Axis]:
    """Of both axes of F.interpolate's arguments."""
    size = F.interpolate(x[:1, :1].float(), **how).shape[2:]
    factor = None if how.get("recompute_scale_factor") else how.get("scale_factor")
    scales = tuple(factor) if isinstance(factor, tuple) else (factor, factor)
    way = how["mode"], how.get("align_corners") or False, x.dtype
    return [axis(x.shape[2 + d], size[d], scales[d], *way) for d in range(2)]


def resized(x: Tensor, how: dict[str, Any]) -> Tensor:
    """Resize by the reference, in float64."""
    (rows, _), (columns, _) = axes(x, how)
    return rows @ x.double() @ columns.mT


def resize_errors(x: Tensor, dy: Tensor, rows: Axis, columns: Axis) -> dict[str, Tensor]:
    """Return how far y and dx may be off before they are rounded (support/tolerance.py)."""

    def error(t: Tensor, h: Axis, w: Axis) -> Tensor:
        t, terms = t.double().abs(), max(int((m[0] != 0).sum(1).max()) for m in (h, w)) ** 2
        whole = h[0] @ t @ w[0].mT
        return h[1] @ t @ w[0].mT + h[0] @ t @ w[1].mT + walk(terms, x.dtype) * whole

    back = [(weights.mT, off.mT) for weights, off in (rows, columns)]
    return {"y": error(x, rows, columns), "dx": error(dy, *back)}
