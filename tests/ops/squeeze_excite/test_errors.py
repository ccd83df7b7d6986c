"""What a user of squeeze_excite gets wrong: the error names the argument, expected and got."""

from typing import Any

import pytest
import torch

from fastcnn.functional import squeeze_excite
from fastcnn.nn import SqueezeExcite

X = torch.randn(2, 4, 6, 6)
FC1, FC2 = torch.randn(3, 4, 1, 1), torch.randn(4, 3, 1, 1)
GOOD = {"input": X, "fc1_weight": FC1, "fc2_weight": FC2}

# What replaces a good argument, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions \[n, c, h, w\], got 3"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last .*; call"),
    ({"fc1_weight": None}, TypeError, r"fc1_weight: expected a Tensor, got NoneType"),
    ({"fc1_weight": FC1[:, :3]}, ValueError, r"expected sizes \[c_mid, 4, 1, 1\], got \[3, 3, 1,"),
    ({"fc1_weight": FC1[:, :, 0, 0]}, ValueError, r"\[c_mid, 4, 1, 1\], got \[3, 4\]"),
    ({"fc2_weight": FC1}, ValueError, r"fc2_weight: expected sizes \[4, 3, 1, 1\], got \[3, 4, 1,"),
    ({"fc2_weight": None}, ValueError, r"fc1_weight: expected sizes \[4, 4, 1, 1\], got \[3, 4,"),
    ({"fc1_weight": FC1.bfloat16()}, TypeError, r"fc1_weight: expected torch.float32 beside"),
    ({"input": X.half(), "fc2_weight": FC2.bfloat16()}, TypeError, r"float16 or torch.float32"),
    ({"fc1_bias": torch.ones(4)}, ValueError, r"fc1_bias: expected 3 numbers"),
    ({"fc2_bias": torch.ones(3)}, ValueError, r"fc2_bias: expected 4 numbers"),
    (
        {"fc1_weight": torch.randn(4, 4, 1, 1), "fc2_weight": None, "fc2_bias": torch.ones(4)},
        ValueError,
        r"fc2_bias: expected None as fc2_weight is None, got a Tensor",
    ),
    ({"act": "tanh"}, ValueError, r"act: expected one of none, relu, .*got 'tanh'"),
    ({"gate": "relu"}, ValueError, r"gate: expected one of sigmoid, hardsigmoid, got 'relu'"),
    ({"fc1_weight": FC1.to("meta")}, ValueError, r"fc1_weight: expected device cpu, got meta"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^squeeze_excite: .*{message}"):
        squeeze_excite(**{**GOOD, **bad})


def test_the_module_refuses_activations_at_once() -> None:
    with pytest.raises(ValueError, match="SqueezeExcite: act: expected one of none, relu"):
        SqueezeExcite(4, 2, act="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SqueezeExcite: gate: expected one of sigmoid"):
        SqueezeExcite(4, 2, gate="tanh")  # type: ignore[arg-type]


def test_no_second_derivative() -> None:
    x, weight = X.clone().requires_grad_(), FC1.clone().requires_grad_()
    y = squeeze_excite(x, weight, None, FC2).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"squeeze_excite .*to be differentiated once"):
        dx.sum().backward()
