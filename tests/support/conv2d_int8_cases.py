"""Problems of conv2d_int8, each at an edge of some backend, and data for them."""

import math
from typing import Any, NamedTuple

import torch
from support.device import DEVICE, on_gpu
from support.seeds import seeded
from torch import Tensor

from fastcnn.functional import conv2d_int8

INT8 = [torch.uint8, torch.int8]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTS = ["none", "relu", "relu6"]


class Case(NamedTuple):
    """An input [n, c, h, w], a convolution, and why it is in the list."""

    sizes: tuple[int, int, int, int]
    c_out: int
    kernel: int
    reason: str
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))}-{self.c_out}-k{self.kernel}-g{self.groups}"


CASES = [
    Case((2, 64, 7, 9), 48, 1, "1x1: a plain product of matrices"),
    Case((2, 17, 5, 5), 13, 1, "odd channels, no whole number of vectors"),
    Case((1, 3, 23, 21), 16, 7, "the stem", stride=2, padding=3),
    Case((2, 32, 8, 8), 32, 3, "3x3", padding=1),
    Case((2, 5, 9, 6), 7, 3, "3x3 with a stride, odd channels", stride=2, padding=1),
    Case((3, 24, 7, 7), 40, 1, "1x1 with a stride: a projection", stride=2),
    Case((1, 16, 11, 9), 16, 3, "dilation", padding=2, dilation=2),
    Case((1, 8, 9, 12), 6, 3, "both axes differ", stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    Case((1, 32, 6, 6), 64, 3, "groups", padding=1, groups=4),
    Case((2, 6, 7, 7), 9, 3, "groups of odd channels", padding=1, groups=3),
    Case((2, 32, 9, 9), 32, 3, "depthwise", padding=1, groups=32),
    Case((1, 19, 9, 9), 19, 3, "depthwise, odd channels, a stride", 2, 1, groups=19),
    Case((1, 4, 6, 6), 8, 3, "depthwise with a multiplier", padding=1, groups=4),
    Case((1, 1, 8, 8), 1, 3, "one channel: both layouts at once", padding=1),
    Case((37, 20, 1, 1), 10, 1, "1x1 images: both layouts at once"),
    Case((1, 8, 3, 3), 4, 2, "more padding than image: most windows see padding", padding=4),
    Case((1, 3, 14, 1), 51, 2, "groups of one channel, where oneDNN errs", (1, 2), (0, 3), 1, 3),
    Case((1, 64, 2, 8), 64, 2, "depthwise with windows that read padding only", 3, 8, 1, 64),
    Case((1, 4, 5, 1), 8, 2, "windows that read padding only", (1, 2), 3, 2),
    Case((1, 33, 1, 5), 1, 5, "rows of windows that do", (3, 1), (5, 6), 2),
    Case((1, 5, 40, 41), 2, 3, "2 channels: many pixels a row, and some are left", padding=1),
    Case((1, 1100, 3, 3), 5, 3, "9900 terms: sums that float32 does not hold", padding=1),
]


def quantised(sizes: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Numbers of an 8-bit type's whole range, channels_last."""
    info = torch.iinfo(dtype)
    t = torch.randint(info.min, info.max + 1, sizes, dtype=dtype, generator=g)
    return t.contiguous(memory_format=torch.channels_last)


def out_sizes(case: Case) -> tuple[int, ...]:
    x = torch.empty(case.sizes, device="meta")
    w = torch.empty(case.c_out, case.sizes[1] // case.groups, case.kernel, case.kernel).to("meta")
    return tuple(torch.nn.functional.conv2d(x, w, None, **case.geometry).shape)


def problem(
    case: Case,
    x_dtype: torch.dtype = torch.uint8,
    out_dtype: torch.dtype = torch.uint8,
    residual_dtype: torch.dtype | None = None,
    act: str = "none",
    seed: int = 0,
    bias_units: Tensor | None = None,
) -> dict[str, Any]:
    """Arguments whose y spreads over its whole range, and a little beyond.

    bias_units: the bias is so many x_scale * weight_scale, in place of random numbers.
    """
    g = seeded(seed)

    def number(dtype: torch.dtype) -> int:
        return int(quantised((1, 1, 1, 1), dtype, g))

    c_in = case.sizes[1] // case.groups
    x, x_scale = quantised(case.sizes, x_dtype, g), 0.0371
    weight = quantised((case.c_out, c_in, case.kernel, case.kernel), torch.int8, g)
    weight_scale = torch.rand(case.c_out, generator=g) * 0.01 + 1e-3
    spread = 0.006 * x_scale * 74 * 74 * (c_in * case.kernel**2) ** 0.5  # z's deviation, roughly
    bias = torch.randn(case.c_out, generator=g) * spread
    if bias_units is not None:
        bias = bias_units * (torch.tensor(x_scale) * weight_scale)
    given = dict(
        x=x, weight=weight, weight_scale=weight_scale, x_scale=x_scale,
        x_zero_point=number(x_dtype), bias=bias, act=act, out_dtype=out_dtype, **case.geometry,
    )  # fmt: skip
    if out_dtype in (torch.uint8, torch.int8):
        given |= {"out_scale": spread / 50, "out_zero_point": number(out_dtype)}
    if residual_dtype in (torch.uint8, torch.int8):
        given["residual"] = quantised(out_sizes(case), residual_dtype, g)
        given |= {"residual_scale": spread / 70, "residual_zero_point": number(residual_dtype)}
    elif residual_dtype is not None:
        residual = torch.randn(out_sizes(case), generator=g) * spread
        given["residual"] = residual.to(residual_dtype, memory_format=torch.channels_last)
    return given


def assert_same(actual: Tensor, expected: Tensor, *case: Any) -> None:
    assert actual.dtype == expected.dtype
    wrong = (actual != expected).sum().item() if actual.shape == expected.shape else None
    assert wrong == 0, (*map(str, case), f"{wrong} of {expected.numel()} differ")


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
    ({"x": lambda t: t[:, :4].clone()}, ValueError, r"x: expected 6 channels .*, got 4"),
    ({"x": lambda t: t[:, :, :0]}, ValueError, r"weight: expected a kernel that fits into"),
    ({"weight": "w"}, TypeError, r"weight: expected a Tensor, got str"),
    ({"weight": Tensor.byte}, TypeError, r"weight: expected int8, got torch.uint8"),
    ({"weight": lambda t: t[0]}, ValueError, r"weight: expected 4 dimensions .*, got \[3, 3, 3\]"),
    ({"weight": lambda t: t[:0]}, ValueError, r"weight: expected 4 dimensions .* none of them 0"),
    ({"groups": 1}, ValueError, r"x: expected 3 channels for weight .* groups=1, got 6"),
    ({"groups": 3}, ValueError, r"groups: expected a divisor of 8 output channels, got 3"),
    ({"groups": 0}, ValueError, r"groups: expected a divisor of 8 output channels, got 0"),
    ({"groups": 1.0}, TypeError, r"groups: expected an integer, got float"),
    ({"stride": 0}, ValueError, r"stride: expected integers from 1 up, got \(0, 0\)"),
    ({"padding": -1}, ValueError, r"padding: expected integers from 0 up, got \(-1, -1\)"),
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
    ({"residual_scale": 9e28, "out_scale": 1.0}, ValueError, r"residual_scale: .*7.92282e\+28 in"),
    ({"x_scale": 1e31, "weight_scale": 1.0}, ValueError, r"x_scale: .* most 7.92282e\+28 in units"),
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
]
ERRORS += [
    ({name: value}, ValueError, rf"{name}: expected (a )?finite numbers? above 0, got {value}")
    for name in ("x_scale", "weight_scale", "residual_scale", "out_scale")
    for value in (0.0, -1.0, math.nan, math.inf, -math.inf)
]


PLAIN = Case((2, 16, 5, 4), 24, 3, "for anything", padding=1)


def on_device(given: dict[str, Any]) -> dict[str, Any]:
    return {k: t.to(DEVICE) if isinstance(t, Tensor) else t for k, t in given.items()}


def call(**given: Any) -> Tensor:
    with on_gpu():
        return conv2d_int8(**on_device(given)).cpu()
