"""How far a lower precision spreads the results of a network around those of float64.

A chain of convolutions and batch norms amplifies the roundings of its early layers by amounts that
no count of operations tells. Here they are measured, by stochastic arithmetic (Vignes, "Discrete
stochastic arithmetic for validating results of numerical software", Numer. Algorithms 37, 2004):
the network runs in float64 several times, and each time every operator's result is moved by a
random error as large as the lower precision's roundings in it. The spread of a result over these
runs is the error to expect of any implementation, in any order of summation, and is the same number
on every processor: float64's own errors are 1e-8 of it.

The errors of one operator's result, drawn independently:
- of its rounding into the dtype: uniform, at most a unit roundoff u of it;
- of its sums of k products, made in float32: of deviation sqrt(k / 3) u32 times the sum of
  their magnitudes, which bounds the random walk of a sum in any order (support/tolerance.py).

A result then passes if its largest error is at most FACTOR times the largest deviation, over the
runs, of any of its values. With DRAWS runs, deviations are known as 16 squares tell them: in the
worst case, one single error that moves all values of a result together, the ratio has Student's t
distribution with 16 degrees of freedom, for which P(|t| > 14) = 2.2e-10. A test of a thousand
results has a false alarm in one of 4 million draws.

No activation that jumps (relu6's gradient) may lie within the roundings of a non-differentiable
point: there a result moves by more than any deviation tells.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from support.tolerance import unit_roundoff
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = 16
FACTOR = 14.0

Results = Mapping[str, Tensor | None]
aten = torch.ops.aten


class Roundings(TorchDispatchMode):
    """Moves what every operator of a float64 computation returns by random errors of `dtype`.

    `vectors` is the dtype of tensors of less than two dimensions: statistics and parameters of a
    norm, which mixed precision keeps in float32. `autocast`: what a convolution or a matrix product
    reads is rounded too, since parameters are of a higher precision, or folded; and what it gives
    back to them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        seed: int,
        vectors: torch.dtype | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        self.unit, self.unit_of_vectors = unit_roundoff(dtype), unit_roundoff(vectors or dtype)
        # Half the smallest subnormal: gradients in float16 lie there.
        self.tiny = torch.finfo(dtype).tiny * self.unit if dtype is torch.float16 else 0.0
        self.work = unit_roundoff(torch.float32)
        self.autocast = autocast
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(op.overloadpacket)
        if rule is not None and args[0].dtype is torch.float64:
            return rule(self, op, *args, **(kwargs or {}))
        if "norm" in str(op) and "linalg" not in str(op):
            raise NotImplementedError(f"roundings of {op}: expected a rule in RULES")
        given = {t.data_ptr() for t in [*args, *(kwargs or {}).values()] if isinstance(t, Tensor)}
        found = op(*args, **(kwargs or {}))
        if op.overloadpacket in MOVES:
            return found
        mutates = op._schema.is_mutable
        for t in found if isinstance(found, list | tuple) else [found]:
            # A view of what was given is no new value; an operation in place makes one.
            new = isinstance(t, Tensor) and t.dtype is torch.float64
            if new and (mutates or t.data_ptr() not in given):
                self.round_(t)
        return found

    def uniform(self, t: Tensor) -> Tensor:
        """Between -1 and 1, of t's sizes."""
        return 2 * torch.rand(t.shape, dtype=t.dtype, generator=self.generator) - 1

    def normal(self, t: Tensor) -> Tensor:
        """Of deviation 1, of t's sizes."""
        return torch.randn(t.shape, dtype=t.dtype, generator=self.generator)

    def round_(self, t: Tensor) -> Tensor:
        """Round a result into its dtype, after the few roundings in float32 that made it."""
        if t.numel() > 0 and t.untyped_storage().nbytes() >= t.numel() * t.element_size():
            unit = self.unit if t.dim() >= 2 else self.unit_of_vectors
            t.mul_(1 + (unit + 2 * self.work) * self.uniform(t))
            if self.tiny and t.dim() >= 2:
                t.add_(self.tiny * self.uniform(t))
        return t

    def summed(self, total: Tensor, magnitudes: Tensor, terms: float) -> Tensor:
        """Return a sum with the random walk of its roundings."""
        walk = math.sqrt(max(terms, 1) / 3) * self.work
        return total + walk * magnitudes * self.normal(total)

    def read(self, t: Tensor) -> Tensor:
        """Return what a convolution or a matrix product reads of t."""
        return t * (1 + self.unit * self.uniform(t)) if self.autocast else t


Rule = Callable[..., Any]


def convolution(
    mode: Roundings, op: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any
) -> Tensor:
    x, weight, bias = mode.read(x), mode.read(weight), None if bias is None else mode.read(bias)
    magnitudes = op(x.abs(), weight.abs(), None if bias is None else bias.abs(), *how)
    transposed, groups = how[3], how[5]
    terms = weight[0].numel() if not transposed else weight[:, 0].numel() // groups
    return mode.round_(mode.summed(op(x, weight, bias, *how), magnitudes, terms))


def convolution_backward(
    mode: Roundings, op: Any, dy: Tensor, x: Tensor, weight: Tensor, *how: Any
) -> tuple[Tensor | None, ...]:
    dy, x, weight = mode.read(dy), mode.read(x), mode.read(weight)
    magnitudes = op(dy.abs(), x.abs(), weight.abs(), *how)
    pixels = dy[:, 0].numel()
    return tuple(
        None if t is None else mode.read(mode.round_(mode.summed(t, size, terms)))
        for t, size, terms in zip(
            op(dy, x, weight, *how), magnitudes, (weight[:, 0].numel(), pixels, pixels), strict=True
        )
    )


def product(mode: Roundings, op: Any, *args: Any, **scales: Any) -> Tensor:
    """mm(a, b), bmm(a, b), addmm(bias, a, b)."""
    args = (*args[:-2], *map(mode.read, args[-2:]))
    magnitudes = op(*(t.abs() for t in args), **scales)
    return mode.round_(mode.summed(op(*args, **scales), magnitudes, args[-1].shape[-2]))


def sums(mode: Roundings, op: Any, t: Tensor, *how: Any, **options: Any) -> Tensor:
    """sum, mean, and pooling by averages."""
    total = op(t, *how, **options)
    terms = t.numel() / max(total.numel(), 1)
    return mode.round_(mode.summed(total, op(t.abs(), *how, **options), terms))


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(1, -1, *[1] * (like.dim() - 2))


def batch_norm(
    mode: Roundings,
    op: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    m = x.numel() / x.shape[1]
    if training:
        mean = mode.summed(x.mean(dims), x.abs().mean(dims), m)
        var = mode.summed(v := x.var(dims, correction=0), v, m)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * m / max(m - 1, 1), momentum)
            mode.round_(running_mean)
            mode.round_(running_var)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    rstd = (var + eps).rsqrt()
    parts = (None if t is None else _per_channel(t, x) for t in (mean, rstd, weight, bias))
    y, empty = normalised(mode, x, *parts), x.new_empty(0)
    return (y, mean, rstd) if training else (y, empty, empty)


def normalised(
    mode: Roundings, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Any
) -> Tensor:
    """Return (x - mean) * rstd * weight + bias, all broadcast to x."""
    gain = rstd if weight is None else rstd * weight
    y, scale = (x - mean) * gain, (x.abs() + mean.abs()) * gain.abs()
    if bias is not None:
        y, scale = y + bias, scale + bias.abs()
    return mode.round_(mode.summed(y, scale, 4))


def group_norm(
    mode: Roundings, op: Any, x: Tensor, weight: Any, bias: Any, n: int, c: int, pixels: int,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, of_channel = x.reshape(n, groups, c // groups, pixels), (1, groups, c // groups, 1)
    affine = (None if t is None else t.reshape(of_channel) for t in (weight, bias))
    y, mean, rstd = _row_norm(mode, rows, (2, 3), *affine, eps)
    return y.reshape(x.shape), mean.reshape(n, groups), rstd.reshape(n, groups)


def layer_norm(
    mode: Roundings, op: Any, x: Tensor, sizes: list[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _row_norm(mode, x, tuple(range(-len(sizes), 0)), weight, bias, eps)


def _row_norm(
    mode: Roundings, x: Tensor, dims: tuple[int, ...], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    terms = x.numel() / mean.numel()
    mean = mode.summed(mean, x.abs().mean(dims, keepdim=True), terms)
    rstd = (mode.summed(var, var, terms) + eps).rsqrt()
    return normalised(mode, x, mean, rstd, weight, bias), mean, rstd


def batch_norm_backward(
    mode: Roundings,
    op: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    dims, m = [d for d in range(x.dim()) if d != 1], x.numel() / x.shape[1]
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    assert mean is not None
    assert rstd is not None
    mean_, rstd_ = _per_channel(mean, x), _per_channel(rstd, x)
    normalised, size = (x - mean_) * rstd_, (x.abs() + mean_.abs()) * rstd_
    dbias = mode.summed(dy.sum(dims), dy.abs().sum(dims), m)
    dweight = mode.summed((dy * normalised).sum(dims), (dy.abs() * size).sum(dims), m)
    gain = rstd_ if weight is None else rstd_ * _per_channel(weight, x)
    dx, scale = dy, dy.abs()
    if training:
        by_mean, by_std = _per_channel(dbias, x) / m, _per_channel(dweight, x) / m
        dx, scale = dx - by_mean - normalised * by_std, scale + by_mean.abs() + size * by_std.abs()
    dx = mode.round_(mode.summed(dx * gain, scale * gain.abs(), 4))
    found = dx, mode.round_(dweight), mode.round_(dbias)
    return tuple(t if wanted else None for t, wanted in zip(found, mask, strict=True))


def group_norm_backward(
    mode: Roundings,
    op: Any,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    rows, mean, rstd = x.reshape(1, n * groups, -1), mean.reshape(-1), rstd.reshape(-1)
    dnormalised = dy if weight is None else dy * _per_channel(weight, x)
    dx, _, _ = batch_norm_backward(
        mode, op, dnormalised.reshape(rows.shape), rows,
        None, None, None, mean, rstd, True, 0.0, [True] * 3,
    )  # fmt: skip
    assert dx is not None
    mean_, rstd_ = _per_channel(mean, rows), _per_channel(rstd, rows)
    normalised = ((rows - mean_) * rstd_).reshape(x.shape)
    size = ((rows.abs() + mean_.abs()) * rstd_).reshape(x.shape)
    dims, m = [d for d in range(x.dim()) if d != 1], x.numel() / c
    dweight = mode.summed((dy * normalised).sum(dims), (dy.abs() * size).sum(dims), m)
    dbias = mode.summed(dy.sum(dims), dy.abs().sum(dims), m)
    found = dx.reshape(x.shape), mode.round_(dweight), mode.round_(dbias)
    return tuple(t if wanted else None for t, wanted in zip(found, mask, strict=True))


# They make no new values.
MOVES = {aten.clone, aten._to_copy, aten.copy_, aten.cat, aten.constant_pad_nd}

RULES: dict[Any, Rule] = {
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
    aten.mm: product,
    aten.bmm: product,
    aten.addmm: product,
    aten.sum: sums,
    aten.mean: sums,
    aten.avg_pool2d: sums,
    aten._adaptive_avg_pool2d: sums,
    aten.native_batch_norm: batch_norm,
    aten.native_batch_norm_backward: batch_norm_backward,
    aten.native_group_norm: group_norm,
    aten.native_group_norm_backward: group_norm_backward,
    aten.native_layer_norm: layer_norm,
}


class Expected:
    """Results of a network in float64, and how far a low precision's roundings move each.

    run: computes them in float64, from the same state at each call.
    """

    def __init__(
        self,
        run: Callable[[], Results],
        dtype: torch.dtype,
        vectors: torch.dtype | None = None,
        autocast: bool = False,
    ) -> None:
        self.exact = run()
        squares = {k: torch.zeros_like(t) for k, t in self.exact.items() if t is not None}
        for seed in range(DRAWS):
            with Roundings(dtype, seed, vectors, autocast):
                moved = run()
            for k, total in squares.items():
                if total.dtype is torch.float64:
                    total += (moved[k] - self.exact[k]).square()
        self.deviations = {
            k: (total / DRAWS).max().item() ** 0.5 if total.dtype is torch.float64 else 0.0
            for k, total in squares.items()
            if total.numel() > 0
        }

    def check(self, found: Results) -> None:
        """Fail if a result is further from its own than the factor allows."""
        assert found.keys() == self.exact.keys(), f"expected {list(self.exact)}, got {list(found)}"
        for k, want in self.exact.items():
            got = found[k]
            assert (got is None) == (want is None), f"{k}: got {got}"
            if want is None or got is None:
                continue
            assert got.shape == want.shape, f"{k}: expected {want.shape}, got {got.shape}"
            if want.numel() == 0:
                continue
            error = (got.detach().cpu().double() - want).abs().max().item()
            deviation = self.deviations[k]
            assert error <= FACTOR * deviation, (  # a NaN fails too
                f"{k}: off by {error:.3e}, which is {error / max(deviation, 1e-300):.1f} times "
                f"the deviation that roundings cause, {FACTOR:g} allowed"
            )


def assert_expected_roundings(
    found: Results,
    run: Callable[[], Results],
    dtype: torch.dtype,
    vectors: torch.dtype | None = None,
    autocast: bool = False,
) -> None:
    """Compare the results of a network in a low precision with its own in float64."""
    Expected(run, dtype, vectors, autocast).check(found)
