"""The stages: what each runs, and what it finds."""

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from gpu import benchmark_table
from gpu.run import CACHE, ROOT, SITE, WORK, Failed, Found, Run, expect, how
from gpu.sanitize import sanitize

PIP: list[str | Path] = [
    sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index",
]  # fmt: skip
PYTEST: list[str | Path] = [
    sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
    # What these versions of PyTorch and Triton warn of is shown, and fails nothing.
    *("-W", "default", "-p", "no:cacheprovider"),
]  # fmt: skip
BENCHMARKS = [*PYTEST, "-q", "--benchmark-disable", "-p", "no:logging"]
MEMORY_BOUND = (
    "batch_norm_act", "group_norm_act", "dropout", "upsample", "depthwise_conv2d", "squeeze_excite",
)  # fmt: skip
LAST_CASE = 15  # seconds for the case that is running when a stage's time is over
WARMERS = 4  # processes that compile, each with tensors of a whole network's training, 30 GB
WARMING = 0.4  # of their stage's time at most
NONE_SELECTED = 5  # pytest's status
HANGS = 60  # seconds after which a test's log says where it is
# A file each: a launch that goes wrong ends all else in its process. Most of their time is Triton's
# compiling.
TEST_PROCESSES = max(2, min(8, (os.cpu_count() or 2) // 2))


def build(run: Run) -> Found:
    """Install from this checkout, with code for this machine's GPUs alone."""
    started = time.monotonic()
    status = run.execute(
        [*PIP, "--upgrade", "--target", SITE, f"-Cbuild-dir={WORK / 'cmake'}", ROOT],
        FASTCNN_CUDA="ON",
        CUDAFLAGS="-lineinfo",  # for compute-sanitizer; the code is the same
    )
    seconds = round(time.monotonic() - started, 1)
    expect(status, "pip install")
    expect(run.execute([sys.executable, "-m", "fastcnn.info"]), "fastcnn.info")
    return {"build_seconds": seconds}


def test(run: Run) -> Found:
    """Run the tests marked gpu."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if is_marked(path)]
    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        ended = [*pool.map(lambda path: test_file(run, path), files)]
    failures = {name: why for one in ended for name, why in one["failures"].items()}
    skipped = {name: why for one in ended for name, why in one["skipped"].items()}
    found: Found = {"passed": sum(one["passed"] for one in ended)}
    found |= {"failures": failures, "skipped": skipped}
    if failures or not found["passed"]:
        raise Failed(f"{len(failures)} failed, {found['passed']} passed", found)
    return found


def is_marked(path: Path) -> bool:
    """Whether a file has tests marked gpu."""
    return re.search(r"\bmark\.gpu\b", path.read_text()) is not None


def test_file(run: Run, path: Path) -> Found:
    """Run the marked tests of one file."""
    name = f"{path.parent.name}/{path.name}"  # as many folders have a test_values.py
    own = run.apart(f"{path.parent.name}-{path.stem}")
    report = own.log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    # The log names the test that hangs, and where it does: not all are ended by an interrupt.
    hangs = ["-v", "-o", f"faulthandler_timeout={HANGS}"]
    status = own.execute([*PYTEST, *hangs, "-m", "gpu", f"--junitxml={report}", path])
    run.append(own)
    found: Found = {"passed": 0, "failures": {}, "skipped": {}}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        test = f"{case.get('classname')}::{case.get('name')}"
        why = {child.tag: first_line(child.get("message", "")) for child in case}
        if "failure" in why or "error" in why:
            found["failures"][test] = why.get("failure") or why["error"]
        elif "skipped" in why:
            found["skipped"][test] = why["skipped"]
        else:
            found["passed"] += 1
    # The mark may be in a comment or string alone: then pytest has deselected all.
    if status is None or (status not in (0, NONE_SELECTED) and not found["failures"]):
        found["failures"][name] = how(status, name)
    return found


def first_line(text: str) -> str:
    """Return the first line, for a table."""
    return (text.splitlines() or [""])[0][:200]


def step(run: Run) -> Found:
    """Time a training step of ResNet-50, all convolutions cuDNN's, and the same as a CUDA graph."""
    return benchmark(run, "off", "bench_networks.py::test_training_step[resnet50-224px-bf16-full]")


def memory(run: Run) -> Found:
    """Time the kernels that memory bounds."""
    return benchmark(run, "off", *[f"bench_{name}.py" for name in MEMORY_BOUND])


def convolutions(run: Run) -> Found:
    """Time the convolutions that the benchmarks name, by Triton's kernels and cuDNN's."""
    return benchmark(run, "tune", "bench_conv_bn_act.py", "bench_conv2d_int8.py")


def benchmark(run: Run, plans: str, *names: str, eager: bool = True) -> Found:
    """Run benchmarks, all without a name.

    plans: FASTCNN_PLAN. eager: vs. PyTorch's eager mode, as compiling takes most of the time. The
    rows are in the results' folder as they are measured.
    """
    rows = run.log.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    seconds = max(1, int(run.seconds_left()) - LAST_CASE)
    options = ["--eager"] * eager + [f"--rows={rows}", f"--seconds={seconds}"]
    files = [ROOT / "benchmarks" / name for name in names] or [ROOT / "benchmarks"]
    status = run.execute([*BENCHMARKS, *options, *files], FASTCNN_PLAN=plans)
    found = {"rows": benchmark_table.read(rows) if rows.exists() else [], **keep_plans(run)}
    if status != 0:
        raise Failed(how(status, "benchmarks"), found)
    return found


def tune(run: Run) -> Found:
    """Time all candidates of the convolutions of ResNet-50 and U-Net, once they are compiled."""
    program = Path(__file__).with_name("tune_networks.py")
    before = warming(run)
    with ThreadPoolExecutor(WARMERS) as pool:
        [*pool.map(lambda part: compile_part(before, program, part), range(WARMERS))]
    status = run.execute([sys.executable, program], FASTCNN_PLAN="tune")
    found = keep_plans(run)
    if status != 0:
        raise Failed(how(status, program.name), found)
    return found


def warming(run: Run) -> Run:
    """Return the run for what only compiles."""
    return run._replace(deadline=run.deadline - run.seconds_left() * (1 - WARMING))


def compile_part(run: Run, program: Path, part: int) -> None:
    """Compile a part of the candidates; what fails there is met again in tuning."""
    own = run.apart(f"compile-{part}")
    own.execute([sys.executable, program, f"{part}", f"{WARMERS}"], FASTCNN_PLAN="off")
    run.append(own)


def bench(run: Run) -> Found:
    """Run all benchmarks, with the plans there are; what has none is tuned there."""
    if importlib.util.find_spec("xdist"):
        # Compiling takes longer than measuring, but several processes may do it at once. Planned
        # without tuning: what is timed beside others is timed wrongly.
        warming(run).execute(
            [*BENCHMARKS, "--warm", "-n", f"{WARMERS}", ROOT / "benchmarks"], FASTCNN_PLAN="read"
        )
        # Nor has inductor timed its kernels alone: it does so again.
        for path in (WORK / "inductor").rglob("*.best_config"):
            path.unlink()
    return benchmark(run, "tune", eager=False)


def keep_plans(run: Run) -> Found:
    """Copy the GPU's plan file, the newest, and count its plans."""
    files = sorted((CACHE / "plans").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {"plans": 0}
    shutil.copy(files[-1], run.results / "plans.json")
    return {"plans": len(json.loads(files[-1].read_text())["plans"])}


# What is worth most comes first, with the seconds that each may take: nine minutes in all.
STAGES: dict[str, tuple[Callable[[Run], Found], float]] = {
    "build": (build, 120),
    "step": (step, 40),
    "memory": (memory, 95),
    "test": (test, 115),
    "convolutions": (convolutions, 55),
    "sanitize": (sanitize, 55),
    "tune": (tune, 60),
}
# Only where they are named.
ON_REQUEST: dict[str, tuple[Callable[[Run], Found], float]] = {"bench": (bench, 200)}
