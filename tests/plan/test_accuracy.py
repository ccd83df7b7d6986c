"""Which candidates are right: limits worked out by hand, and convolutions that round."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.plan_cases import Clock, candidate, planner, problem
from support.seeds import seeded
from torch import Tensor

from fastcnn.plan.accuracy import Wrong, difference, errors, limit
from fastcnn.plan.problem import Problem
from fastcnn.plan.registry import Candidate


def wide(dtype: torch.dtype, *options: str) -> Problem:
    """Sums of 64 * 3 * 3 = 576 = 24^2 products."""
    return problem(weight=(8, 64, 3, 3), dtype=dtype, options=options)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        # 8 * 2^-23 + 24 * 2^-22 = 2^-20 + 6 * 2^-20.
        (torch.float32, (), 7 * 2**-20),
        (torch.float32, ("tf32",), 7 * 2**-20 + 2**-9),
        # 8 * 2^-7, where the sum's own 6 * 2^-20 hardly count.
        (torch.bfloat16, (), 2**-4 + 6 * 2**-20),
        (torch.float16, (), 2**-7 + 6 * 2**-20),
        (torch.float64, (), 8 * 2**-52 + 24 * 2**-51),
    ],
)
def test_the_bound(dtype: torch.dtype, options: tuple[str, ...], expected: float) -> None:
    assert limit(wide(dtype, *options), dtype, 1.0) == expected
    assert limit(wide(dtype, *options), dtype, 16.0) == 16 * expected
    # float32 outputs of bfloat16 inputs are not rounded to bfloat16; integers not at all.
    assert limit(wide(torch.bfloat16), torch.float32, 1.0) == 7 * 2**-20
    assert limit(wide(dtype), torch.int8, 127.0) == 0


def judged(y: Tensor, baseline: Tensor, exact: Tensor) -> str | None:
    own, found = (errors([t], [exact]) for t in (baseline, y))
    return difference(problem(dtype=torch.bfloat16), found, [exact.abs().max().item()], own)


def test_the_baseline_s_error_counts_four_times() -> None:
    exact = torch.tensor([8.0, -16.0], dtype=torch.float64)

    def off(by: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (exact - by).to(dtype)

    # bfloat16's unit at 16 is 16 * 2^-7 = 0.125; the baseline errs by 0.25: 4 * 0.25 + 0.125.
    assert judged(off(1.125), off(0.25), exact) is None
    assert judged(off(1.25), off(0.25), exact) == (
        "output 0: error 1.25, limit 1.12 where the baseline errs by 0.25"
    )
    assert judged(off(0.125), off(0.0), exact) is None
    assert "limit 0.125 where" in str(judged(off(0.25), off(0.0), exact))


def test_integers_are_equal() -> None:
    exact = torch.tensor([-128, 127, 3], dtype=torch.int32)
    y = exact.to(torch.int8)
    assert judged(y, y + 1, exact.double()) is None  # whatever the baseline does
    assert "error 1, limit 0" in str(judged(torch.tensor([-128, 127, 2]).char(), y, exact.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_finite_stays_finite(value: float) -> None:
    y = torch.tensor([1.0, value])
    with pytest.raises(Wrong, match=f"output 1: error {value}, where the reference is finite"):
        errors([y[:1], y], [torch.ones(1), torch.ones(2)])
    # What is not finite is no number that one could be near to.
    assert errors([y], [torch.tensor([1.5, value])])[0].size == 0.5
    assert errors([y[:0]], [y[:0]])[0].size == 0


def test_what_rounds_more_than_its_arithmetic_is_refused() -> None:
    # A true convolution, and what tensor cores make of float32: factors cut to tf32's 10 bits.
    generator = seeded(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((4, 64, 9, 9), (8, 64, 3, 3)))
    exact = F.conv2d(x.double(), weight.double())
    largest = exact.abs().max().item()

    def right(x: Tensor, weight: Tensor, *options: str) -> bool:
        found = errors([F.conv2d(x, weight)], [exact])
        return difference(wide(torch.float32, *options), found, [largest], None) is None

    def cut(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)

    assert right(x, weight)
    assert not right(cut(x), cut(weight))
    assert right(cut(x), cut(weight), "tf32")
    assert not right(x, weight * (1 + 2**-8), "tf32")


def failing(clock: Clock, how: str) -> Candidate:
    def raises(_: Problem, x: Tensor) -> Tensor:
        raise RuntimeError("no algorithm")

    runs: dict[str, Callable[[Problem, Tensor], Tensor]] = {
        "raises": raises,
        "nan": lambda _, x: x * float("nan"),
        "shape": lambda _, x: x[:, :1],
    }
    supports: Callable[[Problem], str | None] = lambda _: (  # noqa: E731
        "not here" if how == "unsupported" else None
    )
    run = runs.get(how, lambda _, x: x * 2)
    return candidate("baseline", clock, 9.0, run=run, supports=supports)


@pytest.mark.filterwarnings("ignore:double")
@pytest.mark.parametrize("how", ["raises", "nan", "shape", "unsupported"])
def test_without_its_baseline_a_bound_counts(how: str, tmp_path: Path) -> None:
    # Sums of 8: 8 * 2^-23 + sqrt(8) * 2^-22 = 3.66 * 2^-22 of the largest value; these are off by
    # 2^-21 and by 2^-19 of each.
    clock = Clock()
    ways = [
        failing(clock, how),
        candidate("near", clock, 2.0, run=lambda _, x: x * (2 + 2**-20)),
        candidate("far", clock, 1.0, run=lambda _, x: x * (2 + 2**-18)),
    ]
    plan = planner("tune", clock, tmp_path, *ways, baseline="baseline").choose(problem())
    assert plan.name == "near"
    assert "far refused: output 0: error " in plan.reason
    assert " by a bound" in plan.reason


def test_the_baseline_only_has_to_be_finite(tmp_path: Path) -> None:
    clock = Clock()
    ways = [candidate("own", clock, run=lambda _, x: x * 2.5), candidate("exact", clock, 2.0)]
    assert planner("tune", clock, tmp_path, *ways, baseline="own").choose(problem()).name == "own"


@pytest.mark.filterwarnings("ignore:double")
def test_an_integer_baseline_is_no_excuse(tmp_path: Path) -> None:
    # Other integers than the reference's: right for PyTorch's own way alone.
    clock = Clock()
    ways = [
        candidate(name, clock, run=lambda _, x: (x * 2).round().int() + 1) for name in ("own", "b")
    ]
    plan = planner("tune", clock, tmp_path, *ways, baseline="own").choose(problem())
    assert plan.name == "own"
    assert "b refused: output 0: error 1." in plan.reason


def test_an_unknown_baseline(tmp_path: Path) -> None:
    clock = Clock()
    plans = planner("tune", clock, tmp_path, candidate("a", clock), baseline="cudnn")
    with pytest.raises(ValueError, match="baseline: expected one of a, got cudnn"):
        plans.choose(problem())
