"""Tuning: every candidate is run once and checked, those that are right are timed.

The inputs are made up, from a generator of tuning's own: the user's random numbers stay what they
would have been. Candidates take turns, each call finds cold caches, and the medians count.
"""

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastcnn.plan.file import Entry
from fastcnn.plan.problem import Problem
from fastcnn.plan.registry import Candidate, Op

__all__ = ["Timer", "timer_for", "tune"]

WARMUP = 2
REPEATS = 9


class Timer(Protocol):
    """A device's clock."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked for; raise what went wrong there."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Call `run` once, and return how long the device took."""


class _CpuTimer:
    def __init__(self) -> None:
        # Above the 32 MiB of cache that 2 cores of an EPYC have for themselves.
        self._flush = torch.empty(64 << 20, dtype=torch.uint8)

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaTimer:
    """Events around the call; clearing memory keeps the device busy while kernels are queued."""

    def __init__(self, device: torch.device) -> None:
        # Above the largest L2 so far, 126 MB (B200).
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        self._device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timer_for(device: torch.device) -> Timer:
    """Return the clock of a device."""
    return _CudaTimer(device) if device.type == "cuda" else _CpuTimer()


def tune(op: Op, problem: Problem, candidates: Sequence[Candidate], timer: Timer) -> Entry:
    """Find the fastest of `candidates` among those that are right.

    Raises:
        RuntimeError: none is right; or the device is out of order since one ran.
    """
    from fastcnn.lab.measure import interleaved  # lab imports models, and they ops that are planned

    device = problem.device
    generator = torch.Generator(device).manual_seed(0)
    # Events and kernels go to the current device.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, torch.no_grad(), torch.autocast(device.type, enabled=False):
        tensors = op.tensors(problem, generator)
        expected = _outputs(op.reference(problem, *tensors))
        right: dict[str, Callable[[], object]] = {}
        refused: dict[str, str] = {}
        for candidate in candidates:
            reason = _refusal(op, problem, candidate, tensors, expected, timer)
            if reason is None:
                right[candidate.name] = functools.partial(candidate.run, problem, *tensors)
            else:
                refused[candidate.name] = reason
                warnings.warn(f"{op.name}: {candidate.name} refused: {reason}", stacklevel=2)
        del expected
        if not right:
            raise RuntimeError(f"{op.name}: no candidate is right for {problem}: {refused}")
        times = interleaved(right, REPEATS, WARMUP, timer.seconds)
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return Entry(min(milliseconds, key=milliseconds.__getitem__), milliseconds, refused)


def _refusal(
    op: Op,
    problem: Problem,
    candidate: Candidate,
    tensors: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    timer: Timer,
) -> str | None:
    """Run a candidate on its own copies of the inputs, and say what is wrong with it."""
    inputs = tuple(tensor.clone() for tensor in tensors)
    try:
        outputs = _outputs(candidate.run(problem, *inputs))
        timer.synchronize()
    except torch.OutOfMemoryError:
        raise  # that says nothing about the candidate: another time there is room
    except Exception as error:
        timer.synchronize()  # raises where the device is lost, which no other candidate can mend
        return f"{type(error).__name__}: {error}"
    if not all(map(torch.equal, inputs, tensors)):
        return "it changed its inputs"
    return _difference(outputs, expected, op.tolerances(problem))


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _difference(
    outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerances: Sequence[float]
) -> str | None:
    shapes, right = ([list(y.shape) for y in ys] for ys in (outputs, expected))
    if shapes != right:
        return f"outputs: expected {right}, got {shapes}"
    for i, (y, exact, tolerance) in enumerate(zip(outputs, expected, tolerances, strict=True)):
        if y.numel() == 0:
            continue
        error = (y.double() - exact.double()).abs().max().item()
        limit = tolerance * exact.double().abs().max().item()
        if not error <= limit:  # a NaN is refused too
            return f"output {i}: error {error:.3g}, limit {limit:.3g}"
    return None
