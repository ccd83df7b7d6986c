"""make bench-models: networks of other people through convert, training and inference, two types.

Each network runs in a process of its own; in it all candidates take turns, so that a slow spell of
the machine is everybody's, each after a pause: OpenVINO's threads and OpenMP's first wait for more
work in a loop, on cores that the next candidate needs. Of each case a row is kept at once:

    network what dtype batch size     of the images
    ms          medians of a call, by candidate
    speedup     how many times as fast ours is: the median of the rounds' ratios, by candidate
    errors      by candidate, which then has no times

    python benchmarks/models.py FILE.json [NETWORK ...]   networks that it has are not run again
    --quick     six networks, few rounds, without torch.compile: five minutes
    --table     print the table of a file
"""

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLUMNS = [(what, dtype) for what in ("training", "inference") for dtype in ("bf16", "fp32")]
OTHERS = ("eager", "torch.compile", "OpenVINO")
FLOOR = 0.97  # below it a network is slower: the rest is noise
ROUNDS, QUICK_ROUNDS = (9, 2), (3, 1)  # that count, and of warm-up
PAUSE = 0.02  # seconds

Row = dict[str, Any]


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("networks", nargs="*")
    for flag in ("--quick", "--table", "--one"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    if asked.one:
        one(asked.file, asked.networks[0], asked.quick)
    elif not asked.table:
        all_of(asked.file, asked.networks, asked.quick)
    if not asked.one:
        print(table(json.loads(asked.file.read_text())))


def all_of(file: Path, names: list[str], quick: bool) -> None:
    """Run networks, each in a process of its own."""
    from foreign_networks import NETWORKS, QUICK

    if file.exists():
        kept, here = json.loads(file.read_text()), conditions(quick)
        changed = [key for key in here if key != "date" and kept.get(key) != here[key]]
        if changed:
            raise SystemExit(
                f"{file}: expected rows of the same {', '.join(changed)}, got "
                f"{[kept.get(key) for key in changed]} there, {[here[key] for key in changed]} "
                "here; name another file with RESULTS="
            )
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise SystemExit(f"networks: expected some of {', '.join(NETWORKS)}, got {unknown}")
    done = {row["network"] for row in json.loads(file.read_text())["rows"]} if file.exists() else ()
    failed: list[str] = []
    for name in names or (QUICK if quick else list(NETWORKS)):
        if name not in done:
            flags = ["--quick"] * quick
            ran = subprocess.run([sys.executable, __file__, file, name, "--one", *flags])
            failed += [name] * (ran.returncode != 0)
    if failed:
        raise SystemExit(f"ended in an error: {', '.join(failed)}")


def one(file: Path, name: str, quick: bool) -> None:
    """Run the cases of one network, and add their rows to a file."""
    import fastcnn

    fastcnn.keep_freed_memory()
    rows = [measured(name, what, dtype, quick) for what, dtype in COLUMNS]
    found = json.loads(file.read_text()) if file.exists() else {**conditions(quick), "rows": []}
    found["rows"] += rows
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(fresh, file)


def conditions(quick: bool) -> Row:
    """Return what the times of a file depend on."""
    import torch

    from fastcnn.plan.environment import environment_of
    from fastcnn.plan.problem import describe

    rounds, warmup = QUICK_ROUNDS if quick else ROUNDS
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": environment_of(describe(torch.device("cpu")))["device"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "memory_format": "channels_last",
        "rounds": f"medians of {rounds} after {warmup} of warm-up, in turns, each after a pause",
    }


def measured(name: str, what: str, dtype: str, quick: bool) -> Row:
    """Return the row of a case."""
    import torch
    from foreign_networks import NETWORKS, candidates

    from fastcnn.lab import interleaved, ratio

    network = NETWORKS[name]
    runs = candidates(network, what, dtype == "bf16", compiles=not quick)
    errors: dict[str, str] = {}
    for way in list(runs):
        try:
            runs[way]()
        except Exception as error:
            if way == "ours":
                raise
            errors[way] = f"{type(error).__name__}: {error}"[:300]
            del runs[way]
    times = interleaved(runs, *(QUICK_ROUNDS if quick else ROUNDS), _rested)
    torch.compiler.reset()
    row: Row = {
        "network": name, "what": what, "dtype": dtype, "batch": network.batch, "size": network.size,
        "ms": {way: round(1e3 * statistics.median(t), 2) for way, t in times.items()},
        "speedup": {
            way: round(ratio(times[way], times["ours"]), 3) for way in times if way != "ours"
        },
    }  # fmt: skip
    if errors:
        row["errors"] = errors
    print(name, what, dtype, row["ms"], row["speedup"], *errors.values(), flush=True)
    return row


def _rested(call: Callable[[], object]) -> float:
    """Return the seconds of a call that finds the cores idle."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(found: Row) -> str:
    """Return a line a network, the slowest vs. eager first, and the geometric means."""
    rows = {(row["network"], row["what"], row["dtype"]): row for row in found["rows"]}
    names = {row["network"]: None for row in found["rows"]}
    columns = [
        (what, dtype, other)
        for what, dtype in COLUMNS
        for other in OTHERS
        if any(other in rows[key]["speedup"] for key in rows if key[1:] == (what, dtype))
    ]

    def speedups(name: str) -> list[float | None]:
        of_column = [rows.get((name, what, dtype)) for what, dtype, _ in columns]
        pairs = zip(of_column, columns, strict=True)
        return [None if row is None else row["speedup"].get(other) for row, (*_, other) in pairs]

    def worst(name: str) -> float:
        return min(row["speedup"]["eager"] for key, row in rows.items() if key[0] == name)

    lines = [["", *(f"{what[:5]} {dtype}" for what, dtype, _ in columns)]]
    lines.append(["network", *(f"vs. {other}" for *_, other in columns)])
    for name in sorted(names, key=worst):
        marked = f"{name} (a loss)" if worst(name) < FLOOR else name
        lines.append([marked, *("-" if v is None else f"{v:.2f}" for v in speedups(name))])
    by_column = zip(*map(speedups, names), strict=True)
    means = [_geometric_mean([v for v in values if v is not None]) for values in by_column]
    lines.append(["geometric mean", *(f"{mean:.3f}" for mean in means)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = (
        f"{found['processor']}, {found['instructions']}, {found['threads']} threads, "
        f"torch {found['torch']}, {found['date']}: how many times as fast ours is"
    )
    padded = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    ]
    return "\n".join([head, *padded])


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _commit() -> str:
    asked = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]
    main()
