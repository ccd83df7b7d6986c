"""The activations themselves: their values and slopes over all of float32, at kinks and beyond.

A batch norm with mean 0, variance 1 and eps 0 is the identity, to the last bit: z is x.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from activations import ACTS
from torch import Tensor

from fastcnn import _C, reference
from fastcnn.functional import batch_norm_act
from fastcnn.ops.activation import ACT_NUMBER, act_number

LEVELS = _C.cpu_levels.split(",")


def run(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The activation and its slope, through the operator."""
    x = z.reshape(1, 1, 1, -1).clone().requires_grad_()
    mean, var = torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    y = batch_norm_act(x, mean, var, eps=0.0, act=act)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach().flatten(), slope.flatten()


def torchs(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    y = ACTS[act](z)
    (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
    return y.detach(), slope


def check_accuracy() -> None:
    """Every act on numbers of every size, against torch in float64 on the same numbers.

    An act is at most five roundings of float32, exp or erf the last two or three, of numbers no
    larger than 1 and |z|; beside them stands what float32 cannot hold, its subnormals.
    """
    exponents = torch.arange(-30, 12, dtype=torch.float64)
    steps = torch.linspace(1, 2, 400, dtype=torch.float64)
    z = (torch.exp2(exponents)[:, None] * steps).flatten().float()
    z = torch.cat([z, -z, torch.linspace(-12, 12, 20001)])
    ulp = torch.finfo(torch.float32).eps
    for act in ACTS:
        for name, got, exact in zip(
            ("value", "slope"), run(z, act), torchs(z.double(), act), strict=True
        ):
            limit = 5 * ulp * exact.abs().maximum(z.double().abs().clamp(max=1)) + 1e-38
            error = (got.double() - exact).abs()
            worst = (error - limit).argmax()
            assert error[worst] <= limit[worst], (act, name, z[worst], got[worst], exact[worst])
    print("accurate")


@pytest.mark.parametrize("level", LEVELS)
def test_accuracy(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(_C.cpu_capability()):
        pytest.skip(f"this processor has no {level}")
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_activation as t; "
    done = subprocess.run(
        [sys.executable, "-c", code + "t.check_accuracy()"],
        env=os.environ | {"FASTCNN_CPU_CAPABILITY": level}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "accurate\n", done.stderr


@pytest.mark.parametrize("act", ACTS)
def test_float64_is_accurate_to_its_last_digits(act: str) -> None:
    # gradcheck takes differences of values: a float32 exp would give it seven digits.
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for got, expected in zip(run(z, act), torchs(z, act), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=2e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_slopes_at_kinks_are_torchs(act: str, dtype: torch.dtype) -> None:
    # Subgradients are a choice: the same one as PyTorch's. So is a NaN's, but for hardswish, where
    # PyTorch's slope has no trace of it.
    z = torch.tensor([-3, -0.0, 0, 3, 6] + [torch.nan] * (act != "hardswish"), dtype=dtype)
    for got, expected in zip(run(z, act), torchs(z.double(), act), strict=True):
        torch.testing.assert_close(got, expected.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_limits(act: str, dtype: torch.dtype) -> None:
    # PyTorch's silu, gelu and hardswish make inf * 0 = NaN of some of these, at -inf all three.
    large = torch.finfo(dtype).max
    z = torch.tensor([-torch.inf, -large, large, torch.inf], dtype=dtype)
    value, slope = run(z, act)
    if act == "none":
        low, high = z[:2], z[2:]
    elif act == "leaky_relu":
        low, high = z[:2] * 0.01, z[2:]
    else:
        top = {"relu6": 6.0, "sigmoid": 1.0}.get(act)
        low, high = torch.zeros_like(z[:2]), z[2:] if top is None else torch.full_like(z[2:], top)
    torch.testing.assert_close(value, torch.cat([low, high]))
    left = {"none": 1.0, "leaky_relu": 0.01}.get(act, 0.0)
    right = 0.0 if act in ("relu6", "sigmoid") else 1.0
    expected = torch.tensor([left, left, right, right], dtype=dtype)
    torch.testing.assert_close(slope, expected)


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
