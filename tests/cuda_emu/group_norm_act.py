"""Calls of group_norm_act's and pixel_norm_act's CUDA kernels: data, results, and how near.

What float64 and autograd make of the data is right; how near a result must come to it, and how
z is kept off non-differentiable points, is batch_norm_act.py's reckoning with other values.
"""

from collections.abc import Sequence
from functools import partial

import torch
from cuda_emu.batch_norm_act import (
    ACT_ROUNDINGS,
    CURVATURE,
    EPS,
    STEEPNESS,
    Shape,
    U,
    column,
    in_memory,
    near,
    total,
)
from cuda_emu.run import DTYPE_NUMBER, Case, Result
from support.activations import near_nondifferentiable
from support.seeds import seeded
from torch import Tensor

from fastcnn import reference
from fastcnn.common.activation import ACT_NUMBER, activation

# The longest chain of float32 additions in the tests' shapes: 24 vectors of 8 values in a thread,
# then 9 merges of lanes and 8 of partial values; each rounds twice, its product and its sum.
ROUNDINGS = 2 * (192 + 9 + 8)
Options = tuple[str, bool, bool]  # act, weight, bias


class Call:
    """Random data for a forward and a backward, what must come out, and how near."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Shape,
        groups: int | None,
        options: Options,
        center: float = 0.5,
        sm_count: int = 3,
    ) -> None:
        self.dtype, self.shape, self.groups, self.sm_count = dtype, shape, groups, sm_count
        self.act, has_weight, has_bias = options
        normal = partial(torch.randn, generator=seeded(1))
        c = shape[1]
        self.x = (normal(shape) + column(center + normal(c))).to(dtype)
        self.weight = 3 * normal(c) if has_weight else None  # about half of them negative
        if self.weight is not None and c > 2:
            self.weight[1] = 0
        self.bias = 2 + normal(c) if has_bias else None  # z crosses every non-differentiable point
        # The reference has both, so that autograd has both gradients.
        weight = torch.ones(c).double() if self.weight is None else self.weight.double()
        bias = torch.zeros(c).double() if self.bias is None else self.bias.double()
        leaves = [t.requires_grad_() for t in (self.x.double(), weight, bias)]
        y, self.mean, self.var = reference.group_norm_act(
            leaves[0], groups, *leaves[1:], EPS, self.act
        )
        z = reference.group_norm_act(leaves[0], groups, *leaves[1:], EPS, "none")[0]
        with torch.no_grad():
            self.forward_errors(*leaves, y)
            unsure = near_nondifferentiable(z, self.act, self.z_error)
            self.dy = normal(shape).masked_fill(unsure, 0).to(dtype)
        self.dx, self.dweight, self.dbias = torch.autograd.grad(
            y, leaves, self.dy.double(), retain_graph=True
        )
        # dz is the bias's gradient before it is summed.
        (self.dz,) = torch.autograd.grad(
            activation(leaf := z.detach().requires_grad_(), self.act),
            leaf,
            self.dy.double(),
        )
        self.y, self.mean, self.var = (t.detach() for t in (y, self.mean, self.var))
        with torch.no_grad():
            self.backward_errors(weight.abs())

    def sets(self, t: Tensor) -> Tensor:
        """[n, statistics, values] of an image batch."""
        n, c = self.shape[:2]
        return t.reshape(n, c, -1).mT if self.groups is None else t.reshape(n, self.groups, -1)

    def spread(self, t: Tensor) -> Tensor:
        """An image batch of [n, statistics], as it multiplies one."""
        n, c, h, w = self.shape
        if self.groups is None:
            return t.reshape(n, 1, h, w)
        return t.repeat_interleave(c // self.groups, 1).reshape(n, c, 1, 1)

    def rounding(self, magnitude: Tensor) -> Tensor:
        limits = torch.finfo(self.dtype)
        return limits.eps / 2 * magnitude.clamp(min=limits.smallest_normal)

    def forward_errors(self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
        bound, mean, var = ROUNDINGS * U, self.mean, self.var
        largest = self.sets(x.abs()).amax(2)
        rstd = (var + EPS).rsqrt()
        self.rstd, scale = self.spread(rstd), column(weight.abs())
        self.xhat = ((x - self.spread(mean)) * self.rstd).abs()
        self.xhat_error = bound * (self.xhat + self.spread(largest * rstd))
        self.mean_error = bound * largest
        # The condition number of a variance is largest / deviation (Chan, Golub, LeVeque 1983).
        self.var_error = bound * (var + largest * var.sqrt()) + self.mean_error.square()
        relative = self.spread(self.var_error / (var + EPS)) / 2  # rstd's error
        added = self.xhat * scale + column(bias.abs())
        self.z_error = bound * added + scale * (
            self.xhat_error + relative * (self.xhat + self.xhat_error)
        )
        error = self.z_error
        if self.act in STEEPNESS:
            error = STEEPNESS[self.act] * error + ACT_ROUNDINGS * U * (1 + added)
        self.y_error = error + self.rounding(y.abs() + error)

    def backward_errors(self, weight: Tensor) -> None:
        bound, dz, dz_error = ROUNDINGS * U, self.dz.abs(), torch.zeros_like(self.dz)
        if self.act in CURVATURE:
            error = CURVATURE[self.act] * self.z_error + ACT_ROUNDINGS * U
            dz_error = self.dy.double().abs() * error
        xhat_most = self.xhat + self.xhat_error
        product_error = dz * self.xhat_error + dz_error * xhat_most
        self.dbias_error = bound * total(dz) + total(dz_error)
        self.dweight_error = bound * total(dz * self.xhat) + total(product_error)

        def mean_of(t: Tensor) -> Tensor:
            return self.spread(self.sets(column(weight) * t).mean(2))

        shift, slope = mean_of(dz), mean_of(dz * self.xhat)
        shift_error, slope_error = mean_of(dz_error), mean_of(product_error) + bound * slope
        error = self.rstd * (
            column(weight) * dz_error
            + shift_error
            + bound * (column(weight) * dz + shift + self.xhat * slope)
            + self.xhat * slope_error
            + self.xhat_error * (slope + slope_error)
        )
        self.dx_error = error + self.rounding(self.dx.abs() + error)

    def case(self, op: str, channels_last: bool, skip: Sequence[str]) -> Case:
        n, c, h, w = self.shape
        numbers = {
            "n": n, "c": c, "hw": h * w, "channels_last": int(channels_last), "eps": EPS,
            "dtype": DTYPE_NUMBER[self.dtype], "act": ACT_NUMBER[self.act],
            "groups": self.groups or 1, "sm_count": self.sm_count,
        }  # fmt: skip
        image = in_memory(self.x, channels_last)
        inputs = {"x": image, "weight": self.weight, "bias": self.bias}
        statistics = {"mean": self.mean.float(), "var": self.var.float()}
        channels = torch.empty(c)
        if op == "fwd":
            outputs = {"y": image, **statistics}
        else:
            inputs |= {"dy": in_memory(self.dy, channels_last), **statistics}
            outputs = {"dx": image, "dweight": channels, "dbias": channels}
        return Case(op, numbers, inputs, outputs, skip=dict.fromkeys(skip, 1))

    def cases(
        self, channels_last: bool, fwd_skip: Sequence[str] = (), bwd_skip: Sequence[str] = ()
    ) -> list[Case]:
        """Forward and backward. skip: what is misaligned."""
        return [
            self.case("fwd", channels_last, fwd_skip),
            self.case("bwd", channels_last, bwd_skip),
        ]

    def check(self, forward: Result, backward: Result, channels_last: bool) -> None:
        assert forward.error == backward.error == 0
        near(forward, "mean", self.mean, self.mean_error)
        near(forward, "var", self.var, self.var_error)
        for result, name in ((forward, "y"), (backward, "dx")):
            expected, error = getattr(self, name), getattr(self, f"{name}_error")
            near(result, name, *(in_memory(t, channels_last) for t in (expected, error)))
        near(backward, "dbias", self.dbias, self.dbias_error)
        near(backward, "dweight", self.dweight, self.dweight_error)
