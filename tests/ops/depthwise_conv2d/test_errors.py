"""What a user of depthwise_conv2d gets wrong: the error names the argument, expected and got."""

from typing import Any

import pytest
import torch

from fastcnn.functional import depthwise_conv2d
from fastcnn.nn import DepthwiseConv2d

X = torch.randn(2, 3, 6, 6)
WEIGHT = torch.randn(3, 1, 3, 3)

# What replaces a good argument, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions \[n, c, h, w\], got 3"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last .*; call"),
    ({"weight": None}, TypeError, r"weight: expected a Tensor, got NoneType"),
    ({"weight": WEIGHT[:2]}, ValueError, r"weight: expected sizes \[3, 1, kernel_h, kernel_w\].*"),
    ({"weight": torch.randn(6, 1, 3, 3)}, ValueError, r"got \[6, 1, 3, 3\]; torch.nn.functional"),
    ({"weight": torch.randn(3, 3, 3, 3)}, ValueError, r"weight: .*got \[3, 3, 3, 3\]"),
    ({"weight": WEIGHT.bfloat16()}, TypeError, r"weight: expected torch.float32 beside .*bfloat16"),
    ({"input": X.half(), "weight": WEIGHT.bfloat16()}, TypeError, r"float16 or torch.float32"),
    ({"weight": torch.randn(3, 1, 7, 3)}, ValueError, r"expected a kernel that fits .*\[7, 3\]"),
    ({"bias": torch.ones(4)}, ValueError, r"bias: expected 3 numbers, one for each channel"),
    ({"bias": torch.ones(3).long()}, TypeError, r"bias: expected torch.float32 beside"),
    ({"stride": 0}, ValueError, r"stride: expected integers from 1 up, got \(0, 0\)"),
    ({"stride": 1.5}, ValueError, r"stride: expected an integer or a pair of them, got 1.5"),
    ({"padding": -1}, ValueError, r"padding: expected integers from 0 up, got \(-1, -1\)"),
    ({"padding": "same"}, ValueError, r"padding: expected an integer or a pair .*'same'"),
    ({"dilation": (1, 0)}, ValueError, r"dilation: expected integers from 1 up, got \(1, 0\)"),
    ({"dilation": 5}, ValueError, r"fits into the padded input, .*dilation \(5, 5\)"),
    ({"act": "tanh"}, ValueError, r"act: expected one of none, relu, .*got 'tanh'"),
    ({"weight": WEIGHT.to("meta")}, ValueError, r"weight: expected device cpu, got meta"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^depthwise_conv2d: .*{message}"):
        depthwise_conv2d(**{"input": X, "weight": WEIGHT, **bad})


def test_the_module_refuses_an_activation_at_once() -> None:
    with pytest.raises(ValueError, match="DepthwiseConv2d: act: expected one of none, relu"):
        DepthwiseConv2d(3, 3, act="tanh")  # type: ignore[arg-type]


def test_no_second_derivative() -> None:
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    (dx,) = torch.autograd.grad(depthwise_conv2d(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d .*to be differentiated once"):
        dx.sum().backward()
