"""conv2d_int8: the integers of fastcnn.reference and of numpy's float32, all of them.

No tolerances: sums, the products behind them and the roundings are exact, or defined operation by
operation. Ties and saturation are made on purpose, and checked in rational numbers.
"""

import itertools
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import seeds
from support.conv2d_int8_cases import (
    ACTS,
    CASES,
    FLOATS,
    INT8,
    Case,
    assert_same,
    problem,
    quantised,
)
from support.conv2d_int8_numpy import requantised
from support.paths import TESTS
from support.seeds import seeded
from torch import Tensor

from fastcnn import info, reference
from fastcnn.functional import conv2d_int8
from fastcnn.ops.conv2d_int8 import onednn as conv2d_int8_sums

# Of each case a few options, others for each; all of them in make test-all.
STEPS = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@pytest.mark.every_level
@STEPS
@pytest.mark.parametrize("x_dtype", INT8, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantised_outputs(case: Case, x_dtype: torch.dtype, step: int) -> None:
    options = list(itertools.product(INT8, [None, *INT8], ACTS))
    for seed in range(CASES.index(case) % step, len(options), step):
        out_dtype, residual_dtype, act = options[seed]
        given = problem(case, x_dtype, out_dtype, residual_dtype, act, seed)
        y = conv2d_int8(**given)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_same(y, reference.conv2d_int8(**given), out_dtype, residual_dtype, act)


@pytest.mark.every_level
@STEPS
@pytest.mark.parametrize("x_dtype", INT8, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float_outputs(case: Case, x_dtype: torch.dtype, step: int) -> None:
    options = list(itertools.product(FLOATS, ["none", "own", *INT8], ACTS))
    for seed in range(CASES.index(case) % step, len(options), step):
        out_dtype, kind, act = options[seed]
        residual_dtype = {"none": None, "own": out_dtype}.get(kind, kind)
        given = problem(case, x_dtype, out_dtype, residual_dtype, act, seed)
        expected = reference.conv2d_int8(**given)
        assert_same(conv2d_int8(**given), expected, out_dtype, residual_dtype, act)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numpy(case: Case) -> None:
    options = list(itertools.product(INT8, INT8, [None, *INT8], ACTS))
    for seed in range(CASES.index(case) % 7, len(options), 7):
        x_dtype, out_dtype, residual_dtype, act = options[seed]
        units = torch.randint(-5000, 5000, (case.c_out,)).float()
        given = problem(case, x_dtype, out_dtype, residual_dtype, act, seed, units)
        assert_same(conv2d_int8(**given), requantised(given, units), *options[seed])


def one_channel(x: Tensor, **given: Any) -> Tensor:
    """Each number of x by itself, times 1."""
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    return conv2d_int8(x.view(1, 1, 1, -1), weight, **given).flatten()


@pytest.mark.parametrize("out_dtype", INT8, ids=str)
@pytest.mark.parametrize("scale", [0.5, 0.25, 1.5, 2.5])
def test_ties_go_to_even(scale: float, out_dtype: torch.dtype) -> None:
    # Halves of odd numbers lie between two integers. The zero point is added behind the rounding,
    # an odd one makes the even integers odd. Python's round() of a fraction goes to even, too.
    info, x = torch.iinfo(out_dtype), torch.arange(256, dtype=torch.uint8)
    for zero, bias in itertools.product([info.min, info.min + 1, 3, 4], [0.0, 0.5, 1.5, -0.5]):
        y = one_channel(
            x, x_scale=1.0, x_zero_point=100, weight_scale=scale, out_dtype=out_dtype, out_scale=1,
            bias=torch.tensor([bias * scale]), out_zero_point=zero,
        )  # fmt: skip
        units = round(Fraction(bias))
        exact = [(q - 100 + units) * Fraction(scale) for q in range(256)]
        assert y.tolist() == [min(max(round(e) + zero, info.min), info.max) for e in exact]


def test_a_residual_makes_ties_too() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    residual = (torch.arange(256) * 7 % 256).to(torch.uint8)
    y = one_channel(
        x, x_scale=0.5, x_zero_point=128, weight_scale=0.5, out_scale=0.5, out_zero_point=77,
        residual=residual.view(1, 1, 1, -1), residual_scale=0.125, residual_zero_point=9,
        act="relu",
    )  # fmt: skip
    z = [
        Fraction(q - 128, 2) + Fraction(r - 9, 4)
        for q, r in zip(x.tolist(), residual.tolist(), strict=True)
    ]
    assert sum(e.denominator == 2 for e in z) > 50
    assert y.tolist() == [min(max(round(max(e, 0)) + 77, 0), 255) for e in z]


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_sums_beyond_2_24_are_rounded_before_they_are_multiplied(dtype: torch.dtype) -> None:
    # From 2^24 to 2^25 float32 holds every other integer. In float64 the sum 2^24 + 1 would give 1.
    last = torch.channels_last
    sums = torch.arange(256).view(1, 1, 16, 16).to(dtype).contiguous(memory_format=last)
    y = torch.empty_like(sums, dtype=torch.uint8)
    bias, multiplier = torch.tensor([2**24], dtype=torch.int32), torch.tensor([2.0**-25])
    torch.ops.fastcnn.conv2d_int8_epilogue(y, sums, multiplier, bias, None, 1.0, 0, 0, 1.0, 0)
    held = [2 * round(Fraction(2**24 + q, 2)) for q in range(256)]
    assert y.flatten().tolist() == [round(Fraction(n, 2**25)) for n in held]
    assert y.flatten()[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("x_dtype", INT8, ids=str)
@pytest.mark.parametrize("terms", [(512, 3), (14336, 1), (1536, 3)])
def test_the_largest_sums(terms: tuple[int, int], x_dtype: torch.dtype) -> None:
    # Without a zero point at one end of the range, -128 * 127 * terms and their like.
    c, kernel = terms
    info = torch.iinfo(x_dtype)
    for value, weight, zero in itertools.product(
        [info.min, info.max], [-128, 127], [info.min, 0, info.max]
    ):
        x = torch.full((1, c, 4, 3), value, dtype=x_dtype)
        w = torch.full((3, c, kernel, kernel), weight, dtype=torch.int8)
        w[1, ::2] = -w[1, ::2].clamp(min=-127)
        exact = F.conv2d(x.double() - zero, w.double(), padding=1)
        given = {"x_scale": 1.0, "x_zero_point": zero, "padding": 1, "out_dtype": torch.float32}
        assert_same(conv2d_int8(x, w, weight_scale=1.0, **given), exact.float(), value, weight)
        scale = max(float(exact.abs().max()), 1.0) / 200
        given |= {"out_dtype": torch.uint8, "out_scale": scale, "out_zero_point": 128}
        y = conv2d_int8(x, w, weight_scale=1.0, **given)
        assert_same(y, reference.conv2d_int8(x, w, torch.ones(3), **given), value, weight, zero)


def test_high_and_low_parts_add_up() -> None:
    g = seeded(0)
    for c, most in itertools.product((100, 2000, 14336), (64, 128)):
        for weight in (
            quantised((2, c, 1, 1), torch.int8, g),
            torch.full((2, c, 1, 1), -128, dtype=torch.int8),
            torch.full((2, c, 1, 1), 127, dtype=torch.int8),
        ):
            parts = conv2d_int8_sums.high_and_low(weight, most)
            assert torch.equal(sum(part.int() * factor for part, factor in parts), weight.int())
            for part, _ in parts:
                assert int(part.int().abs().max()) <= most
                for sign in (1, -1):
                    assert 255 * int((sign * part.int()).clamp(min=0).sum((1, 2, 3)).max()) <= 2**24


def test_padding_is_the_zero_point() -> None:
    for x_dtype, zero in itertools.product(INT8, [0, 5, 127]):
        x = torch.full((1, 8, 5, 5), zero, dtype=x_dtype)
        w = quantised((4, 8, 3, 3), torch.int8, seeded(0))
        y = conv2d_int8(x, w, x_scale=0.1, x_zero_point=zero, weight_scale=0.1, padding=2,
                        out_scale=1e-3, out_zero_point=17)  # fmt: skip
        assert (y == 17).all()


def test_sums_of_random_problems() -> None:
    g = seeded(0)
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=g))]  # noqa: E731
    for seed in range(100):
        groups = pick(1, 1, 1, 2, 3, 16)
        case = Case(
            (pick(1, 2, 5), groups * pick(1, 3, 4, 16, 33), pick(1, 4, 7, 14), pick(1, 5, 8, 19)),
            groups * pick(1, 2, 8, 17),
            pick(1, 1, 2, 3, 5),
            "random",
            (pick(1, 2, 3), pick(1, 2)),
            (pick(4, 5, 8), pick(4, 6)),
            (pick(1, 2), pick(1, 2)),
            groups,
        )
        given = problem(case, pick(*INT8), pick(*INT8), pick(None, *INT8), pick(*ACTS), seed)
        assert_same(conv2d_int8(**given), reference.conv2d_int8(**given), seed, case)


def test_processors_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_int8_sums, "pairs_saturate", lambda: True)
    for seed, case in enumerate(CASES):
        given = problem(case, INT8[seed % 2], torch.uint8, torch.int8, "relu", seed)
        assert_same(conv2d_int8(**given), reference.conv2d_int8(**given), case)
    monkeypatch.setattr(info, "pairs_saturate", lambda: True)
    assert "without VNNI" in info.facts()["conv2d_int8"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE"])
def test_other_processors(isa: str) -> None:
    # oneDNN's sums; of the operator's own instruction sets: tests/ops/test_cpu_levels.py.
    chosen = "_outputs or ties or largest or padding or random"
    arguments = [__file__, "-q", "-k", chosen, "-m", "not slow", "-p", "no:cacheprovider"]
    arguments.append(f"--seed={os.environ[seeds.VARIABLE]}")
    code = f"import pytest; raise SystemExit(pytest.main({arguments}))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
