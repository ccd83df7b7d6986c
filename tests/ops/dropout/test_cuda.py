"""The CUDA kernels of dropout, run by the emulator, against the reference.

Masks must be the reference's, bit for bit. A value is one product: float32's own rounding and that
of the scale, 2^-24 each, then the output's dtype's; with a residual one more of the sum.
"""

import itertools

import pytest
import torch
from cuda_emu.run import DTYPE_NUMBER, Case, Result, run_cases
from support.seeds import DROPOUT_SEED, seeded
from torch import Tensor

from fastcnn import reference
from fastcnn.reference.dropout import draws, threshold

INVALID_VALUE = 1  # cudaErrorInvalidValue
U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last")]
Shape = tuple[int, int, int, int]
# n, c, h, w. A warp owns 256 elements a tile; a step of channels_last is 8 pixels.
SHAPES: list[Shape] = [
    (1, 1, 1, 1),  # one element
    (3, 5, 1, 1),  # 1x1 images: flat in both layouts
    (2, 1, 7, 5),  # one channel: likewise; rests of a tile
    (1, 8, 8, 8),  # whole blocks and whole vectors
    (2, 16, 7, 7),  # planes that straddle blocks, at every phase
    (3, 24, 4, 5),  # phases 0 and 4
    (2, 5, 9, 11),  # no whole vectors: one element at a time
    (1, 40, 3, 43),  # 129 pixels: more than one run of 64, the last one a single pixel
    (2, 8, 33, 32),  # several tiles of a warp and steps over the grid
]


def in_memory(t: Tensor, channels_last: bool) -> Tensor:
    return (t.permute(0, 2, 3, 1) if channels_last else t).contiguous()


class Call:
    """Data of one call and what must come out."""

    def __init__(
        self, dtype: torch.dtype, shape: Shape, residual: bool, per_channel: bool, p: float = 0.1
    ) -> None:
        g = seeded(sum(shape))
        self.shape, self.dtype, self.p, self.per_channel = shape, dtype, p, per_channel
        self.x = torch.randn(shape, generator=g).to(dtype)
        self.residual = torch.randn(shape, generator=g).to(dtype) if residual else None

    def case(
        self, channels_last: bool, skip: dict[str, int] | None = None, inplace: bool = False
    ) -> Case:
        n, c, h, w = self.shape
        numbers = {
            "n": n, "c": c, "hw": h * w, "channels_last": int(channels_last), "p": self.p,
            "per_channel": int(self.per_channel), "dtype": DTYPE_NUMBER[self.dtype], "sm_count": 3,
        }  # fmt: skip
        image = in_memory(self.x, channels_last)
        inputs: dict[str, Tensor | None] = {"seed": torch.tensor([DROPOUT_SEED])}
        if self.residual is not None:
            inputs["residual"] = in_memory(self.residual, channels_last)
        if inplace:
            return Case("apply", numbers, inputs, updated={"x": image}, skip=skip or {})
        return Case("apply", numbers, {"x": image, **inputs}, {"y": image}, skip=skip or {})

    def check(self, result: Result, channels_last: bool) -> None:
        assert result.error == 0
        (y,) = result.tensors.values()
        x = self.x.double()
        dropped = reference.dropout(x, DROPOUT_SEED, self.p, None, self.per_channel)
        expected = dropped if self.residual is None else dropped + self.residual
        if self.residual is None:
            assert torch.equal(y != 0, in_memory(dropped != 0, channels_last))
        limits = torch.finfo(self.dtype)
        error = 3 * U * (dropped.abs() + expected.abs())
        error += limits.eps / 2 * (expected.abs() + error).clamp(min=limits.smallest_normal)
        difference = (y.double() - in_memory(expected, channels_last)).abs()
        assert (difference <= in_memory(error, channels_last)).all()


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype: torch.dtype, channels_last: bool) -> None:
    calls = [Call(dtype, *rest) for rest in itertools.product(SHAPES, [False, True], [False, True])]
    results = run_cases("dropout", [call.case(channels_last) for call in calls])
    for call, result in zip(calls, results, strict=True):
        call.check(result, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_misaligned_and_in_place(channels_last: bool) -> None:
    # One tensor off a 16-byte address suffices to move all of them element by element.
    calls, cases = [], []
    for dtype, per_channel in itertools.product(DTYPES[:2], [False, True]):
        call = Call(dtype, (2, 16, 7, 8), True, per_channel)
        for skip in ({"x": 1}, {"residual": 1}, {"y": 1}, {"x": 3, "residual": 2, "y": 5}):
            calls.append(call)
            cases.append(call.case(channels_last, skip))
        calls.append(call)
        cases.append(call.case(channels_last, inplace=True))
    for call, result in zip(calls, run_cases("dropout", cases), strict=True):
        call.check(result, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_every_probability(channels_last: bool) -> None:
    # A threshold with and without lower bits, and the ends. With 1 - p = 2^-17 the upper half is 0:
    # an element is kept only where its first draw is 0, and the further one decides.
    calls = [
        Call(torch.float32, (2, 8, 33, 16), False, per_channel, p)
        for p in (0.5, 0.1, 1.0, 1e-12, 1 - 2**-17, 1 - 1e-12)
        for per_channel in (False, True)
    ]
    results = run_cases("dropout", [call.case(channels_last) for call in calls])
    for call, result in zip(calls, results, strict=True):
        call.check(result, channels_last)


def test_not_finite() -> None:
    # As in PyTorch, a dropped NaN or infinity is a NaN.
    call = Call(torch.bfloat16, (1, 1, 1, 64), False, False, 0.5)
    call.x[..., ::2], call.x[..., 1::4] = torch.nan, torch.inf
    (result,) = run_cases("dropout", [call.case(False)])
    y, expected = result.tensors["y"], reference.dropout(call.x.double(), DROPOUT_SEED, 0.5)
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(y), what(expected))
    assert expected.isinf().any()
    assert expected.isfinite().any()


def test_draws_far_out() -> None:
    # Logical indices beyond 2^32, and beyond 2^35, where the counter's upper half begins, at every
    # phase. p is chosen so that elements meet the further draw: the upper half of the threshold is
    # the first draw of one of them.
    first = torch.cat([2**k + torch.arange(-20, 20) for k in (32, 35, 40, 62)])
    index = first[:, None] + torch.arange(8)
    u = draws(DROPOUT_SEED, index)
    for p in (0.5, 1 - u[17, 3].item() / 2**32, 1 - (u[99, 5].item() + 1) / 2**32):
        numbers = {"seed": DROPOUT_SEED, "p": p, "count": 50, "sm_count": 3}
        parts = first.split(50)
        cases = [
            Case(
                "keep",
                numbers | {"count": len(part)},
                {"first": part},
                {"bits": torch.zeros(len(part), dtype=torch.int32)},
            )
            for part in parts
        ]
        found = torch.cat([result.tensors["bits"] for result in run_cases("dropout", cases)])
        expected = ((u < threshold(p)).long() << torch.arange(8)).sum(-1)
        assert torch.equal(found.long(), expected)
