"""An op that can be planned without any kernel: y = 2 * x, by candidates whose time is simulated.

Its problems are 1x1 convolutions in name only; what a candidate takes is what it adds to the clock.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.plan.environment import environment_of
from fastcnn.plan.plan_file import PlanFile
from fastcnn.plan.planner import Planner
from fastcnn.plan.problem import Device, Problem
from fastcnn.plan.registry import Candidate, Kernel, Op

H200 = Device("NVIDIA H200", "sm_90", "CUDA 13000, 580.95.05")


class Clock:
    """A timer for which only simulated time passes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], object]) -> float:
        start = self.now
        run()
        return self.now - start


def problem(n: int = 1, **others: object) -> Problem:
    fields: dict[str, object] = {
        "op": "double",
        "x": (n, 8, 4, 4),
        "weight": (8, 8, 1, 1),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        **others,
    }
    return Problem(**fields)  # type: ignore[arg-type]


def candidate(
    name: str,
    clock: Clock,
    milliseconds: float | Iterable[float] = 1.0,
    run: Callable[[Problem, Tensor], Tensor] = lambda _, x: x * 2,
    supports: Callable[[Problem], str | None] = lambda _: None,
    passes: int = 1,
) -> Candidate:
    """Takes these milliseconds, the last of them for ever; the model is told of `passes` over x."""
    times = iter([milliseconds] if isinstance(milliseconds, float) else milliseconds)
    took = 0.0

    def tick() -> None:
        nonlocal took
        took = next(times, took)
        clock.now += took / 1e3
        clock.calls.append(name)

    def timed(problem: Problem, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            tick()
        return run(problem, x)

    def kernels(problem: Problem) -> list[Kernel]:
        return [Kernel(1e9)] * passes

    return Candidate(name, timed, supports, kernels)


def op(*candidates: Candidate, baseline: str | None = None) -> Op:
    """Doubles x; the baseline is the first candidate where none is named."""

    def tensors(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(problem.x, generator=generator, dtype=problem.dtype),)

    def reference(_: Problem, x: Tensor) -> Tensor:
        return x.double() * 2

    by_name = {c.name: c for c in candidates}
    first = baseline or next(iter(by_name), "")
    return Op("double", tensors, reference, first, candidates=by_name)


def planner(
    mode: str,
    clock: Clock,
    folder: Path | None,
    *candidates: Candidate,
    baseline: str | None = None,
    **others: object,
) -> Planner:
    def open_file(device: Device) -> PlanFile:
        file = PlanFile(folder, environment_of(device))
        file.reload()
        return file

    asked: dict[str, object] = {
        "defaults": {},
        "open_file": open_file,
        "timer_for": lambda _: clock,
        **others,
    }
    return Planner(mode, {"double": op(*candidates, baseline=baseline)}, **asked)  # type: ignore[arg-type]
