"""How far a result may be from the exact one: bounds that are known before anything is run.

No other implementation's error is a baseline here: which kernel a library picks, and how lucky its
roundings are, differs from processor to processor and from draw to draw. Every limit is computed
from the data in float64, so that a test's verdict is the same everywhere.

The model of Higham and Mary ("A new approach to probabilistic rounding error analysis", SIAM J.
Sci. Comput. 41(5), 2019, theorem 2.4): where each value passes at most k roundings of unit roundoff
u, independent and of mean zero, the error of a sum is, whatever its order, at most

    CERTAINTY * sqrt(k) * u * (sum of the terms' magnitudes)

but for a probability of 2 exp(-CERTAINTY^2 / 2). CERTAINTY = 8 makes that 2.5e-14 a value: a run
that compares 10^7 values has a false alarm with a probability of 2.5e-7. The rounding of the result
into its own dtype, by half an ulp, is no matter of chance and is added as it is: a half-precision
result that was rounded twice on its way is outside.

For whole networks, whose roundings are amplified by what comes behind them: support/roundings.py.
For what is not about precision at all, two runs of one function in float64: assert_same.

Gradients jump at the non-differentiable points of relu and relu6, where a rounding decides between
0 and dy. No tolerance is right there, so the data keeps away from them: `margin` says how far.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CERTAINTY = 8.0

# Roundings of a term before it is summed: converted, centred, scaled, multiplied.
ROUNDINGS = 4


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums for a result of this dtype are made: float32, float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def margin(dtype: torch.dtype) -> float:
    """Distance to keep from the non-differentiable points 0 and 6.

    Between 8 and 16 half an ulp is 4 eps. Eager rounds the normalised value, then its sum with the
    residual: 8 eps; and as much again in case either lies beyond 16.
    """
    return 16 * torch.finfo(dtype).eps


def walk(terms: float, dtype: torch.dtype) -> float:
    """Return the relative error, of the sum of its terms' magnitudes, of a sum in any order.

    terms: how many additions a value passes at most; 1: a few operations one behind the other.
    dtype: of the result; sums are made in float32, or in float64 for float64.
    """
    return CERTAINTY * math.sqrt(terms + ROUNDINGS) * unit_roundoff(accumulator(dtype))


def limit(
    exact: Tensor, dtype: torch.dtype, error: Tensor | float = 0.0, halved: Tensor | float = 0.0
) -> Tensor:
    """Return what a result of this dtype may differ by from each exact value.

    error: of the value before it is rounded into `dtype`: what `walk` says times the magnitude of
    what was added up, cancelled or not; where it is a function of several sums, the sum over them.
    halved: the magnitude of values that are themselves rounded to `dtype` on the way.
    """
    exact = exact.double().abs()
    # The smallest subnormal: below the normal numbers an ulp does not shrink any more.
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return unit_roundoff(dtype) * (exact + halved) + walk(1, dtype) * exact + tiny + error


def assert_rounded(
    name: str,
    actual: Tensor,
    exact: Tensor,
    error: Tensor | float = 0.0,
    halved: Tensor | float = 0.0,
) -> None:
    """Fail if any value of `actual` is further from that of `exact` than the limit above."""
    assert actual.shape == exact.shape, f"{name}: expected {exact.shape}, got {actual.shape}"
    exact = exact.double()
    off = (actual.double() - exact).abs()
    allowed = limit(exact, actual.dtype, error, halved).expand(exact.shape)
    outside = ~(off <= allowed)  # a NaN is outside too
    if outside.any():
        worst = (off / allowed).nan_to_num(math.inf).argmax()
        off, allowed, exact, actual = (t.flatten()[worst] for t in (off, allowed, exact, actual))
        raise AssertionError(
            f"{name}: {int(outside.sum())} of {outside.numel()} values outside; the worst is off "
            f"by {off:.3e}, allowed {allowed:.3e}: expected {exact:.9g}, got {actual:.9g}"
        )


# Another order of summation moves what the tests' networks compute in float64 by less than 1e-11 of
# the largest value; a defect (an eps in the wrong place, an unbiased variance for a biased one, a
# lost addition) by more than 1e-6. Between the two no processor and no draw decides.
SAME = 1e-9


def assert_same(got: Any, want: Any, floor: float = 1.0, name: str = "result") -> None:
    """Fail unless two runs in float64, tensors in any nesting, computed the same function.

    A tensor may differ by SAME of its largest value, or of `floor`: of what cancels to 0, as the
    gradient of a bias before a batch norm, all is rounding errors of terms of about that size.
    """
    if isinstance(want, Mapping):
        assert got.keys() == want.keys(), f"{name}: expected {list(want)}, got {list(got)}"
        for key, value in want.items():
            assert_same(got[key], value, floor, f"{name}: {key}")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), f"{name}: expected {len(want)} results, got {len(got)}"
        for i, value in enumerate(want):
            assert_same(got[i], value, floor, f"{name}: {i}")
    elif want is None or not want.is_floating_point():
        assert (got is None) if want is None else torch.equal(got, want), f"{name}: got {got}"
    else:
        assert got.dtype is want.dtype is torch.float64, f"{name}: {got.dtype}, {want.dtype}"
        assert got.shape == want.shape, f"{name}: expected {want.shape}, got {got.shape}"
        if want.numel() > 0:
            largest, off = want.abs().max().item(), (got - want).abs().max().item()
            assert off <= SAME * max(largest, floor), f"{name}: off by {off:.1e} of {largest:.1e}"
