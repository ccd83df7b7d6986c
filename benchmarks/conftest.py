"""The benchmarks' one way to measure: candidates take turns in one process, beside a copy.

Each benchmark gives candidates, the bytes that the op must move at least, and rotating inputs (so
that nothing is read from a warm cache). The table at the end shows medians; `speedup` is the median
of ratios of neighbouring calls, and `of copy` is the floor's bytes over the time, as a share of the
bandwidth that a copy of the same tensor reached in the same rounds. Where PyTorch has several ways,
the fastest counts, and `beside` names it. On CUDA calls of ops are timed by fastcnn/plan/timer.py,
whole networks by the process's clock, as on the CPU; below the table stand the plans that ran,
where there was a choice.

    --rows=FILE   each case becomes a line of JSON there at once (records.py)
    --seconds=N   cases that would begin later are skipped, which their rows say
    --eager       torch.compile, which takes most of the time, is left out
    --warm        every candidate is called once and nothing timed: what they compile is then in
                  the caches on disk, and may be compiled by many processes at once
"""

import contextlib
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from candidates import peak_bytes
from records import OURS, Records, counted, measured
from torch import Tensor
from where import HAS_GPU, ON_GPU, TINY

from fastcnn import plan
from fastcnn.lab import interleaved
from fastcnn.plan.environment import environment_of
from fastcnn.plan.problem import describe
from fastcnn.plan.table import table
from fastcnn.plan.timer import timer_for

START = time.monotonic()
ROUNDS, WARMUP = (2, 0) if TINY else (12, 3)
HEADER = ["case", "fastcnn ms", "PyTorch ms", "speedup", "copy ms", "of copy", "beside"]
# On a GPU: what is worth most comes first, where time may run out.
ORDER = ["batch_norm_act", "networks", "upsample", "dropout", "group_norm_act", "conv_bn_act"]

RECORDS = pytest.StashKey[Records]()
RECORDED = pytest.StashKey[bool]()

Candidate = Callable[[Any], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastcnn")
    group.addoption("--rows", type=Path, help="file for a line of JSON a case")
    group.addoption("--seconds", type=float, help="skip cases that would begin later")
    group.addoption("--eager", action="store_true", help="leave out torch.compile")
    group.addoption("--warm", action="store_true", help="call every candidate once, time nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = Records(config.getoption("rows"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let warnings end no measurement: they are shown at the end."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
    if ON_GPU:
        names = [f"bench_{name}" for name in ORDER]
        items.sort(
            key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names)
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin too late."""
    seconds = item.config.getoption("seconds")
    if seconds is not None and time.monotonic() - START >= seconds:
        why = f"--seconds={seconds:g} were over"
        record(item, {"skipped": why})
        pytest.skip(why)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Make a row of an error too, and end the run where the GPU is lost."""
    report = yield
    if report.failed and call.excinfo is not None and not item.stash.get(RECORDED, False):
        record(item, {"error": call.excinfo.exconly()})
    if report.failed and HAS_GPU:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            item.session.shouldfail = f"the GPU answers no more: {error}"
    return report


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let cuDNN try its algorithms, for all candidates alike; leave nothing to the next case."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if HAS_GPU:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def warm(request: pytest.FixtureRequest) -> bool:
    """Whether candidates are only called once, beside other processes."""
    return bool(request.config.getoption("warm"))


@pytest.fixture
def compare(benchmark: Any, warm: bool, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that measures candidates, records them in extra_info and adds a row.

    ours and eager, or each of several by name, take one element of inputs; floor_passes counts
    reads and writes of image's bytes, of which a copy makes two. more: other ways of ours, by their
    names, "ours, ...". images: how many go into a call. whole: the host's time counts too.
    """

    def run(
        ours: Candidate,
        eager: Candidate | Mapping[str, Candidate],
        inputs: Sequence[Any],
        floor_passes: float,
        image: Tensor,
        more: Mapping[str, Candidate] | None = None,
        images: int = 0,
        whole: bool = False,
        **facts: Any,
    ) -> None:
        baselines = dict(eager) if isinstance(eager, Mapping) else {"eager": eager}
        if request.config.getoption("eager"):
            baselines = {name: one for name, one in baselines.items() if "compiled" not in name}

        def in_turn(candidate: Candidate) -> Callable[[], object]:
            turn = itertools.cycle(inputs)
            return lambda: candidate(next(turn))

        candidates = {OURS: ours, **({} if warm else more or {}), **baselines}
        runs = {name: in_turn(one) for name, one in candidates.items()}
        with noted_plans(image.device) as plans:
            runs[OURS]()
        errors = first_calls(runs)
        if not warm:
            row = {
                "plans": plans,
                **facts,
                **timed(runs, len(inputs), floor_passes, image, images, whole),
            }
            benchmark.extra_info.update(row)
            record(request.node, {**row, **({"errors": errors} if errors else {})})
        # For pytest-benchmark's record, which holds only what runs through it. Its time is of calls
        # in a row and of one candidate: nothing to compare with. The table at the end is.
        benchmark.pedantic(ours, args=(inputs[0],), rounds=1 if TINY or warm else 3)
        if errors:
            pytest.fail("\n".join(f"{name}: {error}" for name, error in errors.items()))

    return run


def first_calls(runs: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Call each, which may compile; take out those that raise, and return what they raised."""
    errors: dict[str, str] = {}
    for name in list(runs):
        try:
            runs[name]()
            if HAS_GPU:
                torch.cuda.synchronize()
        except Exception as error:
            if name == OURS:
                raise
            errors[name] = f"{type(error).__name__}: {error}"
            del runs[name]
    return errors


def timed(
    runs: Mapping[str, Callable[[], object]],
    inputs: int,
    floor_passes: float,
    image: Tensor,
    images: int,
    whole: bool,
) -> dict[str, Any]:
    """Return a row's numbers."""
    target = torch.empty_like(image)
    copies = itertools.cycle([torch.randn_like(image) for _ in range(inputs)])
    runs = {**runs, "copy": lambda: target.copy_(next(copies))}
    late: dict[str, int] = {}
    if image.device.type == "cpu" or whole:
        times = interleaved(runs, ROUNDS, WARMUP)
    else:
        clock = counted(timer_for(image.device), runs, late)
        times = interleaved(runs, ROUNDS, WARMUP, clock)
    row = measured(times, floor_passes, image.numel() * image.element_size(), images)
    if late:
        row["late"] = late
    if whole and HAS_GPU:
        names_of_peaks = [name for name in runs if "graph" not in name and name != "copy"]
        row["peak_bytes"] = {name: peak_bytes(runs[name]) for name in names_of_peaks}
    return row


@contextlib.contextmanager
def noted_plans(device: torch.device) -> Iterator[dict[str, str]]:
    """Note what the planner answers."""
    planner = plan._planner()
    found: dict[str, str] = {}

    def choose(problem: plan.Problem, busy: str | None = None) -> Any:
        chosen = type(planner).choose(planner, problem, busy)
        key = problem.key(describe(problem.device)).split(" on ")[0]
        found[key] = f"{chosen.name} ({chosen.source})"
        return chosen

    planner.choose = choose  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del planner.choose  # type: ignore[method-assign]


def record(item: Any, row: dict[str, Any]) -> None:
    """Keep a case's row."""
    item.stash[RECORDED] = True
    device = torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")
    names = {"case": item.callspec.id, "test": item.originalname, "file": item.path.stem}
    item.config.stash[RECORDS].add({**names, "device": conditions(device), **row})


def digits(milliseconds: float) -> str:
    """Return milliseconds, where short kernels still differ."""
    return f"{milliseconds:.{2 if milliseconds >= 1 else 4}f}"


@functools.cache
def conditions(device: torch.device) -> str:
    """Return the device and the versions that times depend on, in a line."""
    found = environment_of(describe(device))
    line = f"{'tiny sizes, no times: ' if TINY else ''}{found['device']}, torch {found['torch']}"
    if device.type == "cuda":
        return (
            f"{line}, CUDA {torch.version.cuda}, driver {found['driver']}, triton {found['triton']}"
        )
    return f"{line} with {torch.backends.cpu.get_cpu_capability()}"


def lines(row: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the table's lines of a row, one for each of ours."""
    best, ms = row["best"], row["ms"]
    for way, speedups in row["speedup"].items():
        yield [
            row["case"] + way.removeprefix(OURS),
            digits(ms[way]),
            digits(ms[best]) if best else "-",
            f"{speedups[best]:.2f}x" if best else "-",
            digits(ms["copy"]),
            f"{row['of_copy']:.0%}" if "of_copy" in row and way == OURS else "-",
            best or "-",
        ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and below it the plans and what is missing."""
    rows = config.stash[RECORDS].rows
    timed_rows = [row for row in rows if "ms" in row]
    write = terminalreporter.write_line
    if timed_rows:
        for device in sorted({row["device"] for row in timed_rows}):
            write(device)
        cells = [HEADER, *itertools.chain.from_iterable(map(lines, timed_rows))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            first, *rest = (
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            write("  ".join([first, *rest]))
    if chosen := plan.rows():
        write(f"\nplans: {plan.summary()}\n{table(chosen)}")
    if failed := sum("error" in row for row in rows):
        write(f"{failed} cases ended in an error")
    if skipped := sum("skipped" in row for row in rows):
        write(f"{skipped} cases were skipped: --seconds={config.getoption('seconds'):g}")
