"""Tuning: every candidate is run once and checked, those that are right are timed.

The inputs are synthetic, from a generator of tuning's own: the user's random numbers stay what they
would have been. They have the problem's own sizes, so that a kernel is checked as it will run: the
same tiles, as many of them, the same ragged edges. Candidates take turns, each call finds cold
caches, and the medians count.

The fastest is then launched LAUNCHES times on the same inputs and has to give the same bits each
time: a race between threads, or an instruction that reads a register too late, shows in few of many
launches. Not so the baseline, which runs where nothing was tuned: what PyTorch computes is what the
user would have had.
"""

import contextlib
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.plan import accuracy as check
from fastcnn.plan.measure import interleaved
from fastcnn.plan.plan_file import Entry
from fastcnn.plan.problem import Problem
from fastcnn.plan.registry import Candidate, Op
from fastcnn.plan.timer import Timer

__all__ = ["tune"]

WARMUP = 2
REPEATS = 9
# By the kind of device, on others FEW_LAUNCHES: there is no such race in an interpreter.
LAUNCHES = {"cuda": 1000}
FEW_LAUNCHES = 3


def tune(op: Op, problem: Problem, candidates: Sequence[Candidate], timer: Timer) -> Entry:
    """Find the fastest of `candidates` among those that are right.

    Raises:
        RuntimeError: none is right; or the device is out of order since one ran.
        ValueError: the op's baseline is not registered.
    """
    with _apart(problem.device):
        tensors, refused = _checked(op, problem, candidates, timer)
        right: dict[str, Callable[[], Any]] = {
            candidate.name: functools.partial(candidate.run, problem, *tensors)
            for candidate in candidates
            if candidate.name not in refused
        }
        times = interleaved(right, REPEATS, WARMUP, timer.seconds)
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        for fastest in sorted(medians, key=medians.__getitem__):
            why = None if fastest == op.baseline else _unsteady(right[fastest], problem.device)
            if why is None:
                break
            refused[fastest] = why
    for name, why in refused.items():
        warnings.warn(f"{op.name}: {name} refused: {why}", stacklevel=2)
    milliseconds = {name: median for name, median in medians.items() if name not in refused}
    if not milliseconds:
        raise RuntimeError(f"{op.name}: no candidate is right for {problem}: {refused}")
    return Entry(min(milliseconds, key=milliseconds.__getitem__), milliseconds, refused)


def _unsteady(run: Callable[[], Any], device: torch.device) -> str | None:
    """Say which of many launches gives other bits than the first, None if none does."""
    launches = LAUNCHES.get(device.type, FEW_LAUNCHES)
    differ = torch.zeros(launches, dtype=torch.bool, device=device)
    try:
        first = _bits(run())
        for k in range(1, launches):
            for y, same in zip(_bits(run()), first, strict=True):
                differ[k] |= (y != same).any()  # the device is waited for once, at the end
        if not differ.any():
            return None
    except torch.OutOfMemoryError:
        raise  # that says nothing about the candidate
    except Exception as error:
        return f"in {launches} launches: {type(error).__name__}: {error}"
    k = int(differ.int().argmax()) + 1
    return f"not deterministic: launch {k} of {launches} differs"


def _bits(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return outputs as integers: a NaN is unlike itself, and -0 like 0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tuple(y.view(integers[y.itemsize]) for y in _tuple(result))


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """On the device, where events and kernels go, and apart from autograd and autocast."""
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _checked(
    op: Op, problem: Problem, candidates: Sequence[Candidate], timer: Timer
) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """Run the candidates on synthetic tensors; return these, and which are refused, and why."""
    if op.baseline not in op.candidates:
        names = ", ".join(op.candidates)
        raise ValueError(f"baseline: expected one of {names}, got {op.baseline}")
    tensors = op.tensors(problem, torch.Generator(problem.device).manual_seed(0))
    expected = _tuple(op.reference(problem, *tensors))
    errors: dict[str, list[check.Error]] = {}
    refused: dict[str, str] = {}
    for candidate in candidates:
        try:
            errors[candidate.name] = _errors(problem, candidate, tensors, expected, timer)
        except check.Wrong as reason:
            refused[candidate.name] = str(reason)
    scales = [check.largest(exact.double().nan_to_num(0.0, 0.0, 0.0)) for exact in expected]
    if op.scale_of is not None:
        scales = [scales[op.scale_of[i]] for i in range(len(scales))]
    baseline = errors.get(op.baseline)
    for name, found in errors.items():
        why = check.difference(problem, found, scales, baseline)
        if why is not None and name != op.baseline:
            refused[name] = why
    return tensors, refused


def _errors(
    problem: Problem,
    candidate: Candidate,
    tensors: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    timer: Timer,
) -> list[check.Error]:
    """Run a candidate on its own copies of the inputs, and return the errors of its outputs.

    Raises:
        check.Wrong: it raised, changed its inputs, or its outputs cannot be right.
    """
    inputs = tuple(tensor.clone() for tensor in tensors)
    try:
        outputs = _tuple(candidate.run(problem, *inputs))
        timer.synchronize()
    except torch.OutOfMemoryError:
        raise  # that says nothing about the candidate: another time there is room
    except Exception as error:
        timer.synchronize()  # raises where the device is lost, which no other candidate can mend
        raise check.Wrong(f"{type(error).__name__}: {error}") from error
    if not all(map(torch.equal, inputs, tensors)):
        raise check.Wrong("it changed its inputs")
    return check.errors(outputs, expected)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result
