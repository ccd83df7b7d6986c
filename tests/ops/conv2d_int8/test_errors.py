"""What a user of conv2d_int8 gets wrong: errors that name the argument, expected and got."""

import math
from typing import Any

import pytest
import torch
from support.conv2d_int8_cases import CASE, ERRORS, grad, problem

from fastcnn.functional import conv2d_int8, pack_conv2d_int8


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
        (torch.ones(1, 1, 1, 1), TypeError, "expected int8, got torch.float32; quantise it"),
        (None, TypeError, "expected a Tensor, got NoneType"),
        (torch.ones(3, dtype=torch.int8), ValueError, r"expected 4 dimensions .* got \[3\]"),
        (torch.ones(0, 1, 1, 1, dtype=torch.int8), ValueError, r"none of them 0, got \[0, 1, 1, 1"),
    ):
        with pytest.raises(error, match=f"^pack_conv2d_int8: weight: .*{message}"):
            pack_conv2d_int8(weight)


def test_what_is_said_of_floats_quantises_them() -> None:
    image, kernel = torch.rand(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    given: dict[str, Any] = {"x_scale": 1 / 255, "x_zero_point": 0, "weight_scale": 1.0}
    named = {"torch": torch, "x": image, "weight": kernel, **given}
    for name in ("x", "weight"):
        # Before the others are asked for: whoever brings floats has no out_scale either.
        with pytest.raises(TypeError, match=f"^conv2d_int8: {name}: .*float32; quantise it") as e:
            conv2d_int8(named["x"], named["weight"], **given)
        exec(str(e.value).split(": ", 3)[3], named)
    given["weight_scale"] = named["weight_scale"]
    y = conv2d_int8(named["x"], named["weight"], **given, out_dtype=torch.float32)
    # Each of 27 products is off by half a step of the weight, and x < 1; and of x, half of 1 / 255.
    steps = kernel.abs().amax((1, 2, 3)) / 127
    bound = 27 * steps / 2 + kernel.abs().sum((1, 2, 3)) / 510 + 27 * steps / 1020
    expected = torch.nn.functional.conv2d(image, kernel)
    assert ((y - expected).abs() <= bound[:, None, None] + 1e-5).all()
