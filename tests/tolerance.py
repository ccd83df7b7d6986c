"""How far a result may be from the exact one.

The yardstick is PyTorch's own error: the exact result is PyTorch in float64 on the same (already
rounded) data, and beside it PyTorch runs in the dtype under test. A result passes if its largest
error is at most

    2 * PyTorch's largest error + 1 ulp

2, because two roundings or two orders of summation that are equally good differ by chance; 1 ulp
(of the largest value, in the dtype of the result), because PyTorch's error can be 0 by chance.
Where terms cancel (dx is what is left of dy, dweight a sum), the result may be far smaller than the
roundings of its terms: the caller passes the terms' magnitude as `scale`, and the ulp is float32's,
in which sums are made, of that.

In float64 nothing more exact is at hand, and PyTorch's float32 is no yardstick: it sums in float64.
There both sides add up m values a channel in other orders, and their roundings like a random walk:
sqrt(m) ulps.

Gradients jump at the kinks of relu and relu6, where a rounding decides between 0 and dy. No
tolerance is right there, so the data keeps away from them: `margin` says how far.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of the terms that an error is told by: each is rounded that often at most, in float32's or
# float64's ulps, before it is summed (converted, centred, scaled, multiplied).
ROUNDINGS = 4.0


def margin(dtype: torch.dtype) -> float:
    """Distance to keep from the kinks 0 and 6.

    Between 8 and 16 half an ulp is 4 eps. Eager rounds the normalised value, then its sum with the
    residual: 8 eps; and as much again in case either lies beyond 16.
    """
    return 16 * torch.finfo(dtype).eps


def assert_as_exact_as_torch(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, scale: float = 0.0
) -> None:
    """Fail if `actual`, of a dtype below float64, is further from `exact` than the limit above."""
    torch_error = _largest(eager.double() - exact.double())
    eps = torch.finfo(actual.dtype).eps
    ulp = max(eps * _largest(exact), min(eps, torch.finfo(torch.float32).eps) * scale)
    _assert_within(name, actual, exact, 2 * torch_error + ulp)


def assert_same_in_float64(
    name: str, actual: Tensor, expected: Tensor, terms: int, scale: float = 0.0
) -> None:
    """Fail if float64 results of sums over `terms` values differ by more than the limit above."""
    ulp = torch.finfo(torch.float64).eps * max(_largest(expected), scale)
    _assert_within(name, actual, expected, math.sqrt(terms) * ulp)


def error_ratio(actual: Tensor, eager: Tensor, exact: Tensor) -> float:
    """The error's norm over that of PyTorch's, where either counts as one rounding at the least.

    A rounding's error is uniform: its norm is eps / sqrt(12) of the values' at most.
    """
    rounding = torch.finfo(actual.dtype).eps / math.sqrt(12) * exact.double().norm().item()
    ours, theirs = ((t.double() - exact.double()).norm().item() for t in (actual, eager))
    return max(ours, rounding) / max(theirs, rounding) if rounding > 0 else 1.0 + ours


def assert_as_exact_over_draws(name: str, ratios: Sequence[float]) -> None:
    """Fail if the error ratios of many draws have a geometric mean above 2, or a NaN."""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert mean <= 2, f"{name}: {mean:.2f} times PyTorch's error, in {len(ratios)} draws"


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() > 0 else 0.0


def _assert_within(name: str, actual: Tensor, exact: Tensor, limit: float) -> None:
    assert actual.shape == exact.shape, f"{name}: expected {exact.shape}, got {actual.shape}"
    error = _largest(actual.double() - exact.double())
    assert error <= limit, (  # a NaN fails too
        f"{name}: error {error:.3e}, limit {limit:.3e}, largest value {_largest(exact):.3e}"
    )
