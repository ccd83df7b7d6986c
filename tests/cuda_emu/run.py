"""Runs an op's CUDA kernels under the emulator: tensors in, tensors out."""

import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cuda_emu import build
from torch import Tensor

# The numbers of DType in csrc/common/types.h.
DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclass
class Case:
    """One call of a launcher. Tensors are passed as they lie in memory and must be contiguous."""

    op: str
    numbers: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Tensor | None] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(
        default_factory=dict
    )  # shape and dtype; contents do not go in
    updated: dict[str, Tensor] = field(default_factory=dict)
    skip: dict[str, int] = field(default_factory=dict)  # elements before a tensor: its misalignment


@dataclass
class Result:
    error: int  # the cudaError_t; where it is not 0 there are no tensors
    tensors: dict[str, Tensor]


PROCESSES = 2  # what CI's machines have cores for
# The sources that an op needs beyond its own.
SHARED = {"group_norm_act": ["slab_norm.cu"], "pixel_norm_act": ["slab_norm.cu"]}


def run_cases(op: str, cases: Sequence[Case], timeout: float = 600) -> list[Result]:
    """Run the cases in the driver `cuda_emu/<op>.cpp`, built when it is not there.

    Raises:
        RuntimeError: a case failed; the message names it and holds the emulator's or the
            sanitizer's report.
    """
    cuda = build.ROOT / "csrc" / "cuda"
    of_op = sorted(cuda.glob(f"{op.removesuffix('_act')}*.cu"))
    shared = [cuda / name for name in SHARED.get(op, ())]
    sources = [Path(__file__).with_name(f"{op}.cpp"), *of_op, *shared]
    program = build.build_runner(sources, Path(op))
    parts = [cases[i::PROCESSES] for i in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        of_parts = list(pool.map(lambda part: _run_process(program, part, timeout), parts))
    return [of_parts[i % PROCESSES][i // PROCESSES] for i in range(len(cases))]


def _run_process(program: Path, cases: Sequence[Case], timeout: float) -> list[Result]:
    """One process for many cases, as its start costs more than a small case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [_write(folder, i, case) for i, case in enumerate(cases)]
        (folder / "cases").write_text("".join(f"{line}\n" for line in lines))
        done = subprocess.run(
            [program, folder], capture_output=True, text=True, check=False, timeout=timeout
        )
        if done.returncode != 0 or done.stderr:
            last = [line for line in done.stdout.splitlines() if line.startswith("run ")][-1:]
            raise RuntimeError(f"exit status {done.returncode} at {last}:\n{done.stderr}")
        errors = [
            int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("error ")
        ]
        return [
            _read(folder, i, case, error)
            for i, (case, error) in enumerate(zip(cases, errors, strict=True))
        ]


def _write(folder: Path, i: int, case: Case) -> str:
    words = [case.op, *(f"{name}={value!r}" for name, value in case.numbers.items())]
    given = {name: t for name, t in case.inputs.items() if t is not None}
    for kind, tensors in (("in", given), ("inout", case.updated)):
        for name, t in tensors.items():
            assert t.is_contiguous(), name
            (folder / f"{i}.{name}").write_bytes(t.reshape(-1).view(torch.uint8).numpy().tobytes())
            words.append(f"{name}={kind}:{i}.{name}:{case.skip.get(name, 0) * t.itemsize}")
    for name, t in case.outputs.items():
        assert t.is_contiguous(), name
        words.append(f"{name}=out:{i}.{name}:{t.nbytes}:{case.skip.get(name, 0) * t.itemsize}")
    return " ".join(words)


def _read(folder: Path, i: int, case: Case, error: int) -> Result:
    tensors = {}
    if error == 0:
        for name, t in (case.outputs | case.updated).items():
            data = bytearray((folder / f"{i}.{name}").read_bytes())
            tensors[name] = torch.frombuffer(data, dtype=t.dtype).reshape(t.shape)
    return Result(error, tensors)
