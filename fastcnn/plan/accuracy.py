"""Which candidate is right: errors against a more exact reference, compared with PyTorch's own.

An op names its baseline, the candidate that is PyTorch's own way. Output i is right if

    error <= 4 * the baseline's error + eps(dtype) * largest

error: the largest difference from the reference, where that is finite; largest: its largest value,
or that of the output whose values it sums up, as a mean may be far smaller; eps * largest is a unit
in the last place of that. 4, because ways that are equally good differ by chance, in the order of
their sums and in what they round in between; the unit, because the baseline's error may be 0 by
chance. dtype is the output's own. Integers are equal. The baseline itself only has to be finite:
what PyTorch computes is what the user would have had.

Where it cannot run there is a bound instead, for sums of k = prod(weight[1:]) products:

    error <= (8 * eps(dtype) + sqrt(k) * 2^-22 + (2^-9 with tf32)) * largest

8 * eps: the output is rounded, and where an epilogue works on rounded values, a few times more.
sqrt(k) * 2^-22: k roundings of a float32 sum, of which each is at most 2^-24 of what is summed so
far, add up like a random walk; 4 for walks that go further than most, and for sums that were larger
on their way than at their end (float64: 2^-51). 2^-9: tf32 keeps 10 bits, so that rounding both
factors costs 2^-11 each, or twice that where they are cut off, if all products erred in one way.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.plan.problem import Problem

__all__ = ["Error", "Wrong", "difference", "errors", "largest", "limit"]


class Wrong(Exception):
    """A candidate's outputs are none that could be right; says why."""


class Error(NamedTuple):
    """How far one output is from the reference."""

    size: float
    dtype: torch.dtype  # of the output


def errors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Error]:
    """Return the error of each output.

    Raises:
        Wrong: other shapes than expected, or not finite where the reference is.
    """
    shapes, right = ([list(y.shape) for y in ys] for ys in (outputs, expected))
    if shapes != right:
        raise Wrong(f"outputs: expected {right}, got {shapes}")
    found = []
    for i, (y, exact) in enumerate(zip(outputs, expected, strict=True)):
        off = y.to(torch.float64, copy=True).sub_(exact)
        size = largest(off.masked_fill_(~exact.isfinite(), 0.0))
        if not math.isfinite(size):
            raise Wrong(f"output {i}: error {size}, where the reference is finite")
        found.append(Error(size, y.dtype))
    return found


def largest(y: Tensor) -> float:
    """Return the largest magnitude in a tensor; NaN if there is one."""
    return y.abs().max().item() if y.numel() > 0 else 0.0


def limit(
    problem: Problem, dtype: torch.dtype, scale: float, baseline: float | None = None
) -> float:
    """Return the largest error that is right; scale is `largest` of the formulas above."""
    if not dtype.is_floating_point:
        return 0.0
    eps = torch.finfo(dtype).eps
    if baseline is not None:
        return 4 * baseline + eps * scale
    sums = torch.float64 if problem.dtype is torch.float64 else torch.float32
    walk = math.sqrt(math.prod(problem.weight[1:])) * 2 * torch.finfo(sums).eps
    tf32 = 2**-9 if "tf32" in problem.options else 0.0
    return (8 * eps + walk + tf32) * scale


def difference(
    problem: Problem,
    found: Sequence[Error],
    scales: Sequence[float],
    baseline: Sequence[Error] | None,
) -> str | None:
    """Say which output is not right, if one is not; baseline: its errors, None where it failed."""
    for i, (error, scale) in enumerate(zip(found, scales, strict=True)):
        own = None if baseline is None else baseline[i]
        most = limit(problem, error.dtype, scale, None if own is None else own.size)
        if error.size > most:
            by = "by a bound" if own is None else f"where the baseline errs by {own.size:.3g}"
            return f"output {i}: error {error.size:.3g}, limit {most:.3g} {by}"
    return None
