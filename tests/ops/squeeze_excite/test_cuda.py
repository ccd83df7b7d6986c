"""The CUDA kernels of squeeze_excite, run by the emulator, against float64.

Tolerances are those of the CPU's kernels: support/squeeze_excite_cases.py.
"""

import pytest
import torch
from cuda_emu.run import DTYPE_NUMBER, Case, Result, run_cases
from support import squeeze_excite_cases as cases
from support.activations import ACTS
from support.shapes import LAYOUTS
from support.squeeze_excite_cases import GATES, SIZES, Sizes, made
from support.tolerance import assert_rounded
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.ops.squeeze_excite import GATE_NUMBER

INVALID_VALUE = 1  # cudaErrorInvalidValue
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = [
    Sizes(2, 320, 3, 5, 10, "channels_last: a second block of channels"),
    Sizes(1, 16, 3, 64, 3, "several splits, whole vectors in both layouts"),
    Sizes(2, 70, 2, 8, 33, "more outputs than a block of the products has"),
]


class Call:
    """What a call's kernels get, and what must come out."""

    def __init__(
        self,
        sizes: Sizes,
        dtype: torch.dtype,
        layout: str,
        act: str = "silu",
        gate: str = "sigmoid",
        bias: bool = True,
        sm_count: int = 3,
    ) -> None:
        self.sizes, self.layout, self.sm_count = sizes, layout, sm_count
        self.case = made(sizes, dtype, layout, act, gate, bias, param_dtype=torch.float32)
        self.exact, self.errors = cases.exact(self.case), cases.errors(self.case)
        self.steps = cases.steps(self.case)

    def numbers(self) -> dict[str, float]:
        n, c, h, w, m, _ = self.sizes
        return {
            "n": n, "c": c, "hw": h * w, "channels_last": int(self.layout == "channels_last"),
            "m": m or 0, "dtype": DTYPE_NUMBER[self.case.x.dtype], "sm_count": self.sm_count,
            "act": ACT_NUMBER[self.case.act], "gate": GATE_NUMBER[self.case.gate],
        }  # fmt: skip

    def in_memory(self, t: Tensor) -> Tensor:
        last = self.layout == "channels_last"
        return (t.permute(0, 2, 3, 1) if last else t).contiguous()

    def both(self, skip: dict[str, int] | None = None) -> list[Case]:
        """Forward, and backward from the exact z1 and z2, rounded."""
        case = self.case
        x, dy = self.in_memory(case.x), self.in_memory(case.dy)
        fcs = {"fc1": case.fc1_weight, "fc2": case.fc2_weight}
        biases = {"bias1": case.fc1_bias, "bias2": case.fc2_bias}
        between = ["z1", "z2"]
        if case.fc2_weight is None:
            fcs, biases, between = {"fc2": fcs["fc1"]}, {"bias2": biases["bias1"]}, ["z2"]
        values = {name: self.steps[name].value.float() for name in ("mean", *between)}
        z = {name: values[name] for name in between}
        outputs = {"y": x, **values}, {"dx": x, **{f"d{name}": t for name, t in z.items()}}
        inputs = {"x": x, **fcs, **biases}, {"dy": dy, "x": x, **fcs, **z}
        return [
            Case(op, self.numbers(), given, made, skip=skip or {})
            for op, given, made in zip(("fwd", "bwd"), inputs, outputs, strict=True)
        ]

    def check(self, *results: Result) -> None:
        for result in results:
            assert result.error == 0
            for name, t in result.tensors.items():
                where = f"{name} of {self.sizes}"
                if name in ("y", "dx"):
                    exact, error = map(self.in_memory, (self.exact[name], self.errors[name]))
                    assert_rounded(where, t, exact, error)
                else:
                    assert_rounded(where, t, *self.steps[name])


def run_all(calls: list[Call]) -> None:
    results = run_cases("squeeze_excite", [case for call in calls for case in call.both()])
    for i, call in enumerate(calls):
        call.check(*results[2 * i : 2 * i + 2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype: torch.dtype, layout: str) -> None:
    run_all([
        *(Call(sizes, dtype, layout) for sizes in (*SIZES[:9], SIZES[10], *WIDE)),
        Call(WIDE[1], dtype, layout, sm_count=132),
    ])  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
def test_activations(gate: str) -> None:
    run_all([
        Call(SIZES[3], torch.float32, layout, act, gate, bias=act != "silu")
        for layout in LAYOUTS
        for act in ACTS
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    # One tensor off a 16-byte address is enough: UBSan ends the run at a misaligned vector.
    call = Call(WIDE[1], dtype, "channels_last")
    names = {"x", "y", "fc1", "bias1", "fc2", "mean", "z1", "z2", "dy", "dx", "dz1", "dz2"}
    given = [
        case
        for name in sorted(names)
        for case in call.both({name: 1})
        if name in case.inputs or name in case.outputs
    ]
    call.check(*run_cases("squeeze_excite", given))


def test_float64_is_the_cpu_s() -> None:
    numbers = Call(SIZES[3], torch.float64, "nchw").numbers()
    results = run_cases("squeeze_excite", [Case(op, numbers) for op in ("fwd", "bwd")])
    assert [result.error for result in results] == [INVALID_VALUE] * 2
