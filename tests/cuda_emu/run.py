"""Runs an op's CUDA kernels under the emulator: tensors in, tensors out."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

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


FOLDER = {"pixel_norm_act": "group_norm_act"}  # of csrc/cuda, where it is not the op's name


def run_cases(op: str, cases: Sequence[Case], timeout: float = 600) -> list[Result]:
    """Run the cases in the driver `cuda_emu/<op>.cpp`, built when it is not there.

    Raises:
        RuntimeError: a case failed; the message names it and holds the emulator's or the
            sanitizer's report.
    """
    cuda = build.ROOT / "csrc" / "cuda"
    of_op = sorted((cuda / FOLDER.get(op, op)).glob("*.cu")) or [cuda / f"{op}.cu"]
    sources = [Path(__file__).with_name(f"{op}.cpp"), *of_op]
    program = build.build_runner(sources, Path(op))
    count = build.PROCESSES
    parts = [cases[i::count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        of_parts = list(pool.map(lambda part: _run_process(program, part, timeout), parts))
    return [of_parts[i % count][i // count] for i in range(len(cases))]


def _run_process(program: Path, cases: Sequence[Case], timeout: float) -> list[Result]:
    """One process for many cases, and one file for their tensors.

    A process costs more than a small case, and so does a file: on ext4 the creation of one goes
    through those deleted before.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "tensors").open("wb") as file:
            written = [_write(file, case) for case in cases]
            file.truncate(file.tell())
        (folder / "cases").write_text("".join(f"{line}\n" for line, _ in written))
        done = subprocess.run(
            [program, folder], capture_output=True, text=True, check=False, timeout=timeout
        )
        if done.returncode != 0 or done.stderr:
            last = [line for line in done.stdout.splitlines() if line.startswith("run ")][-1:]
            raise RuntimeError(f"exit status {done.returncode} at {last}:\n{done.stderr}")
        errors = [
            int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("error ")
        ]
        data = bytearray((folder / "tensors").read_bytes())
        return [
            _read(data, case, places, error)
            for case, (_, places), error in zip(cases, written, errors, strict=True)
        ]


def _write(file: BinaryIO, case: Case) -> tuple[str, dict[str, int]]:
    """The case's line, with its inputs in the file and room for its outputs; where each one is."""
    words = [case.op, *(f"{name}={value!r}" for name, value in case.numbers.items())]
    given = {name: t for name, t in case.inputs.items() if t is not None}
    places = {}
    for kind, tensors in (("in", given), ("inout", case.updated), ("out", case.outputs)):
        for name, t in tensors.items():
            assert t.is_contiguous(), name
            places[name] = file.tell()
            skip = case.skip.get(name, 0) * t.itemsize
            words.append(f"{name}={kind}:{places[name]}:{t.nbytes}:{skip}")
            if kind == "out":
                file.seek(t.nbytes, os.SEEK_CUR)
            else:
                file.write(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return " ".join(words), places


def _read(data: bytearray, case: Case, places: dict[str, int], error: int) -> Result:
    if error != 0:
        return Result(error, {})

    def tensor(name: str, t: Tensor) -> Tensor:
        there = data[places[name] : places[name] + t.nbytes]
        return torch.frombuffer(there, dtype=t.dtype).reshape(t.shape)

    return Result(0, {name: tensor(name, t) for name, t in (case.outputs | case.updated).items()})
