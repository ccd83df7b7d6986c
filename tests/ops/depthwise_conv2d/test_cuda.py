"""The CUDA kernels of depthwise_conv2d, run by the emulator, against float64."""

import pytest
import torch
from cuda_emu.run import DTYPE_NUMBER, Case, Result, run_cases
from support import depthwise_conv2d_cases as cases
from support.activations import ACTS
from support.depthwise_conv2d_cases import Window, made, square
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER

INVALID_VALUE = 1  # cudaErrorInvalidValue
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The channels are two vectors of 16 bytes of float32, and one of a half type.
WINDOWS = [
    square((1, 1, 1, 1), 1, 1, 0, "one value of everything"),
    square((2, 8, 5, 9), 3, 1, 1, "strips of four columns, the last of one"),
    square((1, 16, 9, 8), 3, 2, 1, "downsampling"),
    square((1, 8, 6, 7), 5, 1, 2, "5x5"),
    square((1, 8, 7, 6), 5, 2, 2, "5x5, downsampling"),
    square((1, 8, 4, 4), 7, 1, 3, "7x7: each window is cut by a border"),
    square((1, 8, 9, 9), 7, 2, 3, "7x7, downsampling"),
    square((2, 3, 5, 6), 3, 1, 1, "no whole vectors"),
    square((1, 8, 7, 9), 4, 3, 1, "a window that no kernel is made for"),
    Window((1, 8, 7, 9), (3, 3), (1, 1), (2, 2), (2, 2), "dilation"),
    Window((1, 8, 8, 9), (3, 5), (2, 1), (1, 2), (1, 1), "unequal sides"),
    square((1, 8, 3, 2), 3, 2, 5, "windows without an image"),
]
SPLITS = square((3, 8, 15, 16), 3, 1, 1, "several splits of the weight's gradient")


class Call:
    """What a call's kernels get, and what must come out."""

    def __init__(
        self, window: Window, dtype: torch.dtype, layout: str, act: str = "none", bias: bool = True
    ) -> None:
        self.window, self.layout = window, layout
        self.case = made(window, dtype, layout, act, bias, param_dtype=torch.float32)
        self.exact, self.errors = cases.exact(self.case), cases.errors(self.case)

    def numbers(self) -> dict[str, float]:
        w, dy = self.window, self.case.dy
        sizes: dict[str, float] = {"n": w.sizes[0], "c": w.sizes[1]}
        for i, of in enumerate(("_h", "_w")):
            sizes |= {
                f"size{of}": w.sizes[2 + i], f"size_out{of}": dy.shape[2 + i],
                f"kernel{of}": w.kernel[i], f"stride{of}": w.stride[i],
                f"padding{of}": w.padding[i], f"dilation{of}": w.dilation[i],
            }  # fmt: skip
        return {
            **sizes, "channels_last": int(self.layout == "channels_last"), "sm_count": 3,
            "dtype": DTYPE_NUMBER[self.case.x.dtype], "act": ACT_NUMBER[self.case.act],
        }  # fmt: skip

    def in_memory(self, t: Tensor) -> Tensor:
        last = self.layout == "channels_last"
        return (t.permute(0, 2, 3, 1) if last else t).contiguous()

    def forward(self, skip: dict[str, int] | None = None) -> Case:
        x, weight, bias = self.case[:3]
        inputs = {"x": self.in_memory(x), "weight": weight, "bias": bias}
        outputs = {"y": self.in_memory(self.case.dy)}
        return Case("fwd", self.numbers(), inputs, outputs, skip=skip or {})

    def backward_act(self) -> Case:
        one = self.forward()
        one.inputs["dy"] = self.in_memory(self.case.dy)
        return one

    def backward(self, dy: Tensor, skip: dict[str, int] | None = None) -> list[Case]:
        """dx and dweight of a convolution without an activation."""
        x, weight, _ = self.case[:3]
        of_data = {"dy": dy, "weight": weight}, {"dx": self.in_memory(x)}
        gradients = {"dweight": weight, "dbias": torch.zeros(x.shape[1])}
        of_weight = {"dy": dy, "x": self.in_memory(x)}, gradients
        return [
            Case(op, self.numbers(), *tensors, skip=skip or {})
            for op, tensors in (("bwd_data", of_data), ("bwd_weight", of_weight))
        ]

    def check(self, *results: Result) -> None:
        for result in results:
            assert result.error == 0
            for name, t in result.tensors.items():
                if t.dim() == 4 and name != "dweight":
                    exact, error = map(self.in_memory, (self.exact[name], self.errors[name]))
                else:
                    exact, error = self.exact[name], self.errors[name]
                assert_rounded(f"{name} of {self.window}", t, exact, error)


def run_all(calls: list[Call]) -> None:
    given = [[c.forward(), *c.backward(c.in_memory(c.case.dy))] for c in calls]
    results = run_cases("depthwise_conv2d", [case for three in given for case in three])
    for i, call in enumerate(calls):
        call.check(*results[3 * i : 3 * i + 3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows(dtype: torch.dtype, layout: str) -> None:
    windows = [*WINDOWS, *([SPLITS] if dtype is torch.float32 else [])]
    run_all([Call(window, dtype, layout) for window in windows])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_activations(dtype: torch.dtype, layout: str) -> None:
    # Forward, and its backward, whose dz goes through the others.
    calls = [Call(w, dtype, layout, act, act != "silu") for act in ACTS for w in WINDOWS[1:9:7]]
    first = [case for c in calls for case in (c.forward(), c.backward_act())]
    results = run_cases("depthwise_conv2d", first)
    given = [c.backward(results[2 * i + 1].tensors["y"]) for i, c in enumerate(calls)]
    further = run_cases("depthwise_conv2d", [case for two in given for case in two])
    for i, call in enumerate(calls):
        if call.case.bias is None:
            del further[2 * i + 1].tensors["dbias"]
        call.check(results[2 * i], *further[2 * i : 2 * i + 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    # One tensor off a 16-byte address is enough: UBSan ends the run at a misaligned vector.
    call = Call(WINDOWS[1], dtype, "channels_last")
    dy = call.in_memory(call.case.dy)
    given = [call.forward({name: 1}) for name in ("x", "y", "weight", "bias")]
    given += [
        case for name in ("dy", "x", "dx", "dweight") for case in call.backward(dy, {name: 1})
    ]
    call.check(*run_cases("depthwise_conv2d", given))


def test_float64_is_the_cpu_s() -> None:
    numbers = Call(WINDOWS[1], torch.float64, "nchw").numbers()
    given = [Case(op, numbers) for op in ("fwd", "bwd_data", "bwd_weight")]
    results = run_cases("depthwise_conv2d", given)
    assert [result.error for result in results] == [INVALID_VALUE] * 3
