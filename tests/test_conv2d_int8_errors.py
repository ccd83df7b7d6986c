"""What a user of conv2d_int8 gets wrong: errors that name the argument, expected and got."""

import math
from typing import Any

import pytest
import torch
from conv2d_int8_cases import Case, problem
from torch import Tensor

from fastcnn.functional import conv2d_int8, pack_conv2d_int8

CASE = Case((2, 6, 5, 4), 8, 3, "padded", padding=1, groups=2)


def grad(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


# What is made of good arguments, the error, and what its message says.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, r"x: expected a Tensor, got NoneType"),
    ({"x": Tensor.float}, TypeError, r"x: expected uint8 or int8, got torch.float32"),
    ({"x": lambda t: t[0]}, ValueError, r"x: expected 4 dimensions .*, got \[6, 5, 4\]"),
    ({"x": lambda t: t.mT}, ValueError, r"x: expected a dense .* with strides .* call x.contig"),
    ({"x": lambda t: t[:, :4]}, ValueError, r"x: expected a dense NCHW or channels_last tensor"),
    ({"x": lambda t: t[:, :4].clone()}, ValueError, r"weight: expected 4 input channels, got 6"),
    ({"x": lambda t: t[:, :, :0]}, ValueError, r"weight: expected a kernel that fits into"),
    ({"weight": "w"}, TypeError, r"weight: expected a Tensor, got str"),
    ({"weight": Tensor.byte}, TypeError, r"weight: expected int8, got torch.uint8"),
    ({"weight": lambda t: t[0]}, ValueError, r"weight: expected 4 dimensions .*, got \[3, 3, 3\]"),
    ({"weight": lambda t: t[:0]}, ValueError, r"weight: expected 4 dimensions .* none of them 0"),
    ({"groups": 1}, ValueError, r"weight: expected 6 input channels, got 3 \(3 for each of 1 gr"),
    ({"groups": 3}, ValueError, r"groups: expected a divisor of 8 output channels, got 3"),
    ({"groups": 0}, ValueError, r"groups: expected a divisor of 8 output channels, got 0"),
    ({"groups": 1.0}, TypeError, r"groups: expected an integer, got float"),
    ({"stride": 0}, ValueError, r"weight: expected a kernel that fits"),
    ({"padding": -1}, ValueError, r"weight: expected a kernel that fits"),
    ({"padding": "same"}, ValueError, r"padding: expected an integer or a pair of them"),
    ({"dilation": 4}, ValueError, r"weight: expected a kernel .* for an input of \[2, 6, 5"),
    ({"stride": (1, 2, 3)}, ValueError, r"stride: expected an integer or a pair of them"),
    ({"x_scale": None}, TypeError, r"x_scale: expected a number, got NoneType"),
    ({"x_scale": torch.ones(1)}, TypeError, r"x_scale: expected a number, got Tensor"),
    ({"x_zero_point": 1.0}, TypeError, r"x_zero_point: expected an integer, got float"),
    ({"x_zero_point": 256}, ValueError, r"x_zero_point: expected 0 to 255 beside torch.uint8, got"),
    ({"x_zero_point": -1}, ValueError, r"x_zero_point: expected 0 to 255 beside torch.uint8, got"),
    ({"out_zero_point": 128}, ValueError, r"out_zero_point: expected -128 to 127 beside torch.i"),
    ({"out_zero_point": None}, ValueError, r"out_zero_point: expected -128 to 127 .*, got None"),
    ({"out_scale": None}, ValueError, r"out_scale: expected a finite number above 0, got None"),
    ({"residual_scale": 1e30, "out_scale": 1e-30}, ValueError, r"residual_scale: .* units of out"),
    ({"residual_scale": 1e-30, "out_scale": 1e30}, ValueError, r"residual_scale: .* units of out"),
    ({"residual_scale": None}, ValueError, r"residual_scale: expected a finite number above 0"),
    ({"residual_zero_point": 256}, ValueError, r"residual_zero_point: expected 0 to 255 beside"),
    ({"residual": None}, ValueError, r"residual_scale: expected None without an 8-bit residual"),
    ({"residual": Tensor.float}, TypeError, r"residual: expected uint8 or int8, got torch.float32"),
    ({"residual": lambda t: t[:1]}, ValueError, r"residual: expected sizes \[2, 8, 5, 4\], got"),
    ({"residual": Tensor.contiguous}, ValueError, r"residual: expected x's memory format .*channe"),
    ({"residual": 1}, TypeError, r"residual: expected a Tensor, got int"),
    ({"out_dtype": "uint8"}, TypeError, r"out_dtype: expected a torch.dtype, got str"),
    ({"out_dtype": torch.int32}, ValueError, r"out_dtype: expected uint8, .* got torch.int32"),
    ({"out_dtype": torch.bfloat16}, ValueError, r"out_scale: expected None beside torch.bfloat16"),
    ({"act": "gelu"}, ValueError, r"act: expected one of none, relu, relu6, got 'gelu'"),
    ({"weight_scale": None}, TypeError, r"weight_scale: expected a Tensor, got NoneType"),
    ({"weight_scale": Tensor.double}, TypeError, r"weight_scale: expected float32, got torch.flo"),
    ({"weight_scale": lambda t: t[1:]}, ValueError, r"weight_scale: expected 8 numbers, .* \[7\]"),
    ({"weight_scale": grad}, ValueError, r"weight_scale: expected a tensor that does not require"),
    ({"bias": Tensor.half}, TypeError, r"bias: expected float32, got torch.float16"),
    ({"bias": lambda t: t[:, None]}, ValueError, r"bias: expected 8 numbers, .* \[8, 1\]"),
    ({"bias": grad}, ValueError, r"bias: expected .* require grad, .* bias.detach\(\)"),
    ({"bias": lambda t: t * math.nan}, ValueError, r"bias: expected finite numbers .*, got nan"),
    ({"bias": lambda t: t * math.inf}, ValueError, r"bias: expected finite numbers .* -inf to inf"),
    ({"bias": lambda t: t * 1e9}, ValueError, r"bias: expected finite numbers of at most 6.710"),
    ({"x_scale": 1e-30, "out_scale": 1e30}, ValueError, r"x_scale: expected scales whose product"),
    ({"x_scale": 1e38, "weight_scale": 1e9}, ValueError, r"x_scale: expected scales whose produc"),
]  # fmt: skip
SCALES = ("x_scale", "weight_scale", "residual_scale", "out_scale")
ERRORS += [
    ({name: value}, ValueError, rf"{name}: expected (a )?finite numbers? above 0, got {value}")
    for name in SCALES
    for value in (0.0, -1.0, math.nan, math.inf, -math.inf)
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = problem(CASE, torch.uint8, torch.int8, torch.uint8)
    conv2d_int8(**given)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    with pytest.raises(error, match=f"^conv2d_int8: {message}"):
        conv2d_int8(**given)


def test_errors_of_float_outputs() -> None:
    given = problem(CASE, out_dtype=torch.bfloat16, residual_dtype=torch.bfloat16)
    conv2d_int8(**given)
    for name, value in (("residual_scale", 0.1), ("residual_zero_point", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected None without an 8-bit residual"):
            conv2d_int8(**{**given, name: value})
    with pytest.raises(TypeError, match=r"residual: expected uint8, int8 or torch.bfloat16 as out"):
        conv2d_int8(**{**given, "residual": given["residual"].half()})
    with pytest.raises(ValueError, match=r"residual: expected a tensor that does not require grad"):
        conv2d_int8(**{**given, "residual": grad(given["residual"])})
    with torch.no_grad():
        conv2d_int8(**{**given, "residual": grad(given["residual"])})
    with pytest.raises(ValueError, match=r"bias: expected finite numbers of at most 3.4"):
        conv2d_int8(**{**given, "bias": given["bias"] * math.inf})


def test_sums_of_too_many_terms() -> None:
    given = {"x_scale": 1.0, "x_zero_point": 0, "weight_scale": 1.0, "out_dtype": torch.float32}
    for c, fits in ((14336, True), (14337, False)):
        x, w = torch.ones(1, c, 1, 1, dtype=torch.uint8), torch.ones(1, c, 1, 1, dtype=torch.int8)
        if fits:
            assert conv2d_int8(x, w, **given).item() == c
            continue
        with pytest.raises(ValueError, match=r"weight: expected at most 14336 products .* 14337"):
            conv2d_int8(x, w, **given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_calls_look_at_the_data_too() -> None:
    given = problem(CASE)
    run = torch.compile(conv2d_int8, fullgraph=True, backend="aot_eager")
    run(**given)
    with pytest.raises(ValueError, match=r"weight_scale: expected finite numbers above 0, got 0"):
        run(**{**given, "weight_scale": torch.zeros(8)})


def test_weights_that_cannot_be_packed() -> None:
    for weight, error, message in (
        (torch.ones(1, 1, 1, 1), TypeError, "expected an int8 Tensor, got torch.float32"),
        (None, TypeError, "expected an int8 Tensor, got NoneType"),
        (torch.ones(3, dtype=torch.int8), ValueError, r"expected 4 dimensions .* got \[3\]"),
        (torch.ones(0, 1, 1, 1, dtype=torch.int8), ValueError, r"none of them 0, got \[0, 1, 1, 1"),
    ):
        with pytest.raises(error, match=f"^pack_conv2d_int8: weight: .*{message}"):
            pack_conv2d_int8(weight)
