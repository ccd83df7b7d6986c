"""Triton's 8-bit convolution gives the reference's integers, and its floats to the bit."""

import itertools
from typing import Any

import pytest
import torch
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.conv2d_triton_cases import GEOMETRIES
from support.device import DEVICE, thinned
from torch import Tensor

from fastcnn.ops.conv2d_int8.arguments import Call
from fastcnn.ops.conv2d_int8.cuda import launch
from fastcnn.reference.conv2d_int8 import conv2d_int8 as reference
from fastcnn.triton.tiles import Tile

pytestmark = pytest.mark.gpu
SMALL = Tile(m=32, n=16, k=32, warps=4, stages=2, group=2)


def integers(*sizes: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """The whole range, the ends included, in channels_last."""
    info = torch.iinfo(dtype)
    t = torch.randint(info.min, info.max + 1, sizes, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last).to(DEVICE)


PLAIN = {
    "bias": None, "residual": None, "residual_scale": None, "residual_zero_point": None,
    "out_dtype": torch.uint8, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1,
    "act": "none",
}  # fmt: skip


def check(x: Tensor, weight: Tensor, tile: Tile | None = SMALL, **options: Any) -> None:
    weight_scale = (torch.rand(weight.shape[0]) / 100 + 1e-3).to(DEVICE)
    arguments: dict[str, Any] = {
        "weight_scale": weight_scale, "x_scale": 0.037, "out_scale": 0.21, "out_zero_point": 117,
        "x_zero_point": 3 if x.dtype is torch.int8 else 131, **PLAIN, **options,
    }  # fmt: skip
    want = reference(x, weight, **arguments)
    arguments["act"] = ("none", "relu", "relu6").index(arguments["act"])
    y = torch.empty_like(want, memory_format=torch.channels_last)
    sums = weight.cpu().int().numpy().sum((1, 2, 3))
    launch(Call(x, weight, **arguments), torch.tensor(sums).int().to(DEVICE), y, tile)
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("name", "dtype"), thinned(itertools.product(GEOMETRIES, (torch.uint8, torch.int8)), 3)
)
def test_geometries(name: str, dtype: torch.dtype) -> None:
    # The zero point is not 0: a border that multiplied zeros would be seen.
    sizes, window, geometry = GEOMETRIES[name]
    check(integers(*sizes, dtype=dtype), integers(*window), **geometry)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("c", [3, 40])
def test_borders_of_zeros(c: int, dtype: torch.dtype) -> None:
    # Another kernel, whose taps are in one range with 3 channels.
    given = {"x_zero_point": 0, "padding": (1, 2), "stride": (2, 1)}
    check(integers(2, c, 5, 4, dtype=dtype), integers(8, c, 3, 3), **given)


OUTPUTS = [
    {"out_dtype": torch.uint8},
    {"out_dtype": torch.int8, "out_zero_point": -9},
    *(
        {"out_dtype": dtype, "out_scale": None, "out_zero_point": None}
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: str(output["out_dtype"]))
def test_every_epilogue(output: dict[str, Any]) -> None:
    floating = output["out_dtype"].is_floating_point
    scaled = {"residual_scale": 0.11, "residual_zero_point": 5}
    residuals: list[dict[str, Any]] = [
        {},
        {"residual": integers(2, 8, 5, 4), **scaled},
        {"residual": integers(2, 8, 5, 4, dtype=torch.uint8), **scaled},
    ]
    if floating:
        t = torch.randn(2, 8, 5, 4, device=DEVICE).to(output["out_dtype"])
        residuals.append({"residual": t.contiguous(memory_format=torch.channels_last)})
    biases = None, torch.randn(8, device=DEVICE) * 9
    options = itertools.product(("none", "relu", "relu6"), residuals, biases, (1, 8))
    for act, residual, bias, groups in thinned(options, 13):
        weight = integers(8, 8 // groups, 3, 3)
        given = {**output, **residual, "act": act, "bias": bias, "groups": groups}
        check(integers(2, 8, 5, 4), weight, padding=(1, 1), **given)


def test_ties_go_to_the_even_one_and_ends_saturate() -> None:
    # One channel times 1: z is x / 2, a tie for every odd x; and sums of 64 * 128 * 127.
    x, weight = integers(1, 1, 16, 16), torch.ones(1, 1, 1, 1, dtype=torch.int8, device=DEVICE)
    half = {
        "weight_scale": torch.ones(1, device=DEVICE),
        "x_scale": 1.0,
        "out_scale": 2.0,
        "out_dtype": torch.int8,
        "x_zero_point": 0,
    }
    for zero_point in (0, 1):  # added behind the rounding
        check(x, weight, **half, out_zero_point=zero_point)
    for value in (-128, 127):
        full = torch.full_like(integers(1, 64, 2, 2), value)
        check(full, torch.full_like(integers(8, 64, 1, 1), 127), x_zero_point=0, out_scale=1e-4)


def test_default_tiles_and_empty_batch() -> None:
    check(integers(2, 64, 4, 4), integers(16, 64, 3, 3), tile=None, padding=(1, 1))
    check(integers(2, 8, 4, 4), integers(8, 1, 3, 3), tile=None, padding=(1, 1), groups=8)
    check(integers(0, 8, 4, 4), integers(16, 8, 1, 1), tile=None)
