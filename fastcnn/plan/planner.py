"""The planner: the fastest correct plan of each problem, as far as one may find out now.

| FASTCNN_PLAN | without an entry in the plan file |
|---|---|
| read (default) | the default plan: nothing is timed that nobody asked for |
| tune | the candidates are checked and timed, and the file gets an entry |
| off | the default plan; the file is neither read nor written |

The default plan is from measurement on GPUs that were measured (measured.json), else the op's
baseline, PyTorch's own way. The model of roofline.py says beside it which candidates may be worth
tuning, and chooses nothing: it knows bytes and flops, and Triton's kernels by which it would have
run 42 of ResNet-50's 53 convolutions on a H200 were up to 6 times slower than cuDNN's by the
instructions in their code (docs/gpu-notes.md). Nothing is run while a CUDA graph is captured, under
torch.compile, or under a dispatch mode (whose tensors may be fakes); an entry counts there as well,
else the default plan runs, and the problem is tuned the next time that it is met elsewhere.
"""

import functools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from fastcnn.plan.environment import environment_of
from fastcnn.plan.plan_file import Entry, PlanFile, folder, parse
from fastcnn.plan.problem import Device, Problem, describe
from fastcnn.plan.registry import Candidate, Op
from fastcnn.plan.roofline import peaks_of, predicted_seconds
from fastcnn.plan.timer import Timer, timer_for
from fastcnn.plan.tune import tune

__all__ = ["MODES", "Plan", "Planner", "measured", "mode_of_environment", "open_file"]

MODES = ("off", "read", "tune")


class Plan(NamedTuple):
    """What runs for a problem, and why."""

    name: str  # of the candidate
    source: str  # "tuned", "measured" or "default"
    reason: str  # times, who was refused, who did not take part
    milliseconds: float | None  # measured, if so


def mode_of_environment() -> str:
    """Return FASTCNN_PLAN.

    Raises:
        ValueError: it is none of the three.
    """
    mode = os.environ.get("FASTCNN_PLAN", "read")
    if mode not in MODES:
        raise ValueError(f"FASTCNN_PLAN: expected off, read or tune, got {mode!r}")
    return mode


def open_file(device: Device) -> PlanFile:
    """Return the plan file of a device in this environment, read."""
    file = PlanFile(folder(), environment_of(device))
    file.reload()
    return file


@functools.cache
def measured() -> dict[str, Entry]:
    """Return the entries that come with the package, by problem."""
    return parse(Path(__file__).with_name("measured.json").read_bytes(), {})


def _busy(device: torch.device) -> str | None:
    """Return what keeps from tuning now, seen from outside of a trace."""
    if torch.compiler.is_compiling():
        return "under torch.compile"
    if torch._C._len_torch_dispatch_stack():
        return "under a dispatch mode"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return "while a CUDA graph is captured"
    return None


class Planner:
    """Chooses, remembers and explains. All that it asks of the world is passed in."""

    def __init__(
        self,
        mode: str,
        ops: Mapping[str, Op],
        defaults: Mapping[str, Entry],
        open_file: Callable[[Device], PlanFile] = open_file,
        describe: Callable[[torch.device], Device] = describe,
        timer_for: Callable[[torch.device], Timer] = timer_for,
        busy: Callable[[torch.device], str | None] = _busy,
    ) -> None:
        self.mode = mode
        self._ops = ops
        self._defaults = defaults
        self._open_file = open_file
        self._describe = describe
        self._timer_for = timer_for
        self._busy = busy
        self._files: dict[Device, PlanFile] = {}
        self._plans: dict[Problem, Plan] = {}
        self._passing: dict[Problem, Plan] = {}  # chosen where tuning was not possible
        # A candidate may be made of ops that are planned themselves: the lock lets it in again.
        self._lock = threading.RLock()

    def choose(self, problem: Problem, busy: str | None = None) -> Plan:
        """Return the plan of a problem; `busy` says what keeps from tuning now.

        Raises:
            ValueError: an unknown op, or a problem that no candidate supports.
            RuntimeError: tuning found every candidate wrong.
        """
        plan = self._plans.get(problem)
        return plan if plan is not None else self._decide(problem, busy)

    def plans(self) -> dict[Problem, Plan]:
        """Return all that were chosen in this process."""
        with self._lock:
            return self._passing | self._plans

    def _decide(self, problem: Problem, busy: str | None) -> Plan:
        if not isinstance(problem, Problem):
            raise TypeError(f"plan: problem: expected a Problem, got {type(problem).__name__}")
        if problem.op not in self._ops:
            expected = ", ".join(self._ops) or "none, as none is registered"
            raise ValueError(f"op: expected one of {expected}, got {problem.op}")
        op = self._ops[problem.op]
        with self._lock:
            if problem in self._plans:  # another thread was faster
                return self._plans[problem]
            device = self._describe(problem.device)
            key = problem.key(device)
            able, unable = op.supporting(problem)
            entry = None if self.mode == "off" else self._file(device).entries.get(key)
            untuned = None
            if self.mode == "tune" and not _complete(entry, able):
                busy = busy or self._busy(problem.device)
                if busy is None:
                    entry, untuned = self._tune(op, problem, key, able, self._file(device))
            if entry is not None and entry.plan in able:
                plan = _of_entry(entry, "tuned", able)
            else:
                plan = self._default(op, problem, key, device, able)
            before = [f"not tuned {why}"] if (why := busy or untuned) else []
            # Who did not take part is shown: nothing falls back silently.
            after = [f"{name}: {why}" for name, why in unable.items()]
            plan = plan._replace(reason="; ".join([*before, plan.reason, *after]))
            (self._passing if busy else self._plans)[problem] = plan
            return plan

    def _tune(
        self, op: Op, problem: Problem, key: str, able: Mapping[str, Candidate], file: PlanFile
    ) -> tuple[Entry | None, str | None]:
        """Return the problem's entry, and why it was not tuned."""
        file.reload()  # another process may have tuned it meanwhile
        entry = file.entries.get(key)
        if _complete(entry, able):
            return entry, None
        try:
            timer = self._timer_for(problem.device)
            return file.keep(key, tune(op, problem, list(able.values()), timer)), None
        except torch.OutOfMemoryError:  # nor is it tried at every call
            return entry, "for want of memory"

    def _file(self, device: Device) -> PlanFile:
        if device not in self._files:
            self._files[device] = self._open_file(device)
        return self._files[device]

    def _default(
        self, op: Op, problem: Problem, key: str, device: Device, able: Mapping[str, Candidate]
    ) -> Plan:
        entry = self._defaults.get(key)
        if entry is not None and entry.plan in able:
            return _of_entry(entry, "measured", able)
        peaks, which = peaks_of(device)
        times = ", ".join(
            f"{name} {1e3 * predicted_seconds(peaks, problem.dtype, one.kernels(problem)):.4g} ms"
            for name, one in able.items()
        )
        name = op.baseline if op.baseline in able else next(iter(able))
        reason = f"not measured; at least, by the {which}: {times}"
        return Plan(name, "default", reason, None)


def _complete(entry: Entry | None, able: Mapping[str, Candidate]) -> bool:
    """Tell whether all candidates took part, and the chosen one is among them."""
    return entry is not None and entry.plan in able and set(able) <= entry.names()


def _of_entry(entry: Entry, source: str, able: Mapping[str, Candidate]) -> Plan:
    reason = ", ".join(f"{name} {ms:.4g} ms" for name, ms in entry.milliseconds.items())
    for name, why in entry.refused.items():
        reason += f"; {name} refused: {why}"
    reason += "".join(f"; {name}: not timed" for name in able if name not in entry.names())
    return Plan(entry.plan, source, reason, entry.milliseconds[entry.plan])
