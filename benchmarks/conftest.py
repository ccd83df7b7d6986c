"""The benchmarks' one way to measure: candidates take turns in one process, beside a copy.

Each benchmark gives candidates, the bytes that the op must move at least, and rotating inputs (so
that nothing is read from a warm cache). The table at the end shows medians; `speedup` is the median
of ratios of neighbouring calls, and `of copy` is the floor's bytes over the time, as a share of the
bandwidth that a copy of the same tensor reached in the same rounds. CUDA is timed by events, with
its L2 cleared before each call.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcnn.lab import interleaved, ratio
from fastcnn.lab.measure import clock_of
from fastcnn.plan.environment import environment_of
from fastcnn.plan.problem import describe

ROUNDS, WARMUP = 12, 3
ROWS: list[list[str]] = []
DEVICES: set[torch.device] = set()  # that the rows were measured on
HEADER = ["case", "fastcnn ms", "PyTorch ms", "speedup", "copy ms", "of copy"]

Candidate = Callable[[Any], object]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that measures candidates, records them in extra_info and adds a row.

    ours and eager take one element of inputs; floor_passes counts reads and writes of image's
    bytes, of which a copy makes two.
    """

    def run(
        ours: Candidate,
        eager: Candidate,
        inputs: Sequence[Any],
        floor_passes: float,
        image: Tensor,
    ) -> None:
        target = torch.empty_like(image)
        sources = [torch.randn_like(image) for _ in inputs]
        turn = {name: itertools.cycle(inputs) for name in ("ours", "eager")}
        copies = itertools.cycle(sources)
        times = interleaved(
            {
                "ours": lambda: ours(next(turn["ours"])),
                "eager": lambda: eager(next(turn["eager"])),
                "copy": lambda: target.copy_(next(copies)),
            },
            ROUNDS,
            WARMUP,
            clock_of(image.device),
        )
        DEVICES.add(image.device)
        ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        speedup = ratio(times["eager"], times["ours"])
        of_copy = floor_passes / 2 * ratio(times["copy"], times["ours"])
        benchmark.extra_info.update(
            ms, speedup=speedup, of_copy=of_copy, floor_passes=floor_passes,
            bytes=image.numel() * image.element_size(),
        )  # fmt: skip
        ROWS.append(
            [
                request.node.callspec.id,
                digits(ms["ours"]),
                digits(ms["eager"]),
                f"{speedup:.2f}x",
                digits(ms["copy"]),
                f"{of_copy:.0%}" if floor_passes else "-",
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
    """Print the table."""
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
