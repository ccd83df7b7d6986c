"""Tuning: every candidate is run once and checked, those that are right are timed.

The inputs are synthetic, from a generator of tuning's own: the user's random numbers stay what they
would have been. Candidates take turns, each call finds cold caches, and the medians count.
"""

import contextlib
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence

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


def tune(op: Op, problem: Problem, candidates: Sequence[Candidate], timer: Timer) -> Entry:
    """Find the fastest of `candidates` among those that are right.

    Raises:
        RuntimeError: none is right; or the device is out of order since one ran.
        ValueError: the op's baseline is not registered.
    """
    with _apart(problem.device):
        tensors, refused = _checked(op, problem, candidates, timer)
        for name, why in refused.items():
            warnings.warn(f"{op.name}: {name} refused: {why}", stacklevel=2)
        right: dict[str, Callable[[], object]] = {
            candidate.name: functools.partial(candidate.run, problem, *tensors)
            for candidate in candidates
            if candidate.name not in refused
        }
        if not right:
            raise RuntimeError(f"{op.name}: no candidate is right for {problem}: {refused}")
        times = interleaved(right, REPEATS, WARMUP, timer.seconds)
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return Entry(min(milliseconds, key=milliseconds.__getitem__), milliseconds, refused)


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
