"""The choice of a plan, in simulated time."""

import re
from pathlib import Path

import pytest
import torch
from support.plan_cases import H200, Clock, candidate, planner, problem
from support.seeds import seed_all
from torch import Tensor

from fastcnn import plan
from fastcnn.plan.plan_file import Entry
from fastcnn.plan.planner import measured
from fastcnn.plan.problem import Problem


def test_the_fastest_runs(tmp_path: Path) -> None:
    clock = Clock()
    ways = [candidate("a", clock, 3.0), candidate("b", clock, 1.0), candidate("c", clock, 2.0)]
    plan = planner("tune", clock, tmp_path, *ways).choose(problem())
    assert plan == ("b", "tuned", "a 3 ms, b 1 ms, c 2 ms", pytest.approx(1.0))


def test_the_median_counts_and_the_first_calls_do_not(tmp_path: Path) -> None:
    # a: the check and two rounds of warm-up are slow (compilation), and two of nine rounds, so
    # that its mean is (7 * 1 + 2 * 50) / 9 = 11.9 ms, its median 1. b: always 2.
    clock = Clock()
    a = [100.0, 100.0, 100.0, 50.0, 1.0, 1.0, 1.0, 50.0, 1.0]
    ways = [candidate("a", clock, a), candidate("b", clock, 2.0)]
    plan = planner("tune", clock, tmp_path, *ways).choose(problem())
    assert plan.name == "a"
    assert plan.milliseconds == pytest.approx(1.0)
    # They took turns, one check each, then rounds in alternating order.
    assert clock.calls == ["a", "b"] + 5 * ["a", "b", "b", "a"] + ["a", "b"]


def nan_in_one_place(_: Problem, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1)[-1] = float("nan")
    return y


def raises(_: Problem, x: Tensor) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda _, x: x * 2.001, r"output 0: error \S+, limit \S+ where the baseline errs by 0"),
        (nan_in_one_place, "output 0: error nan, where the reference is finite"),
        (
            lambda _, x: (x * 2)[:, :4],
            r"outputs: expected \[\[1, 8, 4, 4\]\], got \[\[1, 4, 4, 4\]",
        ),
        (
            lambda _, x: (x * 2, x),
            r"outputs: expected \[\[1, 8, 4, 4\]\], got \[\[1, 8, 4, 4\], \[",
        ),
        (raises, "RuntimeError: no such instruction"),
        (lambda _, x: x.mul_(2), "it changed its inputs"),
    ],
    ids=["rounded", "nan", "shape", "count", "raises", "in_place"],
)
def test_a_wrong_candidate_is_refused_and_shown(run: object, reason: str, tmp_path: Path) -> None:
    clock = Clock()
    wrong = candidate("wrong", clock, 0.1, run)  # type: ignore[arg-type]
    ways = [candidate("right", clock, 5.0), wrong]
    with pytest.warns(UserWarning, match=f"double: wrong refused: {reason}"):
        plan = planner("tune", clock, tmp_path, *ways).choose(problem())
    assert plan.name == "right"
    # The file has the reason: another process shows it too, and does not run the candidate again.
    clock.calls.clear()
    again = planner("tune", clock, tmp_path, *ways).choose(problem())
    assert again == plan
    assert "wrong refused: " in again.reason
    assert not clock.calls


def test_none_right_is_an_error(tmp_path: Path) -> None:
    clock = Clock()
    plans = planner("tune", clock, tmp_path, candidate("wrong", clock, 0.1, raises))
    with (
        pytest.warns(UserWarning, match="wrong refused"),
        pytest.raises(RuntimeError, match=r"no candidate is right for .*no such instruction"),
    ):
        plans.choose(problem())


def test_short_memory_says_nothing_about_a_candidate(tmp_path: Path) -> None:
    def out_of_memory(_: Problem, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    clock = Clock()
    ways = [candidate("a", clock, passes=2), candidate("b", clock, run=out_of_memory)]
    plans = planner("tune", clock, tmp_path, *ways)
    plan = plans.choose(problem())
    assert (plan.name, plan.source) == ("a", "default")
    assert plan.reason.startswith("not tuned for want of memory; not measured; at least, by the ")
    assert plans.choose(problem()) == plan
    assert clock.calls == ["a", "b"]  # tried once, not at every call
    assert not list(tmp_path.iterdir())


def test_random_numbers_stay_what_they_would_have_been(tmp_path: Path) -> None:
    seed_all(0)
    expected = torch.rand(4)
    seed_all(0)
    clock = Clock()
    planner("tune", clock, tmp_path, candidate("a", clock)).choose(problem())
    assert torch.equal(torch.rand(4), expected)


def test_who_cannot_do_it_does_not_take_part(tmp_path: Path) -> None:
    clock = Clock()
    picky = candidate(
        "picky", clock, 0.1, supports=lambda p: "n: 1 is too few" if p.x[0] == 1 else None
    )
    ways = [picky, candidate("plain", clock, 1.0)]
    plans = planner("tune", clock, tmp_path, *ways)
    plan = plans.choose(problem(1))
    assert plan[:3] == ("plain", "tuned", "plain 1 ms; picky: n: 1 is too few")
    assert plans.choose(problem(2)).name == "picky"
    # From the file, and without it.
    assert planner("read", clock, tmp_path, *ways).choose(problem(1)) == plan
    plan = planner("off", clock, None, *ways).choose(problem(1))
    assert plan.source == "default"
    assert plan.reason.startswith("not measured; at least, by the numbers of CPU: plain ")
    assert plan.reason.endswith(" ms; picky: n: 1 is too few")
    with pytest.raises(ValueError, match=r"double: no candidate for .*: picky: n: 1 is too few"):
        planner("tune", clock, tmp_path, picky).choose(problem(1))


def test_default_plans_say_where_they_come_from() -> None:
    clock = Clock()
    ways = [candidate("two", clock, passes=2), candidate("one", clock, passes=1)]
    # 1 GB a pass over 4.3 TB/s is 232.6 us, and 4 us for each launch.
    gpu = {"describe": lambda _: H200, "busy": lambda _: None}
    on_gpu = problem(device=torch.device("cuda", 0))
    plan = planner("read", clock, None, *ways, **gpu).choose(on_gpu)
    reason = "not measured; at least, by the numbers of H200: two 0.4731 ms, one 0.2366 ms"
    assert plan == ("two", "default", reason, None)  # the baseline

    entry = Entry("two", {"two": 0.2, "one": 0.3}, {})
    known = {on_gpu.key(H200): entry}
    plan = planner("read", clock, None, *ways, **gpu, defaults=known).choose(on_gpu)
    assert plan == ("two", "measured", "two 0.2 ms, one 0.3 ms", 0.2)
    # A measured candidate that is no longer there cannot run.
    plan = planner("off", clock, None, ways[1], **gpu, defaults=known).choose(on_gpu)
    assert (plan.name, plan.source) == ("one", "default")
    assert not clock.calls


def test_without_measurement_the_baseline_runs(tmp_path: Path) -> None:
    """Whatever the model says; where it cannot do a problem, the first that can."""
    clock = Clock()
    few = candidate("few", clock, passes=1)
    many = candidate("many", clock, passes=3, supports=lambda p: "n: 2" if p.x[0] == 2 else None)
    for mode in ("read", "off"):
        plans = planner(mode, clock, tmp_path, few, many, baseline="many")
        assert plans.choose(problem(1))[:2] == ("many", "default")
        assert plans.choose(problem(2))[:2] == ("few", "default")
    assert not clock.calls


def test_the_packaged_measurements_can_be_read() -> None:
    # Of GPUs alone: a key ends in the device.
    assert all(re.search(r" on .* sm_\d+$", key) for key in measured())


def test_a_new_candidate_is_tuned_and_a_lost_one_replaced(tmp_path: Path) -> None:
    clock = Clock()
    a, b = candidate("a", clock, 2.0), candidate("b", clock, 1.0)
    planner("tune", clock, tmp_path, a).choose(problem())
    # Reading keeps to what is known; tuning asks the new one as well.
    plan = planner("read", clock, tmp_path, a, b).choose(problem())
    assert plan[:3] == ("a", "tuned", "a 2 ms; b: not timed")
    assert planner("tune", clock, tmp_path, a, b).choose(problem()).name == "b"
    assert planner("read", clock, tmp_path, a).choose(problem()).source == "default"
    assert planner("tune", clock, tmp_path, a).choose(problem())[:2] == ("a", "tuned")


def test_what_is_no_problem() -> None:
    for call in (plan.choose, plan.run):
        with pytest.raises(TypeError, match=r"^plan: problem: expected a Problem, got str$"):
            call("conv_bn_act")
        with pytest.raises(ValueError, match=r"^op: expected one of .*conv_bn_act.*, got conv3d$"):
            call(problem(op="conv3d"))


def test_an_unknown_op() -> None:
    with pytest.raises(ValueError, match="op: expected one of double, got conv_bn_act"):
        planner("off", Clock(), None).choose(problem(op="conv_bn_act"))
