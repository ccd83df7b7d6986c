"""Modes, and what users see of planning: FASTCNN_PLAN, report() and `fastcnn info`."""

import ctypes
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plan_cases import Clock, candidate, op, planner, problem

import fastcnn.plan
from fastcnn import info
from fastcnn.plan import OPS, Candidate, choose, problem as plan_problem, register
from fastcnn.plan.planner import mode_of_environment
from fastcnn.plan.problem import describe
from fastcnn.plan.timer import timer_for


def test_modes(tmp_path: Path) -> None:
    clock = Clock()
    ways = [candidate("fast", clock, 1.0, passes=2), candidate("slow", clock, 2.0, passes=1)]
    chosen = {}
    for mode in ("off", "read"):  # nothing there yet
        plans = planner(mode, clock, tmp_path, *ways, baseline="slow")
        chosen[mode] = plans.choose(problem())[:2]
    assert not clock.calls
    assert not list(tmp_path.iterdir())
    assert chosen == {"off": ("slow", "default"), "read": ("slow", "default")}

    planner("tune", clock, tmp_path, *ways, baseline="slow").choose(problem())
    clock.calls.clear()
    for mode in ("off", "read", "tune"):
        plans = planner(mode, clock, tmp_path, *ways, baseline="slow")
        chosen[mode] = plans.choose(problem())[:2]
    assert not clock.calls
    assert chosen == {
        "off": ("slow", "default"),
        "read": ("fast", "tuned"),
        "tune": ("fast", "tuned"),
    }


def test_off_does_not_look_at_the_file() -> None:
    def opened(_: object) -> None:
        raise AssertionError

    clock = Clock()
    plans = planner("off", clock, None, candidate("a", clock), open_file=opened)
    assert plans.choose(problem()).source == "default"


def test_the_environment_s_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCNN_PLAN", raising=False)
    assert mode_of_environment() == "read"
    for mode in ("off", "read", "tune"):
        monkeypatch.setenv("FASTCNN_PLAN", mode)
        assert mode_of_environment() == mode
    for wrong in ("", "on", "Tune", "1"):
        monkeypatch.setenv("FASTCNN_PLAN", wrong)
        message = f"FASTCNN_PLAN: expected off, read or tune, got '{wrong}'"
        with pytest.raises(ValueError, match=message):
            mode_of_environment()
        assert info.facts()["plans"] == message
        fastcnn.plan._planner.cache_clear()
        with pytest.raises(ValueError, match=message):
            choose(problem())


def test_report_and_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTCNN_PLAN", "tune")
    clock = Clock()
    monkeypatch.setitem(OPS, "double", op(candidate("a", clock, 1.5), candidate("b", clock, 2.5)))
    fastcnn.plan._planner.cache_clear()
    try:
        monkeypatch.setattr(fastcnn.plan._planner(), "_timer_for", lambda _: clock)
        assert info.facts()["plans"].startswith(f"tune; 0 in {tmp_path}/plans/")
        assert choose(problem(2)) == choose(problem(1)) == "a"
        assert info.facts()["plans"].startswith(f"tune; 2 in {tmp_path}/plans/")
        assert [row.plan for row in fastcnn.plan.rows()] == ["a", "a"]
        returned = fastcnn.report()
        assert returned == fastcnn.plan.rows()
    finally:
        fastcnn.plan._planner.cache_clear()
    device = describe(torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == [
        f"{'problem':39}  plan  source   ms",
        f"on {device.name} {device.capability}",
        "double x=1x8x4x4 weight=8x8x1x1 float32  a     tuned   1.5",
        "    a 1.5 ms, b 2.5 ms",
        "double x=2x8x4x4 weight=8x8x1x1 float32  a     tuned   1.5",
        "    a 1.5 ms, b 2.5 ms",
    ]
    monkeypatch.setenv("FASTCNN_PLAN", "off")
    assert info.facts()["plans"] == "off"


def test_real_time(tmp_path: Path) -> None:
    # The one test that no simulation can replace: the clock of the CPU tells 20 ms from none, also
    # on a machine so busy that none takes 20.
    def sleeps(milliseconds: float, name: str) -> Candidate:
        def run(_: object, x: torch.Tensor) -> torch.Tensor:
            time.sleep(milliseconds / 1e3)
            return x * 2

        return Candidate(name, run, lambda _: None, lambda _: [])

    ways = [sleeps(20.0, "slow"), sleeps(0.0, "fast")]
    plan = planner("tune", Clock(), tmp_path, *ways, timer_for=timer_for).choose(problem())
    assert plan.name == "fast"
    slow, fast = (float(ms) for ms in re.findall(r"([\d.]+) ms", plan.reason))
    assert fast == pytest.approx(plan.milliseconds, rel=1e-3)
    assert fast < slow
    assert slow >= 20


def test_threads_tune_once(tmp_path: Path) -> None:
    clock = Clock()

    def run(_: object, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)  # the others arrive meanwhile
        return x * 2

    plans = planner("tune", clock, tmp_path, candidate("a", clock, run=run))
    threads = [threading.Thread(target=plans.choose, args=(problem(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clock.calls) == 1 + 2 + 9  # check, warm-up, rounds


def test_names_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    ours = op()
    monkeypatch.setitem(OPS, "double", ours)
    a = candidate("a", clock)
    register(ours, a)
    register(ours, a)  # the same once more changes nothing: a module that is imported again
    assert list(ours.candidates) == ["a"]
    with pytest.raises(ValueError, match="candidate: expected a new name for double, got a"):
        register(ours, candidate("a", clock))
    with pytest.raises(ValueError, match="op: expected a new name, got double"):
        register(op())


class Driver:
    """As much of libcuda.so.1 as is asked."""

    @staticmethod
    def cuDriverGetVersion(version: Any) -> int:
        version._obj.value = 12040
        return 0


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC 12.2",
            "CUDA 12040, 550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
            "CUDA 12040, 580.95.05",
        ),
        ("", "CUDA 12040"),
    ],
)
def test_the_driver_s_version(text: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": Driver}.__getitem__)
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    plan_problem._describe_cuda.cache_clear()
    assert describe(torch.device("cuda", 0)) == ("NVIDIA H200", "sm_90", driver)
    plan_problem._describe_cuda.cache_clear()
