"""What the tests of normalisations draw, what cancels in them, and how results are compared."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from shapes import LAYOUTS
from tolerance import assert_as_exact_as_torch, assert_same_in_float64
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
        self.generator = torch.Generator().manual_seed(sum(sizes))
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
        # Two values a channel normalise to -1 and 1, so |beta| < |gamma| keeps them off the kink.
        bias = self.uniform(-0.25, 0.25)
        if self.sizes[1] > 1:
            weight[1], bias[1] = 0, 0.25
        return weight, bias


def magnitudes(case: Any, var: Tensor) -> dict[str, float]:
    """Of what cancels: x and its mean in y; gain * dy in dx; sums of dy, also times (x - mean)."""
    std = (var + case.eps).sqrt().min().item()
    gain = (1.0 if case.weight is None else case.weight.abs().max().item()) / std
    spread, total = case.x.abs().max().item(), case.dy.abs().sum((0, 2, 3)).max().item()
    dx = gain * case.dy.abs().max().item()
    return {"y": gain * spread, "dx": dx, "dweight": total * spread / std, "dbias": total}


def compare(
    case: Any,
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    scales: Mapping[str, float],
    terms: int,
) -> None:
    """Each result of a call with the float64 one, by PyTorch's own error in the dtype."""
    assert actual.keys() == exact.keys()
    for k, t in actual.items():
        like = case.x if k == "y" else getattr(case, k.removeprefix("d"))
        assert t.dtype == like.dtype, f"{k}: expected {like.dtype}, got {t.dtype}"
        assert t.stride() == like.stride(), f"{k}: expected {like.stride()}, got {t.stride()}"
        scale = scales.get(k, 0.0)
        if t.dtype is torch.float64:
            assert_same_in_float64(k, t, exact[k], terms, scale)
        else:
            assert_as_exact_as_torch(k, t, eager[k], exact[k], scale)
