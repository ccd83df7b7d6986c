"""A candidate whose bits differ from launch to launch is refused, however fast and right it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.plan_cases import Clock, candidate, planner, problem
from torch import Tensor

from fastcnn.plan import tune
from fastcnn.plan.problem import Problem

TIMED = 1 + tune.WARMUP + tune.REPEATS  # launches before: one is checked
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "FEW_LAUNCHES", 20)


def off_at(launch: int) -> Callable[[Problem, Tensor], Tensor]:
    """Doubles x; in one launch after those that are timed an element is off by a unit."""
    count = 0

    def run(_: Problem, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        y = x * 2
        if count == TIMED + launch:
            y.view(torch.int32).view(-1)[-1] += 1
        return y

    return run


@pytest.mark.parametrize("launch", [2, 7, 20])
def test_the_fastest_is_refused_and_the_next_one_runs(launch: int, tmp_path: Path) -> None:
    clock = Clock()
    ways = [
        candidate("own", clock, 3.0),
        candidate("flaky", clock, 1.0, run=off_at(launch)),
        candidate("steady", clock, 2.0),
    ]
    said = f"flaky refused: not deterministic: launch {launch} of 20 differs"
    with pytest.warns(UserWarning, match=said):
        plan = planner("tune", clock, tmp_path, *ways).choose(problem())
    assert plan[:3] == ("steady", "tuned", f"own 3 ms, steady 2 ms; {said}")
    # Kept: the next process reads it, and launches nothing.
    calls = len(clock.calls)
    assert planner("read", clock, tmp_path, *ways).choose(problem()) == plan
    assert len(clock.calls) == calls


def test_only_the_chosen_is_launched_so_often(tmp_path: Path) -> None:
    clock = Clock()
    ways = [candidate(name, clock, ms) for name, ms in (("own", 2.0), ("fast", 1.0), ("slow", 3.0))]
    assert planner("tune", clock, tmp_path, *ways).choose(problem()).name == "fast"
    assert [clock.calls.count(name) for name in ("own", "slow", "fast")] == [
        TIMED, TIMED, TIMED + 20,
    ]  # fmt: skip


def test_pytorchs_own_way_runs_whatever_its_bits(tmp_path: Path) -> None:
    clock = Clock()
    ways = [candidate("own", clock, 1.0, run=off_at(2)), candidate("other", clock, 2.0)]
    assert planner("tune", clock, tmp_path, *ways).choose(problem()).name == "own"
    assert clock.calls.count("own") == TIMED


@pytest.mark.filterwarnings("ignore:double")
def test_nobody_is_left(tmp_path: Path) -> None:
    clock = Clock()
    ways = [
        candidate("own", clock, supports=lambda _: "not here"),
        candidate("flaky", clock, run=off_at(3)),
    ]
    with pytest.raises(RuntimeError, match=r"no candidate is right .* launch 3 of 20 differs"):
        planner("tune", clock, tmp_path, *ways).choose(problem())


def test_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of every output; a NaN is as it was, and a zero's sign counts.
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16)
    assert tune._unsteady(lambda: (nan.clone(), torch.ones(2)), CPU) is None
    outputs = iter([(nan, torch.tensor([0.0])), *[(nan, torch.tensor([-0.0]))] * 19])
    assert tune._unsteady(lambda: next(outputs), CPU) == (
        "not deterministic: launch 2 of 20 differs"
    )


def test_a_launch_that_raises() -> None:
    outputs = iter([torch.ones(2), torch.ones(2)])  # then StopIteration
    assert tune._unsteady(lambda: next(outputs), CPU) == "in 20 launches: StopIteration: "
