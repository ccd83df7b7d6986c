"""The activations themselves: values and derivatives over all of float32, at jumps and beyond.

A batch norm with mean 0, variance 1 and eps 0 is the identity, to the last bit: z is x.
"""

from typing import Any

import pytest
import torch
from support.activations import ACTS
from support.tolerance import accumulator, assert_rounded
from torch import Tensor

from fastcnn import reference
from fastcnn.common.activation import ACT_NUMBER, act_number
from fastcnn.functional import batch_norm_act


def run(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative, through the operator."""
    x = z.reshape(1, 1, 1, -1).clone().requires_grad_()
    mean, var = torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    y = batch_norm_act(x, mean, var, eps=0.0, act=act)
    (derivative,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach().flatten(), derivative.flatten()


def torchs(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    y = ACTS[act](z)
    (derivative,) = torch.autograd.grad(y, z, torch.ones_like(y))
    return y.detach(), derivative


def assert_accurate(act: str, z: Tensor, sides: int = 1) -> None:
    """Compare an act and its derivative with PyTorch's in float64, on the same values.

    An act is at most five roundings, exp or erf the last two or three, of values no larger than 1
    and |z|. sides: 2 where PyTorch's own roundings count as well.
    """
    work = accumulator(z.dtype)
    for name, got, exact in zip(
        ("value", "derivative"), run(z, act), torchs(z.double(), act), strict=True
    ):
        size = exact.abs().maximum(z.double().abs().clamp(max=1))
        error = sides * 5 * torch.finfo(work).eps * size + torch.finfo(work).tiny
        assert_rounded(f"{act}: {name}", got, exact, error)


@pytest.mark.every_level
@pytest.mark.parametrize("act", ACTS)
def test_accuracy(act: str) -> None:
    # Of every size, and beside them what float32 cannot hold, its subnormals.
    exponents = torch.arange(-30, 12, dtype=torch.float64)
    steps = torch.linspace(1, 2, 400, dtype=torch.float64)
    z = (torch.exp2(exponents)[:, None] * steps).flatten().float()
    assert_accurate(act, torch.cat([z, -z, torch.linspace(-12, 12, 20001)]))


U = 2.0**-24  # half an ulp of 1 in float32
BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def finite(dtype: torch.dtype) -> Tensor:
    """Every finite value of a half type."""
    values = BITS.view(dtype)
    return values[values.isfinite()]


@pytest.mark.every_level
@pytest.mark.parametrize("act", ["silu", "gelu", "sigmoid"])
def test_float32_keeps_the_bounds_it_states(act: str) -> None:
    # Those of csrc/cpu/simd/vec_math.h: exp within 4 U of itself, the sigmoid 6, 1 minus it 7, the
    # normal distribution 8 U of 1; what is made of them rounds once to three times more. Every
    # value of the half types, and close by where exp changes its power of 2 and where it ends.
    powers = (torch.arange(-130, 131) + 0.5) * 0.6931471805599453
    near = torch.cat([powers, torch.tensor([-89.0, -88.0, -87.0, 0.0, 87.0, 88.0, 89.0])])
    steps = torch.linspace(-1e-4, 1e-4, 41)
    z = torch.cat([finite(torch.bfloat16).float(), finite(torch.float16).float()])
    z = torch.cat([z, torch.linspace(-100, 100, 2**18), (near[:, None] + steps).flatten()])
    value, derivative = run(z, act)
    exact_value, exact_derivative = torchs(z.double(), act)
    x = z.double()
    slope = torch.sigmoid(x) * torch.sigmoid(-x)  # PyTorch's own 1 - sigmoid(x) cancels
    if act == "sigmoid":
        exact_derivative = slope
    spread = x.abs().clamp(max=1e4) * slope
    bounds = {
        "silu": (7 * exact_value.abs(), 9 * (exact_derivative.abs() + spread)),
        "sigmoid": (7 * exact_value, 14 * exact_derivative),
        "gelu": (8 * x.abs().clamp(max=14) + exact_value.abs(), torch.full_like(x, 12)),
    }
    for name, got, exact, bound in zip(
        ("value", "derivative"),
        (value, derivative),
        (exact_value, exact_derivative),
        bounds[act],
        strict=True,
    ):
        # 2e-36: at -87 what is below becomes 0.
        excess = (got.double() - exact).abs() - (U * bound + 2e-36)
        worst = excess.argmax()
        assert (excess <= 0).all(), f"{act}, {name} of {z[worst]}: {got[worst]}, {exact[worst]}"


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_accuracy_of_every_half_value(act: str, dtype: torch.dtype) -> None:
    assert_accurate(act, finite(dtype))


@pytest.mark.every_level
@pytest.mark.parametrize("act", ACTS)
def test_lanes_and_tails_agree(act: str) -> None:
    # Blocks of vectors, single ones and a last part of one have code of their own.
    torch.manual_seed(0)
    z = torch.randn(203) * 4
    whole = run(z, act)
    for first in (1, 64, 150, 187):
        for got, expected in zip(run(z[first:], act), whole, strict=True):
            assert torch.equal(got, expected[first:])


@pytest.mark.parametrize("act", ACTS)
def test_float64_is_accurate_to_its_last_digits(act: str) -> None:
    # gradcheck takes differences of values: a float32 exp would give it seven digits.
    assert_accurate(act, torch.linspace(-20, 20, 4001, dtype=torch.float64), sides=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_derivatives_at_their_jumps_are_torchs(act: str, dtype: torch.dtype) -> None:
    # Subgradients are a choice: the same one as PyTorch's. So is a NaN's, but for hardswish, where
    # PyTorch's derivative has no trace of it.
    assert_accurate(act, torch.tensor([-3, -0.0, 0, 3, 6], dtype=dtype))
    nan = torch.tensor([torch.nan], dtype=dtype)
    for got, expected in zip(run(nan, act), torchs(nan, act), strict=True):
        assert got.isnan() == (expected.isnan() or act == "hardswish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_limits(act: str, dtype: torch.dtype) -> None:
    # PyTorch's silu, gelu and hardswish make inf * 0 = NaN of some of these, at -inf all three.
    large = torch.finfo(dtype).max
    z = torch.tensor([-torch.inf, -large, large, torch.inf], dtype=dtype)
    value, derivative = run(z, act)
    if act == "none":
        low, high = z[:2], z[2:]
    elif act == "leaky_relu":
        low, high = z[:2] * 0.01, z[2:]
    else:
        top = {"relu6": 6.0, "sigmoid": 1.0}.get(act)
        low, high = torch.zeros_like(z[:2]), z[2:] if top is None else torch.full_like(z[2:], top)
    assert torch.equal(value, torch.cat([low, high]))
    left = {"none": 1.0, "leaky_relu": 0.01}.get(act, 0.0)
    right = 0.0 if act in ("relu6", "sigmoid") else 1.0
    expected = torch.tensor([left, left, right, right], dtype=dtype)
    assert torch.equal(derivative, expected)


def test_the_reference_lets_nan_through() -> None:
    # As F.relu and F.relu6 do: an oracle that hides a NaN would call a kernel wrong that does not.
    x = torch.tensor([float("nan"), 1.0]).reshape(2, 1, 1, 1)
    for act in ACTS:
        y = reference.batch_norm_act(x, mean=torch.zeros(1), var=torch.ones(1), act=act)[0]
        assert y.isnan().flatten().tolist() == [True, False], act


def test_every_activation_is_tested() -> None:
    assert list(ACTS) == list(ACT_NUMBER)


@pytest.mark.parametrize("act", [[], {}, None, 1, "ReLU"], ids=str)
def test_what_is_no_activation_is_named(act: Any) -> None:
    with pytest.raises(ValueError, match=r"^op: act: expected one of none, relu, .*, got "):
        act_number("op", act)
