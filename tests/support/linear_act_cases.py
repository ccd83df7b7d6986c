"""Linear layers with activations: sizes, both answers of the rule, how near results must be.

The oracle is torch.nn.functional.linear in float64, whose gradients are autograd's.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.seeds import seeded
from support.tolerance import margin, unit_roundoff, walk
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.ops.conv2d import float32_products
from fastcnn.ops.conv2d.float32_products import Least

STEEPEST = 1.5  # of the activations' derivatives: hardswish at 3; none bends by more than 1
HALVES = (torch.bfloat16, torch.float16)
# The rule's two answers, on any processor: half types are multiplied in float32, or by PyTorch.
RULES: dict[str, dict[torch.dtype, Least]] = {
    "in float32": dict.fromkeys(HALVES, Least(0, 0)),
    "by PyTorch": {},
}


def answer(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "LEAST", RULES[rule])


class Sizes(NamedTuple):
    """Of an input, the output's features, and why the case is there."""

    x: tuple[int, ...]
    c_out: int
    reason: str

    def __str__(self) -> str:
        return self.reason


SIZES = [
    Sizes((1, 1), 1, "one value of everything"),
    Sizes((7,), 5, "one dimension"),
    Sizes((33, 17), 20, "rows"),
    Sizes((2, 9, 24), 96, "a sequence"),
    Sizes((2, 3, 4, 12), 48, "pixels, channels last"),
    Sizes((300, 64), 16, "more rows than features"),
]


class Case(NamedTuple):
    """The tensors of a call, y's gradient and the activation."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    act: str


def made(
    sizes: Sizes,
    dtype: torch.dtype,
    act: str = "none",
    bias: bool = True,
    param_dtype: torch.dtype | None = None,
) -> Case:
    """Random tensors; dy is 0 where a rounding of z decides about its factor."""
    g, c_in = seeded(sum(sizes.x)), sizes.x[-1]
    param_dtype = param_dtype or dtype
    x = torch.randn(sizes.x, generator=g).to(dtype)
    weight = torch.randn(sizes.c_out, c_in, generator=g).to(param_dtype)
    added = torch.randn(sizes.c_out, generator=g).to(param_dtype) if bias else None
    dy = torch.randn(*sizes.x[:-1], sizes.c_out, generator=g).to(dtype)
    case = Case(x, weight, added, dy, act)
    z = F.linear(*wide(*case[:3]))
    near = margin(dtype) * (1 + z.abs()) + _z_error(case)
    return case._replace(dy=dy.masked_fill(near_nondifferentiable(z, act, near), 0))


def wide(*tensors: Any) -> Any:
    return tuple(None if t is None else t.detach().double() for t in tensors)


def results(fn: Any, case: Case) -> dict[str, Tensor]:
    """y and the gradients of what has one."""
    leaves = {"dx": case.x, "dweight": case.weight} | (
        {} if case.bias is None else {"dbias": case.bias}
    )
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = fn(leaves["dx"], leaves["dweight"], leaves.get("dbias"), act=case.act)
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return ACTS[act](F.linear(x, weight, bias))


def exact(case: Case) -> dict[str, Tensor]:
    x, weight, bias = wide(*case[:3])
    return results(eager, case._replace(x=x, weight=weight, bias=bias))


def _z_error(case: Case) -> Tensor:
    """What z is off by: its sum, and its own rounding; a weight's, where it is rounded first."""
    x, weight, bias = (None if t is None else t.abs() for t in wide(*case[:3]))
    magnitude = F.linear(x, weight, bias)
    dtype = case.x.dtype
    rounded = 2 if case.weight.dtype is dtype else 3
    halves = rounded * unit_roundoff(dtype) if dtype in HALVES else 0.0
    return (walk(weight.shape[1] + 1, dtype) + halves) * magnitude


def errors(case: Case) -> dict[str, Tensor]:
    """What each result may be off by before it is rounded into its dtype.

    dz = dy * act'(z) is off by what z is, and by its own rounding into dy's dtype; both reach the
    gradients through |weight| and |x|. A weight that PyTorch rounds first counts as dz does.
    """
    x, weight, bias = (None if t is None else t.abs().requires_grad_() for t in wide(*case[:3]))
    dtype, dy, z_error = case.x.dtype, case.dy.double().abs(), _z_error(case)
    z = F.linear(x, weight, bias)
    found = {"y": STEEPEST * z_error + (walk(1, dtype) * z.detach() if case.act != "none" else 0)}
    dz_error = torch.zeros_like(dy)
    if case.act != "none":
        dz_error = dy * (z_error + STEEPEST * (walk(1, dtype) + unit_roundoff(dtype)))
        dy = STEEPEST * dy
    if case.weight.dtype is not dtype:
        dz_error = dz_error + unit_roundoff(dtype) * dy
    leaves = {"dx": x, "dweight": weight} | ({} if bias is None else {"dbias": bias})
    rows = max(x.shape[:-1].numel(), 1)
    for name, leaf in leaves.items():
        terms = weight.shape[0] if name == "dx" else rows
        through = [
            torch.autograd.grad(z, leaf, of, retain_graph=True)[0]
            for of in (walk(terms, dtype) * dy, dz_error)
        ]
        found[name] = through[0] + through[1]
    return found


class Types(TorchDispatchMode):
    """The types of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.dtype] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.__name__.split(".")[0] in ("mm", "addmm", "linear", "_linear_pointwise"):
            self.read += [t.dtype for t in args[:3] if isinstance(t, Tensor) and t.dim() > 1]
        return op(*args, **(kwargs or {}))
