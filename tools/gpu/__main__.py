"""Build, test, tune and measure on a machine with an NVIDIA GPU, in nine minutes.

    python -m gpu RESULTS [build,step,memory,test,convolutions,sanitize,tune,bench]

Runs with the calling Python and the packages it has, and downloads nothing; fastcnn is installed
into build/gpu, where a later call finds it. Each stage is processes of its own with a time limit.
Into the folder RESULTS go

    <stage>.log    what they printed
    <stage>.jsonl  what was measured, a line as soon as it is
    results.json   what was found, with date, commit, device, driver and versions
    table.md       the same for people
    plans.json     the plan file, of tuning and of the benchmarks

after each stage, so that a stage that fails loses nothing of the others; nor does a call for some
stages lose what others found in the same state. Without git, as in an archive of the sources,
COMMIT in the environment names the commit.
"""

import datetime
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from gpu import table
from gpu.run import ROOT, SITE, WORK, Failed, Found, Run
from gpu.stages import ON_REQUEST, STAGES

START = time.monotonic()
ALL = 540.0  # seconds for all stages: who gives them ten minutes may kill what takes longer
NEEDED = ("pip", "scikit_build_core", "pybind11", "pytest", "pytest_benchmark", "torch", "triton")


def main(arguments: Sequence[str]) -> int:
    """Run stages; return 0 if all went well."""
    if len(arguments) not in (1, 2) or not arguments[0]:
        stop("expected a folder for the results: make gpu RESULTS=dir [STAGES=build,step]")
    names = arguments[1].split(",") if len(arguments) == 2 and arguments[1] else [*STAGES]
    if unknown := [name for name in names if name not in STAGES | ON_REQUEST]:
        expected = ", ".join(STAGES | ON_REQUEST)
        stop(f"expected stages among {expected}, got {', '.join(unknown)}")
    machine = look()
    results = Path(arguments[0]).resolve()
    found = opened(results, machine)
    for name in names:
        print(f"gpu: {name}", flush=True)
        found["stages"][name] = one_stage(name, results)
        (results / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (results / "table.md").write_text(table.whole(found))
    print(table.short(found))
    return int(any(found["stages"][name]["status"] != "passed" for name in names))


def one_stage(name: str, results: Path) -> Found:
    """Run a stage, and return how it ended and what it found."""
    function, limit = (STAGES | ON_REQUEST)[name]
    WORK.mkdir(parents=True, exist_ok=True)
    deadline = min(time.monotonic() + limit, START + ALL)
    run = Run(results, results / f"{name}.log", deadline)
    run.log.write_text("")
    started = time.monotonic()
    found: Found = {}
    status, why = "passed", ""
    try:
        if name != "build" and not SITE.exists():
            raise Failed("nothing is built here: name the stage build first")
        found = function(run)
    except Failed as error:
        status, why, found = "failed", str(error), error.found
    except Exception as error:  # a mistake in here, too, loses nothing of the other stages
        status, why = "failed", f"{type(error).__name__}: {error}"
    return {"status": status, "why": why, "seconds": round(time.monotonic() - started, 1), **found}


def opened(results: Path, machine: Mapping[str, Any]) -> Found:
    """Return the results that are there, if they are of this state, or new ones."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / "results.json"
    if not path.exists():
        now = datetime.datetime.now(datetime.timezone.utc)
        return {"date": now.isoformat(timespec="seconds"), **machine, "stages": {}}
    before: Found = json.loads(path.read_text())
    other = [f"{name} {before.get(name)}" for name in machine if before.get(name) != machine[name]]
    if other:
        stop(
            f"expected an empty folder, or results of this state, got {path} of {', '.join(other)}"
        )
    return before


def look() -> Found:
    """Return what the results depend on, or stop where this cannot run."""
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        stop(f"expected the Python packages {', '.join(NEEDED)}, got none of {', '.join(absent)}")
    import torch

    if not torch.cuda.is_available():
        stop(f"expected a CUDA GPU that torch {torch.__version__} can use, got none")
    # Not from torch, which would keep a context on the GPU in this process.
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    device, driver = told.splitlines()[0].rsplit(", ", 1)
    versions = {name: metadata.version(name) for name in ("torch", "triton")}
    versions |= {"cuda": torch.version.cuda, "cudnn": f"{torch.backends.cudnn.version()}"}
    versions["python"] = platform.python_version()
    return {"commit": commit(), "device": device, "driver": driver, "versions": versions}


def commit() -> str:
    """Return the commit, with a + where files differ from it."""
    git = ["git", "-C", f"{ROOT}"]
    told = None
    if shutil.which("git"):
        told = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if told and told.returncode == 0:
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"],
            capture_output=True,
            text=True,
            check=True,
        )
        return told.stdout.strip() + "+" * bool(changed.stdout)
    if named := os.environ.get("COMMIT"):
        return named
    stop("expected a git checkout, or its commit as COMMIT=...: results are of one")


def stop(message: str) -> NoReturn:
    """End with one sentence."""
    sys.exit(f"gpu: {message}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
