"""Problems of conv2d_int8, each at an edge of some backend, and data for them."""

from typing import Any, NamedTuple

import torch
from seeds import seeded
from torch import Tensor

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
