"""The benchmarks' one way to measure: candidates take turns in one process, beside a copy.

Each benchmark gives candidates, the bytes that the op must move at least, and rotating inputs (so
that nothing is read from a warm cache). The table at the end shows medians; `speedup` is the median
of ratios of neighbouring calls, and `of copy` is the floor's bytes over the time, as a share of the
bandwidth that a copy of the same tensor reached in the same rounds. Where PyTorch has several ways,
the fastest counts, and `beside` names it. CUDA is timed by events, with its L2 cleared before each
call; below the table stand the plans that ran, where there was a choice.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcnn import plan
from fastcnn.lab import interleaved, ratio
from fastcnn.lab.measure import clock_of
from fastcnn.plan.environment import environment_of
from fastcnn.plan.problem import describe
from fastcnn.plan.table import table

ROUNDS, WARMUP = 12, 3
ROWS: list[list[str]] = []
DEVICES: set[torch.device] = set()  # that the rows were measured on
HEADER = ["case", "fastcnn ms", "PyTorch ms", "speedup", "copy ms", "of copy", "beside"]

Candidate = Callable[[Any], object]


@pytest.fixture(autouse=True)
def fastest_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN try its algorithms, for all candidates alike."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that measures candidates, records them in extra_info and adds a row.

    ours and eager, or each of several by name, take one element of inputs; floor_passes counts
    reads and writes of image's bytes, of which a copy makes two.
    """

    def run(
        ours: Candidate,
        eager: Candidate | Mapping[str, Candidate],
        inputs: Sequence[Any],
        floor_passes: float,
        image: Tensor,
    ) -> None:
        baselines = eager if isinstance(eager, Mapping) else {"eager": eager}

        def in_turn(candidate: Candidate) -> Callable[[], object]:
            turn = itertools.cycle(inputs)
            return lambda: candidate(next(turn))

        target = torch.empty_like(image)
        copies = itertools.cycle([torch.randn_like(image) for _ in inputs])
        candidates = {name: in_turn(one) for name, one in {"ours": ours, **baselines}.items()}
        copy = {"copy": lambda: target.copy_(next(copies))}
        times = interleaved({**candidates, **copy}, ROUNDS, WARMUP, clock_of(image.device))
        DEVICES.add(image.device)
        ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        best = min(baselines, key=ms.__getitem__)
        speedup = ratio(times[best], times["ours"])
        of_copy = floor_passes / 2 * ratio(times["copy"], times["ours"])
        benchmark.extra_info.update(
            ms, best=best, speedup=speedup, of_copy=of_copy, floor_passes=floor_passes,
            bytes=image.numel() * image.element_size(),
        )  # fmt: skip
        ROWS.append(
            [
                request.node.callspec.id,
                digits(ms["ours"]),
                digits(ms[best]),
                f"{speedup:.2f}x",
                digits(ms["copy"]),
                f"{of_copy:.0%}" if floor_passes else "-",
                best,
            ]
        )
        # For pytest-benchmark's record, which holds only what runs through it. Its time is of calls
        # in a row and of one candidate: nothing to compare with. The table at the end is.
        benchmark.pedantic(ours, args=(inputs[0],), rounds=3)

    return run


def digits(milliseconds: float) -> str:
    """Return milliseconds, where short kernels still differ."""
    return f"{milliseconds:.{2 if milliseconds >= 1 else 4}f}"


def conditions(device: torch.device) -> str:
    """Return the device and the versions that times depend on, in a line."""
    found = environment_of(describe(device))
    line = f"{found['device']}, torch {found['torch']}"
    if device.type == "cuda":
        return (
            f"{line}, CUDA {torch.version.cuda}, driver {found['driver']}, triton {found['triton']}"
        )
    return f"{line} with {torch.backends.cpu.get_cpu_capability()}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, and below it the plans."""
    if not ROWS:
        return
    for device in sorted(DEVICES, key=str):
        terminalreporter.write_line(conditions(device))
    widths = [max(map(len, column)) for column in zip(HEADER, *ROWS, strict=True)]
    for row in [HEADER, *ROWS]:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        terminalreporter.write_line("  ".join([first, *rest]))
    if chosen := plan.rows():
        terminalreporter.write_line(f"\nplans: {plan.summary()}\n{table(chosen)}")
