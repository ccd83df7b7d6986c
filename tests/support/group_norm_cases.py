"""Calls of group_norm_act and of its form by pixels: what they get, and how they are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.norm_cases import CPU, Draw, Place, compare, norm_errors, normalised_by_group
from support.tolerance import margin
from torch import Tensor

from fastcnn import functional
from fastcnn.ops.group_norm_act import pixel_norm_act

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TENSORS = ("x", "weight", "bias", "dy")
PIXELS = None  # in place of a number of groups: each pixel over its channels


@dataclass
class Case:
    """Arguments of one call; the gradient of y is dy."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    groups: int | None
    act: str
    eps: float = 1e-5

    def to(self, what: torch.dtype | torch.device) -> "Case":
        tensors = {k: t.to(what) for k in TENSORS if (t := getattr(self, k)) is not None}
        return replace(self, **tensors)


def make_case(
    sizes: tuple[int, ...],
    groups: int | None,
    dtype: torch.dtype,
    layout: str = "nchw",
    act: str = "relu",
    param_dtype: torch.dtype | None = None,
) -> Case:
    """Values with dy = 0 near non-differentiable points."""
    draw = Draw(sizes, dtype, layout, param_dtype)
    weight, bias = draw.affine(act)
    case = Case(draw.image(), weight, bias, draw.image(), groups, act)
    z = torch_norm_act(replace(case, act="none").to(torch.float64))
    # Either gradient is right there. Half parameters beside a large z: a margin of its size.
    near = near_nondifferentiable(z, act, margin(dtype) * (1 + z.abs().max().item() / 8))
    case.dy.masked_fill_(near, 0)
    return case


def torch_norm_act(case: Case) -> Tensor:
    x, affine = case.x, (case.weight, case.bias)
    if case.groups is PIXELS:
        z = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *affine, case.eps)
        return ACTS[case.act](z.permute(0, 3, 1, 2))
    return ACTS[case.act](F.group_norm(x, case.groups, *affine, case.eps))


def fastcnn_norm_act(case: Case) -> Tensor:
    args = case.weight, case.bias, case.eps
    if case.groups is PIXELS:
        return pixel_norm_act("test", case.x, case.x.shape[1], *args, case.act)
    return functional.group_norm_act(case.x, case.groups, *args, act=case.act)


def run(fn: Callable[[Case], Tensor], case: Case) -> dict[str, Tensor]:
    """y and the gradients of all that is there."""
    given = {k: t for k in TENSORS[:3] if (t := getattr(case, k)) is not None}
    leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
    y = fn(replace(case, **leaves))
    y.backward(case.dy)
    return {"y": y.detach()} | {f"d{k}": t.grad for k, t in leaves.items()}


def errors(case: Case) -> dict[str, Tensor]:
    """How far each result may be from float64's before it is rounded."""
    wide = case.to(torch.float64)
    args = wide.x, wide.weight, wide.bias, wide.dy, wide.groups, wide.eps
    return norm_errors(normalised_by_group(*args), case.x.dtype)


def check(case: Case, place: Place = CPU) -> dict[str, Tensor]:
    """Compare everything with float64."""
    (actual,) = place.run(run, case, fastcnn_norm_act)
    compare(case, actual, run(torch_norm_act, case.to(torch.float64)), errors(case))
    return actual
