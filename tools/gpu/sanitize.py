"""compute-sanitizer over one small call of each CUDA kernel."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.run import ROOT, SITE, Failed, Found, Run, how

CASES = [sys.executable, "-m", "support.kernel_cases"]
PATH = f"{SITE}{os.pathsep}{ROOT / 'tests'}"  # where support is
# Triton's kernels are checked for their addresses alone: the other tools do not know how their
# asynchronous copies and warp groups are ordered.
JOBS = [(tool, "cuda") for tool in ("memcheck", "racecheck", "initcheck", "synccheck")]
JOBS.append(("memcheck", "triton"))


def sanitize(run: Run) -> Found:
    """Run its tools side by side, once all kernels have been seen to be launched."""
    program = find()
    plain = run.apart("launched")
    # Triton compiles here, and not under a tool.
    status = plain.execute([*CASES, "--launched", "cuda", "triton"], PYTHONPATH=PATH)
    text = run.append(plain)
    everything = kernels() | triton_kernels()
    launched = everything & set(re.findall(r"^launched: .*?(\w+_kernel)\b", text, re.MULTILINE))
    missing = sorted(everything - launched)
    option = filter_option(program)
    with ThreadPoolExecutor(len(JOBS)) as pool:
        ended = pool.map(lambda job: check(run, program, option, *job), JOBS)
        errors = {" ".join(job): found for job, found in zip(JOBS, ended, strict=True)}
    found: Found = {"kernels": len(launched), "missing": missing, "errors": errors}
    wrong = [how(status, CASES[-1])] * (status != 0)
    wrong += [f"{job}: {number}" for job, number in errors.items() if number != 0]
    wrong += [f"never launched: {', '.join(missing)}"] * bool(missing)
    if wrong:
        raise Failed("; ".join(wrong), found)
    return found


def check(run: Run, program: str, option: str, tool: str, kind: str) -> int | str:
    """Return how many errors a tool reports, or why it cannot tell."""
    own = run.apart(f"{tool}-{kind}")
    command: list[str | Path] = [program, "--tool", tool, "--error-exitcode", "86"]
    command += ["--launch-timeout", "120"]  # until torch is imported
    command += ["--report-api-errors", "no"] * (tool == "memcheck")  # PyTorch asks and is refused
    # initcheck must also see what PyTorch's kernels write, or our inputs look unwritten.
    filtered = kind == "cuda" and tool != "initcheck"
    command += [option, "kns=fastcnn"] if filtered else ["--print-limit", "0"]
    # Without PyTorch's cache of memory each tensor is an allocation, whose end is known.
    status = own.execute(
        [*command, *CASES, kind], PYTHONPATH=PATH, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    text = run.append(own)
    return errors_of(text, status) if filtered else ours(text, status)


def errors_of(text: str, status: int | None) -> int | str:
    """Return the number of errors in compute-sanitizer's output, or why it cannot be told."""
    if status is None:
        return "took too long"
    # "ERROR SUMMARY: 2 errors", "RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)"
    counts = re.findall(r"SUMMARY: (\d+) (?:error|hazard)s?\b", text)
    if not counts:
        return f"no summary, status {status}"
    errors = int(counts[-1])
    return f"no errors, but status {status}" if status != 0 and errors == 0 else errors


def ours(text: str, status: int | None) -> int | str:
    """Return the number of errors in kernels of this package, where others were looked at too."""
    errors = errors_of(text, status)
    if not isinstance(errors, int):
        return errors
    # What follows a line that is not indented is of its error. The place may be a function that is
    # called or inlined; then the kernel is in a line of its own.
    each = re.split(r"^=+ (?=\S)", text, flags=re.MULTILINE)[1:]
    names = re.compile(rf"\b({'|'.join(kernels() | triton_kernels())})\b")
    return sum(names.search(error) is not None for error in each)


def filter_option(program: str) -> str:
    """Return the option that names kernels, which was once called otherwise."""
    told = subprocess.run([program, "--help"], capture_output=True, text=True)
    names = ("--kernel-name", "--kernel-regex")
    for name in names:
        if name in told.stdout:
            return name
    raise Failed(f"expected {' or '.join(names)} among compute-sanitizer's options, got neither")


def find() -> str:
    """Return compute-sanitizer's path."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [f"{Path(nvcc).resolve().parents[1]}"] if nvcc else []
    places = [f"{home}/{place}" for home in homes if home for place in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    program = shutil.which("compute-sanitizer", path=path)
    if program is None:
        raise Failed(f"expected compute-sanitizer on PATH or in {', '.join(places)}, got none")
    return program


def triton_kernels() -> set[str]:
    """Return the names of all Triton kernels, from their sources."""
    text = "".join(path.read_text() for path in (ROOT / "fastcnn" / "triton").glob("*_kernels.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))


def kernels() -> set[str]:
    """Return the names of all CUDA kernels, from their sources."""
    sources = [path for kind in ("cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    text = "".join(path.read_text() for path in sources)
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))
