"""The CUDA kernels of group_norm_act and pixel_norm_act, run by the emulator, against float64.

Tolerances, and how z is kept off non-differentiable points: cuda_emu/group_norm_act.py.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from cuda_emu.group_norm_act import EPS, Call, Options, Shape
from cuda_emu.run import Case, run_cases
from support.activations import ACTS

INVALID_VALUE = 1  # cudaErrorInvalidValue
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last")]
FULL: Options = ("relu6", True, True)


def run_all(calls: Sequence[Call], channels_last: bool) -> None:
    """Forward and backward of all calls, one process an op."""
    for op in ("group_norm_act", "pixel_norm_act"):
        own = [call for call in calls if (call.groups is None) == (op == "pixel_norm_act")]
        cases = [case for call in own for case in call.cases(channels_last)]
        results = run_cases(op, cases) if cases else []
        for call, forward, backward in zip(own, results[::2], results[1::2], strict=True):
            print(op, call.shape, call.groups, call.act)  # pytest shows it beside a failure
            call.check(forward, backward, channels_last)


def group_shapes(wide: int, channels_last: bool) -> list[tuple[Shape, int]]:
    """n, c, h, w and the groups. `wide` elements are a vector."""
    both = [
        ((2, 1, 1, 1), 1),  # one value a group: its variance is 0
        ((2, 20, 1, 1), 4),  # 1x1 images
        ((3, 15, 5, 7), 3),  # c / g = 5; no whole vectors in either layout
        ((2, 3, 4, 2 * wide), 3),  # c / g = 1
        ((2, 6, 4, wide), 2),  # c / g = 3
        ((9, 2, 1, wide), 1),  # a tile of two vectors: 256 of them share a block, which is not full
    ]
    if channels_last:
        return [
            *both,
            ((2, 8 * wide, 3, 5), 4),  # whole vectors a group: held on the chip
            ((2, 3 * wide, 5, 5), wide),  # c / g = 3, but whole vectors a pixel
            ((1, 5 * wide, 6, 11), wide),  # likewise c / g = 5; several splits
            ((1, 40 * wide, 7, 5), 10),  # two blocks of 20 columns, 12 lanes each
            ((2, 320, 1, 1), 1),  # 1x1 images as rows
        ]
    return [
        *both,
        ((2, 8, 7, 7), 2),  # planes of 49
        ((1, 3, 1, 1025 * wide), 1),  # 3 * 1025 vectors for 256 lanes on the chip
        ((4, 1, 1, 31 * wide), 1),  # a block of one warp a channel in the backward
    ]


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype, channels_last: bool) -> None:
    wide = 16 // dtype.itemsize
    calls = [
        Call(dtype, shape, groups, FULL) for shape, groups in group_shapes(wide, channels_last)
    ]
    # Beyond what a block holds, and with so many SMs that a tile of 32 KiB is left to several
    # blocks: the multi-pass kernels, with one split and with several.
    if channels_last:
        calls += [
            Call(dtype, (1, 2 * wide, 16, 32), 1, FULL, sm_count=132),
            Call(dtype, (1, 2 * wide, 16, 163), 1, FULL, sm_count=1),
        ]
    else:
        calls += [
            Call(dtype, (1, 2, 16, 70 * wide), 1, FULL, sm_count=132),
            Call(dtype, (1, 2, 41, 64 * wide), 1, FULL, sm_count=1),
        ]
    run_all(calls, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels(dtype: torch.dtype, channels_last: bool) -> None:
    wide = 16 // dtype.itemsize
    both: list[Shape] = [
        (1, 1, 1, 1),  # one value
        (2, 5, 3, 3),  # no whole vectors in either layout
        (2, 3 * wide, 1, 2 * wide),  # in both
        (1, 7, 2, 35 * wide),  # NCHW: a third tile with 6 columns
        (3, 40 * wide, 5, 1),  # channels_last: lanes of a row turn several times
        (2, 33, 1, wide),  # NCHW: one column, 256 lanes, fewer channels
    ]
    # A row beyond what a block holds is read from memory three times: the largest case by far. The
    # half types differ from float32 by their conversions, which the other rows have too.
    large: list[Shape] = [(1, 300, 1, 3 * wide)]
    if channels_last:
        large = [(1, 5121 * wide, 1, 1)] if dtype is torch.float32 else []
    run_all([Call(dtype, shape, None, FULL) for shape in both + large], channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype: torch.dtype, channels_last: bool) -> None:
    wide = 16 // dtype.itemsize
    options = itertools.product(ACTS, [True, False], [True, False])
    shape = (2, 2 * wide, 3, wide)  # whole vectors
    # One group on the chip, and as many as there are channels, which channels_last does not hold.
    groups = [1, 2 * wide, None]
    calls = [Call(dtype, shape, g, o) for o, g in zip(options, itertools.cycle(groups))]
    calls += [Call(dtype, shape, g, (act, True, True)) for act in ACTS for g in groups]
    run_all(calls, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(dtype: torch.dtype, channels_last: bool) -> None:
    # E[x^2] - E[x]^2 would have an error of 1e8 * U = 6 in a variance of 1. The variance of bf16 is
    # that of its rounding, and 0 in some groups.
    calls = [
        Call(dtype, (2, 8, 16, 16), groups, ("relu", True, True), center=1e4, sm_count=sm_count)
        for groups, sm_count in ((2, 3), (1, 3), (1, 132), (8, 132), (None, 3))
    ]
    if dtype is torch.float32:
        # The bound says something.
        assert (calls[0].var_error < 0.5 * calls[0].var).all(), calls[0].var_error / calls[0].var
    run_all(calls, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned(dtype: torch.dtype, channels_last: bool) -> None:
    # One tensor off a 16-byte address is enough: UBSan ends the run at a misaligned vector.
    # Parameters and statistics are floats at any address: they may be views into a larger tensor.
    wide = 16 // dtype.itemsize
    both = ["mean", "var", "weight", "bias"]
    forward = [["x"], ["y"], both]
    backward = [["dy"], ["x"], ["dx"], [*both, "dweight", "dbias"]]
    for groups, op in ((2, "group_norm_act"), (None, "pixel_norm_act")):
        call = Call(dtype, (2, 2 * wide, 2, wide), groups, FULL)
        skips = itertools.zip_longest(forward, backward, fillvalue=())
        cases = [case for skip in skips for case in call.cases(channels_last, *skip)]
        results = run_cases(op, cases)
        for result in zip(results[::2], results[1::2], strict=True):
            call.check(*result, channels_last)


def test_the_bounds_are_narrow() -> None:
    # A kernel that left out the groups' part of dx would be seen.
    call = Call(torch.float32, (2, 8, 6, 6), 2, FULL)
    without = call.spread((call.var + EPS).rsqrt()) * call.weight[:, None, None] * call.dz
    assert ((call.dx - without).abs() > call.dx_error).double().mean() > 0.9


# op, forward or backward, n, c, hw, groups, channels_last: more than 2^31 - 1 blocks, or parts of
# which a block may take 32
TOO_LARGE = [
    ("group_norm_act", "fwd", 2**40, 2, 1, 2, 1),  # tiles on the chip, 256 a block
    ("group_norm_act", "fwd", 2**31, 1, 2**16, 1, 0),  # a block a sample
    ("group_norm_act", "bwd", 2**31, 1, 2**16, 1, 0),
    ("group_norm_act", "bwd", 2**30, 4, 4, 4, 1),  # few blocks a sample, but many groups
    ("group_norm_act", "bwd", 1, 2**33, 4, 1, 1),  # a block a channel, which merges its sums
    ("pixel_norm_act", "fwd", 2**31, 2, 2, 1, 0),
    ("pixel_norm_act", "fwd", 2**40, 2, 1, 1, 1),
    ("pixel_norm_act", "bwd", 2**31, 2, 2, 1, 0),
    ("pixel_norm_act", "bwd", 2**40, 2, 1, 1, 1),
    ("pixel_norm_act", "bwd", 1, 2**31, 2, 1, 0),  # a block a channel
]


def test_more_blocks_than_a_grid_has_are_refused() -> None:
    # Counted in 32 bits they would be 0 or a few. There are no tensors: nothing must be launched.
    names = ("n", "c", "hw", "groups", "channels_last")
    others = {"dtype": 0, "act": 1, "eps": EPS, "sm_count": 132}
    for op in ("group_norm_act", "pixel_norm_act"):
        sizes = [
            (way, dict(zip(names, rest, strict=True))) for of, way, *rest in TOO_LARGE if of == op
        ]
        results = run_cases(op, [Case(way, {**numbers, **others}) for way, numbers in sizes])
        assert [result.error for result in results] == [INVALID_VALUE] * len(sizes)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_an_infinite_mean(channels_last: bool) -> None:
    # As in PyTorch's running statistics: the sum over the count, and a variance that is NaN. On the
    # chip, and in several passes with one split and with several.
    for sm_count, shape in ((3, (2, 8, 16, 16)), (132, (1, 8, 16, 64)), (1, (1, 8, 16, 400))):
        call = Call(torch.float32, shape, 2, ("none", True, True), sm_count=sm_count)
        call.x[0, 1, 3, 2:4] = torch.inf
        (result,) = run_cases("group_norm_act", call.cases(channels_last)[:1])
        assert result.tensors["mean"].isinf().flatten().tolist() == [True] + [False] * (
            2 * shape[0] - 1
        )
        assert result.tensors["var"].isnan().equal(result.tensors["mean"].isinf())


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_squares_beyond_float32(channels_last: bool) -> None:
    # Of finite values: the variance is infinite, as PyTorch's is, and y the bias. On the chip, and
    # in several passes with one split and with several; by pixels.
    for op, groups in (("group_norm_act", 2), ("pixel_norm_act", None)):
        calls = [
            Call(torch.float32, shape, groups, ("none", True, True), sm_count=sm_count)
            for sm_count, shape in ((3, (2, 8, 16, 16)), (132, (1, 8, 16, 64)), (3, (2, 6, 5, 7)))
        ]
        for call in calls:
            call.x.mul_(1e30)
        cases = [call.cases(channels_last)[0] for call in calls]
        for call, result in zip(calls, run_cases(op, cases), strict=True):
            assert result.tensors["var"].isposinf().all(), (op, call.shape)
            assert result.tensors["mean"].isfinite().all(), (op, call.shape)
            assert call.bias is not None
            expected = call.bias[:, None, None].expand(call.shape)
            expected = expected.permute(0, 2, 3, 1) if channels_last else expected
            assert torch.equal(result.tensors["y"], expected), (op, call.shape)
