"""The limits of support/tolerance.py and support/roundings.py: what they let through, and what not.

Each defect below is one that a kernel could have: over a few draws its results must be outside. And
PyTorch's own results, which are right, must be inside in every draw: no limit may be too narrow.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.batch_norm_cases import Case, make_case, normalised, run, torch_batch_norm_act
from support.norm_cases import norm_errors
from support.roundings import assert_expected_roundings
from support.seeds import seed_all, seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAWS = 20


def images(seed: int, sizes: tuple[int, ...] = (4, 8, 12, 16)) -> Tensor:
    return torch.randn(sizes, generator=seeded(seed))


# ---- results of one operator ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_pytorch_are_inside(dtype: torch.dtype) -> None:
    # In every order: along each axis, and of what cancels as well.
    for seed in range(DRAWS):
        x = images(seed).to(dtype)
        for dim in (0, 1, 2, 3, (0, 2, 3), (0, 1, 2, 3)):
            wide, total = x.double(), x.sum(dim)
            terms = x.numel() / total.numel()
            error = walk(terms, dtype) * wide.abs().sum(dim)
            assert_rounded("sum", total, wide.sum(dim), error)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_sum_in_half_precision_is_outside(dtype: torch.dtype) -> None:
    for seed in range(DRAWS):
        x = images(seed, (256, 64)).to(dtype)
        total = torch.zeros(64, dtype=dtype)
        for row in x:
            total = total + row
        wide = x.double()
        with pytest.raises(AssertionError, match="sum"):
            assert_rounded("sum", total, wide.sum(0), walk(256, dtype) * wide.abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_result_that_was_rounded_twice_is_outside(dtype: torch.dtype) -> None:
    # A product, stored in the dtype, and then a sum: between the two it should stay in float32.
    for seed in range(DRAWS):
        x, y = (images(seed + 100 * i).to(dtype) for i in range(2))
        exact = x.double() * 3 + y.double()
        error = walk(1, dtype) * ((3 * x.double()).abs() + y.double().abs())
        assert_rounded("once", (x.float() * 3 + y.float()).to(dtype), exact, error)
        with pytest.raises(AssertionError, match="twice"):
            assert_rounded("twice", x * 3 + y, exact, error)


def statistics(x: Tensor, variance: Callable[[Tensor], Tensor]) -> None:
    """Compare a way to compute the variance of channels with float64's."""
    c = x.shape[1]
    ones = torch.ones(c)
    terms = normalised(Case(x, None, None, None, ones, ones, x, True, "none"))
    exact = x.double().var((0, 2, 3))
    assert_rounded("var", variance(x), exact, norm_errors(terms, x.dtype)["running_var"].flatten())


def test_a_variance_of_squares_is_outside() -> None:
    # E[x^2] - E[x]^2 at a mean of 1e4 and a deviation of 1.
    def of_squares(x: Tensor) -> Tensor:
        m = x[:, 0].numel()
        return (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()) * (m / (m - 1))

    for seed in range(DRAWS):
        x = images(seed) + 1e4
        statistics(x, lambda x: (x - x.mean((0, 2, 3), keepdim=True)).var((0, 2, 3)))
        with pytest.raises(AssertionError, match="var"):
            statistics(x, of_squares)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_pytorch_s_batch_norm_is_inside(training: bool) -> None:
    # In float32, where it rounds as we do; in half types it rounds between its operators.
    for seed, act in itertools.product(range(4), ["none", "relu", "silu", "hardswish"]):
        case = make_case((4, 6, 5, 7 + seed), torch.float32, "nchw", act, True, training)
        errors, exact = norm_errors(normalised(case), torch.float32), case.to(torch.float64)
        found, expected = run(torch_batch_norm_act, case), run(torch_batch_norm_act, exact)
        for k, want in expected.items():
            error = errors[k].flatten() if "running" in k else errors[k]
            assert_rounded(k, found[k], want, error)


@pytest.mark.parametrize("name", ["eps", "unbiased", "no mean of dy"])
def test_a_defect_of_a_batch_norm_is_outside(name: str) -> None:
    # Of a deviation of 0.02, where an eps of 1e-5 counts.
    case = make_case((4, 6, 5, 7), torch.float32, "nchw", "silu")
    case = replace(case, x=0.02 * case.x)
    errors, exact = norm_errors(normalised(case), torch.float32), case.to(torch.float64)
    expected, dims = run(torch_batch_norm_act, exact), (0, 2, 3)
    x = case.x.clone().requires_grad_()
    mean = x.mean(dims, keepdim=True)
    var = x.var(dims, correction=int(name == "unbiased"), keepdim=True)
    std = var.sqrt() + case.eps if name == "eps" else (var + case.eps).sqrt()
    mean = mean.detach() if name == "no mean of dy" else mean
    z = (x - mean) / std * case.weight[:, None, None] + case.bias[:, None, None]
    y = F.silu(z)
    y.backward(case.dy)
    k, found = ("dx", x.grad) if name == "no mean of dy" else ("y", y.detach())
    with pytest.raises(AssertionError, match=k):
        assert_rounded(k, found, expected[k], errors[k])


# ---- networks ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two convolutions with batch norms, and what can be wrong with them."""

    def __init__(self, defect: str = "") -> None:
        super().__init__()
        seed_all(1)
        self.defect = defect
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            z = self.convolution(x, conv.weight)
            if self.defect == "eps":
                mean, var = z.mean((0, 2, 3), True), z.var((0, 2, 3), correction=0, keepdim=True)
                z = (z - mean) / (var.sqrt() + bn.eps)
            else:
                z = bn(z)
            x = F.silu(z)
        return x

    def convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.defect == "tf32":
            x, weight = Rounded.apply(x), Rounded.apply(weight)
        if self.defect != "sums in bfloat16":
            return F.conv2d(x, weight, padding=1)
        y = 0.0
        for i, j in itertools.product(range(3), repeat=2):
            window = F.pad(x, (1, 1, 1, 1))[..., i : i + x.shape[2], j : j + x.shape[3]]
            y = (y + torch.einsum("nchw,oc->nohw", window, weight[..., i, j])).bfloat16().float()
        return y


class Rounded(torch.autograd.Function):
    """To TF32's 10 bits behind the leading one, of 23; gradients pass."""

    @staticmethod
    def forward(ctx: object, t: Tensor) -> Tensor:
        return ((t.contiguous().view(torch.int32) + (1 << 12)) >> 13 << 13).view(torch.float32)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy


def results(chain: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = chain(leaf)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaf.grad}
    return found | {f"d{k}": p.grad for k, p in chain.named_parameters() if p.grad is not None}


def check_chain(dtype: torch.dtype, seed: int, defect: str = "") -> None:
    x, dy = (images(seed + 50 * i, (2, 8, 6, 6)).to(dtype) for i in range(2))
    found = results(Chain(defect).to(dtype), x, dy)
    wide = Chain().to(dtype).double().state_dict()

    def run() -> dict[str, Tensor]:
        chain = Chain().double()
        chain.load_state_dict(wide)
        exact = results(chain, x.double(), dy.double())
        return {k: exact[k] for k in found}

    assert_expected_roundings(found, run, dtype)


@pytest.mark.parametrize("draws", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_networks_of_pytorch_are_inside(dtype: torch.dtype, draws: int) -> None:
    for seed in range(draws):
        check_chain(dtype, seed)


@pytest.mark.parametrize("defect", ["eps", "tf32", "sums in bfloat16"])
def test_a_defect_of_a_network_is_outside(defect: str) -> None:
    with pytest.raises(AssertionError, match="times the deviation"):
        check_chain(torch.float32, 0, defect)
