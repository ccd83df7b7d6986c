"""What the tests of normalisations draw, what cancels in them, and how results are compared."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, walk
from torch import Tensor


class Place(NamedTuple):
    """Where a case runs: a device, and the context of our calls there."""

    device: torch.device
    around: Callable[[], AbstractContextManager[Any]]

    def run(self, run: Callable[..., dict[str, Tensor]], case: Any, *fns: Any) -> list[Any]:
        """run(fn, case) there for our function and others, back on the CPU."""
        found, there = [], case.to(self.device)
        for fn, around in zip(fns, (self.around, *[nullcontext] * len(fns)), strict=False):
            with around():
                found.append({k: t.cpu() for k, t in run(fn, there).items()})
        return found


CPU = Place(torch.device("cpu"), nullcontext)


class Draw:
    """Float32 values, the same for the same sizes, rounded to a dtype."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        param_dtype: torch.dtype | None = None,
    ) -> None:
        self.generator = seeded(sum(sizes))
        self.sizes, self.dtype, self.layout = sizes, dtype, LAYOUTS[layout]
        self.param_dtype = param_dtype or dtype

    def image(self) -> Tensor:
        t = torch.randn(self.sizes, generator=self.generator).to(self.dtype)
        return t.contiguous(memory_format=self.layout)

    def uniform(self, low: float, high: float) -> Tensor:
        t = torch.rand(self.sizes[1], generator=self.generator) * (high - low) + low
        return t.to(self.param_dtype)

    def affine(self, act: str) -> tuple[Tensor, Tensor]:
        """Gamma of both signs and, in the second channel, zero; beta."""
        far = act in ("relu6", "hardswish")  # beyond 6, and 3
        weight = self.uniform(0.5, 1.5) * (4 if far else 1)
        weight[::3] *= -1
        # Two values a channel normalise to -1 and 1, so |beta| < |gamma| keeps z off 0.
        bias = self.uniform(-0.25, 0.25)
        if self.sizes[1] > 1:
            weight[1], bias[1] = 0, 0.25
        return weight, bias


def per_channel(t: Tensor | None, missing: float) -> Tensor | float:
    """A parameter as it multiplies images; its value where it is missing."""
    return missing if t is None else t[:, None, None]


class Normalised(NamedTuple):
    """A normalisation in float64: its terms, and what its statistics are of.

    y = act(z), z = weight * normalised + bias + residual, normalised = (x - mean) / std, where the
    statistics are means over `over` (as many values as `count`), broadcast. Those that are given
    (evaluation) have no errors. Parameters that are missing are 1 and 0.
    """

    x: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor | float
    bias: Tensor | float
    residual: Tensor | float
    dy: Tensor
    over: Callable[[Tensor], Tensor]
    count: int
    per_parameter: Callable[[Tensor], Tensor]  # the sum that gives a parameter's gradient
    samples: int  # how many terms it has
    training: bool = True
    moved: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)  # running mean and var before


def normalised_by_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    groups: int | None,
    eps: float,
) -> Normalised:
    """What group_norm_act does, in float64; groups=None: each pixel over its channels."""
    n, c, h, w = x.shape

    def over(t: Tensor) -> Tensor:
        t = t.expand(x.shape)
        if groups is None:
            return t.mean(1, keepdim=True)
        means = t.reshape(n, groups, c // groups * h * w).mean(2)
        return means.repeat_interleave(c // groups, 1)[:, :, None, None]

    mean = over(x)
    return Normalised(
        x, mean, (over((x - mean).square()) + eps).sqrt(), per_channel(weight, 1.0),
        per_channel(bias, 0.0), 0.0, dy, over, c if groups is None else c // groups * h * w,
        lambda t: t.sum((0, 2, 3)), n * h * w,
    )  # fmt: skip


# No activation's derivative is above 1.5 (hardswish at 3), and no second derivative above 1 (silu,
# gelu), so that an error of z is at most that much one of y, and dy times it one of dz.
STEEPEST = 1.5


def norm_errors(n: Normalised, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return each result's error before its last rounding (support/tolerance.py), to first order.

    The statistics err by a walk over `count` values, relative to what is summed: magnitudes, and
    squares around a center, of which two bits cancel at most (csrc/cpu/moments.h), so that the
    variance has four times their error and std twice. They move all values alike, so that sums over
    values keep that. What one value's own operations add is counted as if sums kept it, too.
    """
    one, sums = walk(1, dtype), walk(n.count if n.training else 1, dtype)
    parameters = walk(n.samples, dtype)
    normalised, typical = (n.x - n.mean) / n.std, n.over(n.x.abs())
    gain = abs(n.weight) / n.std
    d_mean = sums * typical / n.std if n.training else 0.0
    d_std = 2 * sums if n.training else one
    d_normalised = one * (n.x.abs() + n.mean.abs()) / n.std + d_mean + normalised.abs() * d_std
    d_z = abs(n.weight) * d_normalised
    d_z = d_z + one * ((n.weight * normalised).abs() + abs(n.bias) + abs(n.residual))
    dz = STEEPEST * n.dy.abs()
    d_dz = n.dy.abs() * d_z + one * dz
    d_bias = parameters * n.per_parameter(dz) + n.per_parameter(d_dz)
    sum_of = dz * normalised.abs()
    d_sum_of = d_dz * normalised.abs() + dz * d_normalised
    d_weight = parameters * n.per_parameter(sum_of) + n.per_parameter(d_sum_of)
    inner = d_dz
    if n.training:
        by_mean, by_std = n.over(abs(n.weight) * dz), n.over(abs(n.weight) * sum_of)
        d_by_mean = n.over(abs(n.weight) * d_dz) + sums * by_mean
        d_by_std = n.over(abs(n.weight) * d_sum_of) + sums * by_std
        inner = abs(n.weight) * d_dz + d_by_mean + d_normalised * by_std
        inner = inner + normalised.abs() * d_by_std
        size = abs(n.weight) * dz + by_mean + normalised.abs() * by_std
        d_x = (inner + size * (d_std + one)) / n.std
    else:
        d_x = gain * (d_dz + 2 * one * dz)
    unbiased = n.count / max(n.count - 1, 1)
    # Multiplied by 1 - momentum, which is rounded in units of 1 however small it is.
    old_mean, old_var = (one * abs(old) for old in n.moved)
    return {
        "z": d_z,
        "y": STEEPEST * d_z,
        "dx": d_x,
        "dresidual": d_dz,
        "dweight": d_weight,
        "dbias": d_bias,
        "running_mean": d_mean * n.std + old_mean if n.training else torch.zeros(()),
        "running_var": 2 * d_std * n.std.square() * unbiased + old_var
        if n.training
        else torch.zeros(()),
    }


def halved(n: Normalised) -> dict[str, Tensor]:
    """Return what is rounded to x's dtype on the way: dx is made of dresidual as it is returned.

    Below the smallest normal number, of float16 6e-5, an ulp does not shrink any more.
    """
    dz = (STEEPEST * n.dy.abs()).clamp(min=torch.finfo(torch.float16).tiny)
    inner = abs(n.weight) * dz
    if n.training:
        inner = (
            inner
            + n.over(inner)
            + ((n.x - n.mean) / n.std).abs() * n.over(inner * ((n.x - n.mean) / n.std).abs())
        )
    return {"dx": inner / n.std}


def compare(
    case: Any,
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    halves: Mapping[str, Tensor] | None = None,
) -> None:
    """Each result of a call with the float64 one."""
    assert actual.keys() == exact.keys()
    for k, t in actual.items():
        like = case.x if k == "y" else getattr(case, k.removeprefix("d"))
        assert t.dtype == like.dtype, f"{k}: expected {like.dtype}, got {t.dtype}"
        assert t.stride() == like.stride(), f"{k}: expected {like.stride()}, got {t.stride()}"
        error = errors[k].reshape(t.shape) if errors[k].numel() == t.numel() else errors[k]
        assert_rounded(k, t, exact[k], error, (halves or {}).get(k, 0.0))
