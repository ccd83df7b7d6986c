"""What a stage has: a log, a time limit, processes, and a way to fail without losing anything."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
SITE, CACHE = WORK / "site", WORK / "cache"

# Processes run in WORK: in a checkout they would import its sources, without the built library.
SURROUNDINGS = {
    "PYTHONPATH": f"{SITE}",  # and not what is installed elsewhere
    "PYTHONUNBUFFERED": "1",
    "FASTCNN_CACHE": f"{CACHE}",
    "TRITON_CACHE_DIR": f"{WORK / 'triton'}",
    "TORCHINDUCTOR_CACHE_DIR": f"{WORK / 'inductor'}",
}

PATIENCE = 10.0  # seconds that a process has for its last words

LOG_END = 500_000  # characters that are kept of either end of a long log

Found = dict[str, Any]


class Failed(Exception):
    """What went wrong in a stage, and what it had found by then."""

    def __init__(self, why: str, found: Found | None = None) -> None:
        super().__init__(why)
        self.found = found or {}


class Run(NamedTuple):
    """A stage's surroundings."""

    results: Path
    log: Path
    deadline: float  # of time.monotonic

    def seconds_left(self) -> float:
        """Return how long the stage may still take."""
        return max(0.0, self.deadline - time.monotonic())

    def execute(self, command: Sequence[str | Path], **environment: str) -> int | None:
        """Return the status of a process whose output goes to the log; None if it took too long.

        It is interrupted first, as by Ctrl-C, so that it may say what it knows, then killed.
        """
        with self.log.open("a") as log:
            line = [*(f"{name}={value}" for name, value in environment.items()), *command]
            print("$", *line, file=log, flush=True)
            process = subprocess.Popen(
                [*map(str, command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=WORK,
                env={**os.environ, **SURROUNDINGS, **environment},
                start_new_session=True,
            )
            try:
                return process.wait(self.seconds_left())
            except subprocess.TimeoutExpired:
                pass
            finally:  # also where this process itself is interrupted
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            with contextlib.suppress(ProcessLookupError):  # its children may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def apart(self, name: str) -> "Run":
        """Return the same with an empty log of its own, for what runs beside others."""
        log = WORK / f"{name}.log"
        log.write_text("")
        return self._replace(log=log)

    def append(self, other: "Run") -> str:
        """Add another's log to this one, without the middle of a very long one, and return it."""
        text = other.log.read_text(errors="replace")
        left_out = len(text) - 2 * LOG_END
        with self.log.open("a") as log:
            if left_out > 0:
                middle = f"\n... {left_out} characters are in {other.log} ...\n"
                log.write(text[:LOG_END] + middle + text[-LOG_END:])
            else:
                log.write(text)
        return text


def how(status: int | None, what: str) -> str:
    """Say how a process ended."""
    return f"{what} took too long" if status is None else f"{what} ended with status {status}"


def expect(status: int | None, what: str) -> None:
    """Fail unless a process ended well."""
    if status != 0:
        raise Failed(how(status, what))
