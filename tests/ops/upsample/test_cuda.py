"""The CUDA kernels of upsample, run by the emulator, against the reference in float64 and autograd.

How near: support/upsample_cases.py.
"""

from collections.abc import Sequence

import pytest
import torch
from cuda_emu.run import DTYPE_NUMBER, Case, Result, run_cases
from support.seeds import seeded
from support.tolerance import assert_rounded
from support.upsample_cases import axis, resize_errors
from torch import Tensor

from fastcnn import reference
from fastcnn.ops.upsample.arguments import SAMPLING_NUMBER

INVALID_VALUE = 1  # cudaErrorInvalidValue
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last")]
Shape = tuple[int, int, int, int]
Scales = tuple[float | None, float | None]


def shapes(wide: int) -> list[tuple[Shape, tuple[int, int], Scales, int]]:
    """Sizes n, c, h, w; the output's h and w; the scales given; channels of skip.

    `wide` elements are a vector; a thread has 4 to 32 rows.
    """
    none: Scales = (None, None)
    return [
        ((2, 3, 3, 5), (6, 10), none, 0),  # doubled, no whole vectors
        ((1, wide, 4, wide), (8, 2 * wide), none, 0),  # whole ones in both layouts
        ((2, 2 * wide, 3, 4), (6, 8), none, wide),  # and behind a skip of whole ones
        ((1, 2 * wide, 3, wide), (6, 2 * wide), none, 3),  # behind one that moves them off
        ((2, 3, 1, 1), (5, wide), none, 2),  # 1-pixel input
        ((1, 2, 7, 9), (1, 1), none, 0),  # 1-pixel output
        ((1, 2, 5, 8), (5, 8), none, 1),  # the identity
        ((1, 2, 4, 5), (9, 11), (2.3, 2.3), 0),  # by the factor given
        ((1, 3, 7, 4), (7, 4), (1.1, 1.2), 0),  # a factor that leaves the sizes
        ((1, wide, 19, 23), (5, 6), (1 / 3.7, 1 / 3.7), 0),  # pixels that are in no output
        ((1, wide, 2, 3), (13, 40), none, 0),  # more outputs a pixel than are loaded at once
        ((1, 1, 70, 3), (140, 6), none, 0),  # several bands of rows
        ((3, 5, 9, 31), (18, 62), none, 0),  # several blocks
    ]


class Call:
    """Data for a forward and a backward, and what must come out."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Shape,
        size: tuple[int, int],
        scales: Scales = (None, None),
        c_skip: int = 0,
        how: tuple[str, bool] = ("bilinear", False),
        sm_count: int = 1,
        skip_last: bool = False,
    ) -> None:
        g = seeded(1)
        self.dtype, self.how, self.sm_count = dtype, how, sm_count
        self.size, self.scales, self.c_skip = size, scales, c_skip
        n, c, _, _ = shape
        self.x_at, self.skip_at = (0, c) if skip_last else (c_skip, 0)
        self.x = torch.randn(shape, generator=g).to(dtype)
        self.skip = torch.randn((n, c_skip, *size), generator=g).to(dtype) if c_skip else None
        self.dy = torch.randn((n, c_skip + c, *size), generator=g).to(dtype)
        x = self.x.double().requires_grad_()
        self.y = reference.upsample(x, size, scales, *how, self.skip, skip_last)
        (self.dx,) = torch.autograd.grad(self.y, x, self.dy.double())
        self.y = self.y.detach()
        h, w = (axis(shape[2 + d], size[d], scales[d], *how, dtype) for d in range(2))
        self.errors = resize_errors(self.x, self.dy[:, self.x_at : self.x_at + c], h, w)
        if how[0] != "bilinear":
            self.errors["y"] = torch.zeros_like(self.errors["y"])
        beside = torch.zeros(n, c_skip, *size)
        parts = [self.errors["y"], beside] if skip_last else [beside, self.errors["y"]]
        self.errors["y"] = torch.cat(parts, 1)

    def numbers(self, channels_last: bool, channels: int) -> dict[str, float]:
        n, c, h, w = self.x.shape
        return {
            "n": n, "c": c, "h_in": h, "w_in": w, "h_out": self.size[0], "w_out": self.size[1],
            "scale_h": self.scales[0] or 0, "scale_w": self.scales[1] or 0,
            "sampling": SAMPLING_NUMBER[self.how], "channels_last": int(channels_last),
            "image": channels * self.size[0] * self.size[1],
            "pixel": channels if channels_last else 1,
            "dtype": DTYPE_NUMBER[self.dtype], "sm_count": self.sm_count,
        }  # fmt: skip

    def forward(self, channels_last: bool, skip: Sequence[str] = ()) -> Case:
        return Case(
            "fwd",
            {
                **self.numbers(channels_last, self.y.shape[1]),
                "c_skip": self.c_skip,
                "x_at": self.x_at,
                "skip_at": self.skip_at,
            },
            inputs={
                "x": in_memory(self.x, channels_last),
                "skip": None if self.skip is None else in_memory(self.skip, channels_last),
            },
            outputs={"y": in_memory(self.y.to(self.dtype), channels_last)},
            skip=dict.fromkeys(skip, 1),
        )

    def backward(self, channels_last: bool, skip: Sequence[str] = ()) -> Case:
        # dy of all channels: the kernel reads its own behind those of the skip, in place.
        before = self.x_at * (1 if channels_last else self.size[0] * self.size[1])
        return Case(
            "bwd",
            {**self.numbers(channels_last, self.dy.shape[1]), "offset": before * self.x.itemsize},
            inputs={"dy": in_memory(self.dy, channels_last)},
            outputs={"dx": in_memory(self.x, channels_last)},
            skip=dict.fromkeys(skip, 1),
        )

    def check(self, name: str, result: Result, channels_last: bool) -> None:
        assert result.error == 0
        both = getattr(self, name), self.errors[name]
        expected, error = (in_memory(t, channels_last) for t in both)
        about = f"{name} of {tuple(self.x.shape)} to {self.size}, {self.how}"
        assert_rounded(about, result.tensors[name], expected, error)


def in_memory(t: Tensor, channels_last: bool) -> Tensor:
    return (t.permute(0, 2, 3, 1) if channels_last else t).contiguous()


@pytest.mark.parametrize("how", SAMPLING_NUMBER, ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, channels_last: bool, how: tuple[str, bool]) -> None:
    calls = [Call(dtype, *shape, how=how) for shape in shapes(16 // dtype.itemsize)]
    calls += [
        Call(dtype, *shape, how=how, skip_last=True)
        for shape in shapes(16 // dtype.itemsize)
        if shape[3] > 0
    ]
    cases = [call.forward(channels_last) for call in calls]
    cases += [call.backward(channels_last) for call in calls]
    results = run_cases("upsample", cases)
    for call, forward, backward in zip(
        calls, results[: len(calls)], results[len(calls) :], strict=True
    ):
        call.check("y", forward, channels_last)
        call.check("dx", backward, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype, channels_last: bool) -> None:
    # One tensor off a 16-byte address is enough: UBSan ends the run at a misaligned vector.
    wide = 16 // dtype.itemsize
    call = Call(dtype, (1, wide, 2, wide), (4, 2 * wide), c_skip=wide)
    forward = [call.forward(channels_last, [name]) for name in ("x", "skip", "y")]
    backward = [call.backward(channels_last, [name]) for name in ("dy", "dx")]
    results = run_cases("upsample", [*forward, *backward])
    for result in results[:3]:
        call.check("y", result, channels_last)
    for result in results[3:]:
        call.check("dx", result, channels_last)


def test_not_finite() -> None:
    # An infinity reaches the pixels that it is in, and no others: neither by a weight of 0 nor by
    # the loads behind the end of a column's range.
    x = torch.randn(1, 1, 5, 6)
    x[0, 0, 2, 3] = torch.inf
    cases, expected = [], []
    for how in SAMPLING_NUMBER:
        call = Call(torch.float32, (1, 1, 5, 6), (10, 12), how=how)
        call.x = x
        dy = torch.randn(1, 1, 10, 12)
        dy[0, 0, 5, 3] = torch.inf
        call.dy = dy
        leaf = x.clone().requires_grad_()
        align = how[1] if how[0] == "bilinear" else None
        y = torch.nn.functional.interpolate(leaf, (10, 12), mode=how[0], align_corners=align)
        y.backward(dy)
        cases += [call.forward(False), call.backward(False)]
        expected += [y.detach(), leaf.grad]
    for case, result, e in zip(cases, run_cases("upsample", cases), expected, strict=True):
        got = result.tensors["y" if case.op == "fwd" else "dx"]
        assert torch.equal(got.isfinite(), e.isfinite()), case.numbers


def test_division() -> None:
    # By multiplication and one correction, also where the numerator fills 63 bits.
    largest = 2**63 - 1
    cases = []
    for divisor in (1, 2, 3, 7, 56, 255, 2**31 - 1, 2**40 + 1, largest):
        n = torch.tensor(
            [0, 1, divisor - 1, divisor, largest, largest - divisor, largest // divisor * divisor]
        )
        cases.append(
            Case(
                "divide",
                {"divisor": divisor, "count": n.numel()},
                inputs={"n": n},
                outputs={"quotient": n, "remainder": n},
            )
        )
    for case, result in zip(cases, run_cases("upsample", cases), strict=True):
        n, divisor = case.inputs["n"], int(case.numbers["divisor"])
        assert result.tensors["quotient"].tolist() == [int(i) // divisor for i in n]
        assert result.tensors["remainder"].tolist() == [int(i) % divisor for i in n]
