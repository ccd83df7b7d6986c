"""Calls of batch_norm_act: what they get, both ways to run them, and how they are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.norm_cases import (
    CPU,
    Draw,
    Normalised,
    Place,
    compare,
    halved,
    norm_errors,
    per_channel,
)
from support.tolerance import margin
from torch import Tensor

from fastcnn import functional

TENSORS = ("x", "residual", "weight", "bias", "dy", "running_mean", "running_var")


@dataclass
class Case:
    """Arguments of one call; the gradient of y is dy."""

    x: Any
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor
    training: bool
    act: str
    momentum: float = 0.1
    eps: float = 1e-5

    def to(self, what: torch.dtype | torch.device) -> "Case":
        tensors = {k: t.to(what) for k in TENSORS if (t := getattr(self, k)) is not None}
        return replace(self, **tensors)


def make_case(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "nchw",
    act: str = "relu",
    residual: bool = False,
    training: bool = True,
    param_dtype: torch.dtype | None = None,
) -> Case:
    """Values away from non-differentiable points."""
    draw = Draw(sizes, dtype, layout, param_dtype)
    weight, bias = draw.affine(act)
    x, added = draw.image(), draw.image() if residual else None
    stats = draw.uniform(-0.5, 0.5), draw.uniform(0.5, 2.0)
    case = Case(x, added, weight, bias, *stats, draw.image(), training, act)
    moved = case.x if case.residual is None else case.residual
    for _ in range(100):
        before = replace(case, act="none").to(torch.float64)
        z = run(torch_batch_norm_act, before, forward_only=True)["y"]
        near = near_nondifferentiable(z, act, margin(dtype))
        if not near.any():
            return case
        moved.copy_(torch.where(near, draw.image(), moved))
    raise AssertionError("no data away from non-differentiable points found")


def torch_batch_norm_act(case: Case) -> Tensor:
    stats, affine = (case.running_mean, case.running_var), (case.weight, case.bias)
    z = F.batch_norm(case.x, *stats, *affine, case.training, case.momentum, case.eps)
    return ACTS[case.act](z if case.residual is None else z + case.residual)


def fastcnn_batch_norm_act(case: Case, **synchronised: Any) -> Tensor:
    return functional.batch_norm_act(
        case.x, case.running_mean, case.running_var, case.weight, case.bias, case.training,
        case.momentum, case.eps, residual=case.residual, act=case.act, **synchronised,
    )  # fmt: skip


def of_pieces(case: Case, channels: Sequence[int]) -> Tensor:
    """Of x in several tensors of so many channels; x gets their gradients."""
    layout = torch.contiguous_format if case.x.is_contiguous() else torch.channels_last
    pieces = [t.contiguous(memory_format=layout) for t in case.x.split(list(channels), 1)]
    return fastcnn_batch_norm_act(replace(case, x=pieces))


def run(fn: Callable[[Case], Tensor], case: Case, forward_only: bool = False) -> dict[str, Tensor]:
    """y, the gradients of all that is there, and the running statistics after the call."""
    given = {k: t for k in TENSORS[:4] if (t := getattr(case, k)) is not None}
    leaves = {k: t.detach().requires_grad_(not forward_only) for k, t in given.items()}
    running = {k: getattr(case, k).clone() for k in ("running_mean", "running_var")}
    y = fn(replace(case, **leaves, **running))
    results = {"y": y.detach(), **running}
    if not forward_only:
        y.backward(case.dy)
        results |= {f"d{k}": t.grad for k, t in leaves.items()}
    return results


def normalised(case: Case) -> Normalised:
    """What happens in a case, in float64."""
    case, dims = case.to(torch.float64), (0, 2, 3)
    mean, var = case.running_mean, case.running_var
    if case.training:
        mean = case.x.mean(dims)
        var = (case.x - mean[:, None, None]).square().mean(dims)
    return Normalised(
        case.x, mean[:, None, None], (var + case.eps).sqrt()[:, None, None],
        per_channel(case.weight, 1.0), per_channel(case.bias, 0.0),
        0.0 if case.residual is None else case.residual, case.dy,
        lambda t: t.mean(dims, keepdim=True), m := case.x.numel() // case.x.shape[1],
        lambda t: t.sum(dims), m, case.training,
        (per_channel(case.running_mean, 0.0), per_channel(case.running_var, 0.0)),
    )  # fmt: skip


def check(
    case: Case, place: Place = CPU, fn: Callable[[Case], Tensor] = fastcnn_batch_norm_act
) -> dict[str, Tensor]:
    """Compare everything with float64."""
    (actual,) = place.run(run, case, fn)
    exact, terms = run(torch_batch_norm_act, case.to(torch.float64)), normalised(case)
    errors = norm_errors(terms, case.x.dtype)
    compare(case, actual, exact, errors, {} if case.residual is None else halved(terms))
    return actual
