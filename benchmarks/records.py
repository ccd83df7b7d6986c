"""What was measured: a row a case, written down at once as a line of JSON.

case file          as pytest names them; dtype and layout are in the case
device             and the versions that times depend on
ms quartiles       of a call, by candidate: median, and [lower, upper]
best               PyTorch's fastest
speedup            of ours over each of the others: {"ours": {"eager": 1.5, ...}, ...}
copy_gb_s of_copy  what a copy reached in the same rounds, bytes read and written; ours' share
                   of it with `floor_passes` passes over `bytes`
images_per_s       by candidate       peak_bytes  likewise, beside what was there before
kept_ratio         bytes saved for backward, as a share of eager's
late               calls whose time may include waiting for the host (fastcnn/plan/timer.py)
plans              problem: plan, of ours
errors             by candidate, which then has no times; of the case alone: `error`, or why it
                   was `skipped`
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcnn.lab import ratio
from fastcnn.plan.timer import Timer

__all__ = ["OURS", "Records", "counted", "measured"]

OURS = "ours"  # by this name, or with more behind a comma


class Records:
    """The rows of a run, and the file that keeps each from then on."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        if path is not None:
            path.touch()  # where it cannot be written, that is said before anything is measured

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measured(
    times: Mapping[str, Sequence[float]], floor_passes: float, nbytes: int, images: int = 0
) -> dict[str, Any]:
    """Return a row's numbers from the seconds of ours, PyTorch's ways and a copy of nbytes."""
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    ways = [name for name in times if name.partition(",")[0] == OURS]
    baselines = [name for name in times if name not in ways and name != "copy"]
    row = {
        "ms": ms,
        "quartiles": {name: _quartiles(seconds) for name, seconds in times.items()},
        "best": min(baselines, key=ms.__getitem__, default=None),
        "speedup": {
            way: {other: ratio(times[other], times[way]) for other in baselines} for way in ways
        },
        "bytes": nbytes,
        "floor_passes": floor_passes,
        "copy_gb_s": 2 * nbytes / ms["copy"] / 1e6,
    }
    if floor_passes:
        row["of_copy"] = floor_passes / 2 * ratio(times["copy"], times[OURS])
    if images:
        row["images_per_s"] = {name: 1e3 * images / ms[name] for name in (*ways, *baselines)}
    return row


def counted(
    timer: Timer, runs: Mapping[str, Callable[[], object]], late: dict[str, int]
) -> Callable[[Callable[[], object]], float]:
    """Return the timer's clock, which counts in `late` the calls of each run that were late."""
    names = {run: name for name, run in runs.items()}

    def seconds(run: Callable[[], object]) -> float:
        before = timer.late
        took = timer.seconds(run)
        if timer.late > before:
            late[names[run]] = late.get(names[run], 0) + 1
        return took

    return seconds


def _quartiles(seconds: Sequence[float]) -> list[float]:
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return [1e3 * lower, 1e3 * upper]
