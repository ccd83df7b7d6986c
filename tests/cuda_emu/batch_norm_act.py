"""Calls of batch_norm_act's CUDA kernels: data, what float64 and autograd make of it, and how near.

Tolerances. U = 2**-24 is float32's unit roundoff, u that of the output's dtype. A result may differ
by its own rounding, u * |result|, and by what float32 accumulates on the way: ROUNDINGS * U times
the magnitudes that are added up. Subtracting the mean costs U * max|x|, whatever is left after it.

Non-differentiable points. Where z lies nearer to 0 or 6 than its own error, either gradient is
right; dy is 0 there, so that both give the same sums. With a residual the mask is the rounded y's,
as in PyTorch, and z's error includes that rounding. Where act' depends on z, it carries on z's
error, times act''.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from cuda_emu.run import DTYPE_NUMBER, Case, Result
from support.activations import near_nondifferentiable
from support.seeds import seeded
from torch import Tensor

from fastcnn import reference
from fastcnn.common.activation import ACT_NUMBER, derivative_needs_only_y

U = 2.0**-24
# The longest chain of float32 additions in the tests' shapes: 72 values in a thread, then 8 merges
# of lanes and 6 of splits; each rounds twice, its product and its sum.
ROUNDINGS = 2 * (72 + 8 + 6)
EPS = 1e-5
# Shared memory of a block: none leaves the multi-pass kernels, a H200's one-pass where they fit.
MULTI_PASS, ONE_PASS = 0, 227 << 10
# The largest |act'| and |act''| (where they are differentiable) of the activations that calculate.
STEEPNESS = {"leaky_relu": 1.0, "silu": 1.1, "gelu": 1.13, "sigmoid": 0.25, "hardswish": 1.5}
CURVATURE = {"leaky_relu": 0.0, "silu": 0.5, "gelu": 0.8, "sigmoid": 0.1, "hardswish": 1 / 3}
ACT_ROUNDINGS = 16  # exp2 to 4, 1 / x to 2, GELU in half types to 9, and what combines them
Shape = tuple[int, int, int, int]
Options = tuple[str, bool, bool, bool, bool]  # act, residual, weight, bias, batch statistics


def column(t: Tensor) -> Tensor:
    return t[:, None, None]


def total(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3))


class Call:
    """Random data for a forward and a backward, what must come out, and how near."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Shape,
        options: Options,
        center: float = 0.5,
        sm_count: int = 12,
        shared_bytes: int = MULTI_PASS,
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self.device = {"sm_count": sm_count, "shared_bytes": shared_bytes}
        self.act, has_residual, has_weight, has_bias, self.training = options
        normal = partial(torch.randn, generator=seeded(1))
        c = shape[1]
        self.x = (normal(shape) + column(center + normal(c))).to(dtype)
        self.residual = (2 * normal(shape)).to(dtype) if has_residual else None
        self.weight = 3 * normal(c) if has_weight else None  # about half of them negative
        if self.weight is not None and c > 2:
            self.weight[1] = 0
        self.bias = 2 + normal(c) if has_bias else None  # z lies on both sides of 0 and of 6
        mean, var = center + normal(c), normal(c).square() + 0.1

        # The reference has all four, so that autograd has all four gradients.
        x = self.x.double()
        residual = torch.zeros_like(x) if self.residual is None else self.residual.double()
        weight = torch.ones(c).double() if self.weight is None else self.weight.double()
        bias = torch.zeros(c).double() if self.bias is None else self.bias.double()
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        given = (None, None) if self.training else (mean.double(), var.double())
        y, mean, var = reference.batch_norm_act(x, weight, bias, *given, residual, EPS, self.act)
        z = reference.batch_norm_act(x, weight, bias, *given, residual, EPS, "none")[0]
        with torch.no_grad():
            self.forward_errors(x, residual, weight, bias, mean, var, y)
            margin = self.z_error + has_residual * self.rounding(z.abs() + self.z_error)
            self.dy = (
                normal(shape).masked_fill(near_nondifferentiable(z, self.act, margin), 0).to(dtype)
            )
            self.dz_error = torch.zeros_like(z)
            if self.act in CURVATURE:
                error = CURVATURE[self.act] * self.z_error + ACT_ROUNDINGS * U
                self.dz_error = self.dy.double().abs() * error
        self.dx, self.dz, self.dweight, self.dbias = torch.autograd.grad(
            y, leaves, self.dy.double()
        )
        self.y, self.mean, self.var = y.detach(), mean.detach(), var.detach()
        with torch.no_grad():
            self.backward_errors()

    def rounding(self, magnitude: Tensor) -> Tensor:
        """Half a unit in the last place of a result, also of fp16's subnormals."""
        limits = torch.finfo(self.dtype)
        return limits.eps / 2 * magnitude.clamp(min=limits.smallest_normal)

    def forward_errors(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor,
        y: Tensor,
    ) -> None:  # fmt: skip
        bound = ROUNDINGS * U
        largest = x.abs().amax((0, 2, 3))
        self.rstd = column((var + EPS).rsqrt())
        self.scale = (self.rstd * column(weight)).abs()
        self.xhat = ((x - column(mean)) * self.rstd).abs()
        self.xhat_error = bound * (self.xhat + column(largest) * self.rstd)
        self.mean_error = bound * largest
        # The condition number of a variance is largest / deviation (Chan, Golub, LeVeque 1983).
        self.var_error = bound * (var + largest * var.sqrt()) + self.mean_error.square()
        relative = self.training * column(self.var_error / (var + EPS)) / 2  # rstd's error
        added = (self.xhat * column(weight)).abs() + column(bias.abs()) + residual.abs()
        self.z_error = bound * added + column(weight.abs()) * (
            self.xhat_error + relative * (self.xhat + self.xhat_error)
        )
        error = self.z_error
        if self.act in STEEPNESS:
            error = STEEPNESS[self.act] * error + ACT_ROUNDINGS * U * (1 + added)
        self.y_error = error + self.rounding(y.abs() + error)

    def backward_errors(self) -> None:
        bound, dz, n = ROUNDINGS * U, self.dz.abs(), self.x.numel() // self.shape[1]
        dz_error, xhat_most = self.dz_error, self.xhat + self.xhat_error
        self.dbias_error = bound * total(dz) + total(dz_error)
        self.dweight_error = total(dz * self.xhat_error + dz_error * xhat_most)
        self.dweight_error += bound * total(dz * self.xhat)
        self.dresidual_error = dz_error
        if not derivative_needs_only_y(ACT_NUMBER[self.act]):  # else dy or 0: nothing is rounded
            self.dresidual_error = dz_error + self.rounding(dz + dz_error)
        shift, slope, shift_error, slope_error = (
            self.training * column(t) / n
            for t in (total(dz), total(dz * self.xhat), total(dz_error), self.dweight_error)
        )
        error = self.scale * (
            self.dresidual_error  # where dx is made of it
            + shift_error
            + bound * (dz + shift + self.xhat * slope)
            + self.xhat * slope_error
            + self.xhat_error * (slope + slope_error)
        )
        self.dx_error = error + self.rounding(self.dx.abs() + error)

    def numbers(self, channels_last: bool) -> dict[str, float]:
        n, c, h, w = self.shape
        return {
            "n": n, "c": c, "hw": h * w, "channels_last": int(channels_last), "eps": EPS,
            "dtype": DTYPE_NUMBER[self.dtype], "act": ACT_NUMBER[self.act],
            **self.device,
        }  # fmt: skip

    def forward(self, channels_last: bool, skip: Sequence[str] = ()) -> Case:
        """The batch's statistics and y, or y from fixed ones. `skip`: what is misaligned."""
        mean, var = self.mean.float(), self.var.float()
        return Case(
            "fwd" if self.training else "apply",
            self.numbers(channels_last),
            inputs={
                "x": in_memory(self.x, channels_last),
                "residual": in_memory(self.residual, channels_last),
                "weight": self.weight,
                "bias": self.bias,
                **({} if self.training else {"mean": mean, "var": var}),
            },
            outputs={
                "y": in_memory(self.x, channels_last),
                **({"mean": mean, "var": var} if self.training else {}),
            },
            skip=dict.fromkeys(skip, 1),
        )

    def check_forward(self, result: Result, channels_last: bool) -> None:
        assert result.error == 0
        near(result, "y", in_memory(self.y, channels_last), in_memory(self.y_error, channels_last))
        if self.training:
            near(result, "mean", self.mean, self.mean_error)
            near(result, "var", self.var, self.var_error)

    def backward(
        self, channels_last: bool, want_dresidual: bool = True, skip: Sequence[str] = ()
    ) -> Case:
        in_y = derivative_needs_only_y(ACT_NUMBER[self.act])
        saved = self.y.to(self.dtype) if in_y and self.residual is not None else self.residual
        image = in_memory(self.x, channels_last)
        return Case(
            "bwd",
            {**self.numbers(channels_last), "training": int(self.training)},
            inputs={
                "dy": in_memory(self.dy, channels_last),
                "x": image,
                "saved": in_memory(saved, channels_last),
                "mean": self.mean.float(),
                "var": self.var.float(),
                "weight": self.weight,
                "bias": self.bias,
            },
            outputs={
                "dx": image,
                "dweight": self.mean.float(),
                "dbias": self.mean.float(),
                **({"dresidual": image} if want_dresidual else {}),
            },
            skip=dict.fromkeys(skip, 1),
        )

    def check_backward(self, result: Result, channels_last: bool) -> None:
        assert result.error == 0
        near(result, "dbias", self.dbias, self.dbias_error)
        near(result, "dweight", self.dweight, self.dweight_error)
        if "dresidual" in result.tensors:
            dz, error = (in_memory(t, channels_last) for t in (self.dz, self.dresidual_error))
            near(result, "dresidual", dz, error)
        near(
            result, "dx", in_memory(self.dx, channels_last), in_memory(self.dx_error, channels_last)
        )


def in_memory(t: Tensor | None, channels_last: bool) -> Any:
    return None if t is None else (t.permute(0, 2, 3, 1) if channels_last else t).contiguous()


def near(result: Result, name: str, expected: Tensor, error: Tensor) -> None:
    got = result.tensors[name].double()
    bad = ~((got - expected).abs() <= error)  # a NaN is bad
    at = tuple(int(i) for i in bad.nonzero()[0]) if bad.any() else ()
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()}, at {at}: expected {expected[at]:.9g} within "
        f"{error[at]:.3g}, got {got[at]:.9g}"
    )
