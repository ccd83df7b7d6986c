"""What a user gets wrong: TypeError or ValueError that names the argument, expected and got."""

from typing import Any

import pytest
import torch

from fastcnn import functional
from fastcnn.nn import BatchNormAct2d, Upsample

X = torch.randn(2, 3, 4, 4)
BIG = torch.randn(2, 5, 8, 8)
HALF = X.bfloat16()
C3, C4 = torch.ones(3), torch.ones(4)
NAN = float("nan")

# What replaces a good argument of batch_norm_act, the error, and what its message names.
BATCH_NORM_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input\[0\]: expected a Tensor, got float"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions .*, got 3: \[3, 4, 4\]"),
    ({"input": X[None]}, ValueError, r"input: expected 4 dimensions .*, got 5"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    # Layouts that only a copy would bring in order: the message says how to make it.
    ({"input": X.mT}, ValueError, r"input: expected a dense .* strides \[48, 16, 1, 4\]; call"),
    ({"input": X[..., ::2]}, ValueError, r"input: expected a dense NCHW or channels_last"),
    ({"input": torch.ones(1).expand(2, 3, 4, 4)}, ValueError, r"strides \[0, 0, 0, 0\]"),
    ({"input": C3[None, :, None, None]}, ValueError, r"more than 1 value .*\[1, 3, 1, 1\]"),
    ({"weight": C4}, ValueError, r"weight: expected 3 numbers, .* got sizes \[4\]"),
    ({"bias": C3[None]}, ValueError, r"bias: expected 3 numbers, .* got sizes \[1, 3\]"),
    ({"running_mean": C4}, ValueError, r"running_mean: expected 3 numbers"),
    ({"weight": 1.0}, TypeError, r"weight: expected a Tensor, got float"),
    ({"weight": C3.double()}, TypeError, r"expected torch.float32 beside .*float32, got .*float64"),
    # Half parameters beside float32 images would lose digits unnoticed.
    ({"running_var": C3.half()}, TypeError, r"running_var: expected torch.float32 .*float16"),
    ({"input": HALF, "bias": C3.half()}, TypeError, r"bias: expected torch.bfloat16 or .*float32"),
    ({"weight": C3.to("meta")}, ValueError, r"weight: expected device cpu, got meta"),
    ({"running_var": None}, ValueError, r"running_var: expected a Tensor as its partner"),
    ({"running_mean": None}, ValueError, r"running_mean: expected a Tensor as its partner"),
    (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        r"running_mean: expected a Tensor where training=False, got None",
    ),
    ({"input": []}, ValueError, r"input: expected a Tensor or several, got none"),
    ({"input": [X, 2]}, TypeError, r"input\[1\]: expected a Tensor, got int"),
    ({"input": [X[0], X[0]]}, ValueError, r"input\[0\]: expected 4 dimensions .*, got 3"),
    ({"input": [X, X[:, :, 0]]}, ValueError, r"input\[1\]: expected 4 dimensions .*, got 3"),
    ({"input": [X, X[:1]]}, ValueError, r"input\[1\]: expected sizes \[2, 3, 4, 4\], got \[1, 3, "),
    ({"input": [X, HALF]}, TypeError, r"input\[1\]: expected torch.float32 .*, got torch.bfloat16"),
    ({"input": [X, X.to("meta")]}, ValueError, r"input\[1\]: expected device cpu, got meta"),
    ({"input": [X, X.mT]}, ValueError, r"input\[1\]: expected a dense NCHW or channels_last"),
    (
        {"input": [X, X.contiguous(memory_format=torch.channels_last)]},
        ValueError,
        r"input\[1\]: expected the input's memory format torch.contiguous_format, got strides",
    ),
    ({"input": [X, X]}, ValueError, r"running_mean: expected 3 numbers|weight: expected 6 numbers"),
    (
        {"input": [X[:, :1].clone(), X[:, 1:].clone()], "residual": X[:, 1:].clone()},
        ValueError,
        r"residual: expected sizes \[2, 3, 4, 4\], got \[2, 2, 4, 4",
    ),
    ({"residual": 0}, TypeError, r"residual: expected a Tensor, got int"),
    ({"residual": X[:1]}, ValueError, r"residual: expected sizes \[2, 3, 4, 4\], got \[1, 3, 4, 4"),
    ({"residual": HALF}, TypeError, r"residual: expected torch.float32 .*, got torch.bfloat16"),
    ({"residual": X.to("meta")}, ValueError, r"residual: expected device cpu, got meta"),
    (
        {"residual": X.contiguous(memory_format=torch.channels_last)},
        ValueError,
        r"residual: expected the input's memory format torch.contiguous_format, got strides",
    ),
    # Updated in place: a copy of a strided vector would lose the update.
    ({"running_mean": torch.ones(6)[::2]}, ValueError, r"running_mean: expected a dense .*\(2,\)"),
    # Its gradient would be dropped.
    (
        {"running_var": torch.ones(3, requires_grad=True), "training": False},
        ValueError,
        "running_var: expected no requires_grad",
    ),
    ({"momentum": None}, TypeError, r"momentum: expected a number, got NoneType"),
    ({"momentum": -0.1}, ValueError, r"momentum: expected a number from 0 to 1, got -0.1"),
    ({"momentum": NAN}, ValueError, r"momentum: expected a number from 0 to 1, got nan"),
    ({"eps": "small"}, TypeError, r"eps: expected a number, got str"),
    ({"eps": 0.0}, ValueError, r"eps: expected a number above 0, got 0.0"),
    ({"eps": NAN}, ValueError, r"eps: expected a number above 0, got nan"),
    ({"sync": 1}, TypeError, r"sync: expected a bool, got int"),
    ({"act": "swish"}, ValueError, r"act: expected one of none, relu, .*, hardswish, got 'swish'"),
    ({"act": None}, ValueError, r"act: expected one of none, relu, .*, hardswish, got None"),
    ({"act": X}, ValueError, r"act: expected one of none, relu, .*, hardswish, got a Tensor$"),
    ({"act": ["relu"]}, ValueError, r"act: expected one of none, .*, hardswish, got a list$"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BATCH_NORM_ERRORS)
def test_batch_norm_act(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"input": X, "running_mean": C3, "running_var": C3, "weight": C3, "bias": C3}
    with pytest.raises(error, match=f"^batch_norm_act: .*{message}"):
        functional.batch_norm_act(**{**good, "training": True, **bad})


# What replaces a good argument of interpolate.
INTERPOLATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": None}, TypeError, r"input: expected a Tensor, got NoneType"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions .*, got 3"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last"),
    ({"input": X[..., :0]}, ValueError, r"input: expected images of at least 1 pixel"),
    ({"size": 8}, ValueError, r"size, scale_factor: expected exactly one of the two, got both"),
    ({"scale_factor": None}, ValueError, r"size, scale_factor: expected exactly .*, got neither"),
    ({"scale_factor": (2, 2, 2)}, ValueError, r"scale_factor: expected a number or a pair"),
    ({"scale_factor": "2"}, TypeError, r"scale_factor: expected a number or a pair .* got '2'"),
    ({"scale_factor": 0.1}, ValueError, r"scale_factor=0.1: expected an output of at least 1x1"),
    ({"scale_factor": float("nan")}, ValueError, r"expected an output of at least 1x1"),
    ({"scale_factor": 1e30}, ValueError, r"scale_factor=1e\+30: .* at most 2147483647 pixels"),
    ({"scale_factor": None, "size": (8, 2**40)}, ValueError, r"size=\(8, 1099.*: .* got 8x1099"),
    ({"scale_factor": None, "size": (8, 8, 8)}, ValueError, r"size: expected an integer or a pair"),
    ({"scale_factor": None, "size": 8.5}, TypeError, r"size: expected an integer .* got 8.5"),
    ({"scale_factor": None, "size": (0, 8)}, ValueError, r"size=\(0, 8\): .* got 0x8"),
    (
        {"scale_factor": None, "size": 8, "recompute_scale_factor": True},
        ValueError,
        r"recompute_scale_factor: expected a scale_factor .*, got size=8",
    ),
    ({"mode": "bicubic"}, ValueError, r"mode: expected one of nearest, nearest-exact, bilinear,"),
    ({"mode": X}, ValueError, r"mode: expected one of nearest, .*, bilinear, got a Tensor$"),
    ({"mode": "nearest", "align_corners": False}, ValueError, r"align_corners: expected None"),
    ({"antialias": True}, ValueError, r"antialias: expected False"),
    ({"concat": 1}, TypeError, r"concat: expected a Tensor, got int"),
    ({"concat": X}, ValueError, r"concat: expected sizes \[2, any, 8, 8\], got \[2, 3, 4, 4\]"),
    ({"concat": BIG[:1]}, ValueError, r"concat: expected sizes \[2, any, 8, 8\]"),
    ({"concat": BIG.half()}, TypeError, r"concat: expected torch.float32 as .*, got torch.float16"),
    ({"concat": BIG.to("meta")}, ValueError, r"concat: expected device cpu, got meta"),
    ({"concat": BIG.mT}, ValueError, r"concat: expected a dense NCHW or channels_last"),
    (
        {"concat": BIG.contiguous(memory_format=torch.channels_last)},
        ValueError,
        r"concat: expected the input's memory format torch.contiguous_format, got strides",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), INTERPOLATE_ERRORS)
def test_interpolate(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"input": X, "scale_factor": 2, "mode": "bilinear"}
    with pytest.raises(error, match=f"^interpolate: .*{message}"):
        functional.interpolate(**{**good, **bad})


def test_an_upsampling_mode_that_a_module_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"Upsample: mode: expected one of .*, got 'area'"):
        Upsample(scale_factor=2, mode="area")


def test_an_activation_that_a_module_does_not_know() -> None:
    # At construction, not at the first batch.
    with pytest.raises(ValueError, match=r"BatchNormAct2d: act: expected one of .*, got 'tanh'"):
        BatchNormAct2d(3, act="tanh")
